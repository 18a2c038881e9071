"""The application: its routes, its resources, and what they are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from services.core.lifecycle import background_task
from services.core.management import CachedCheck, ReadinessCheck
from services.core.tokens import Scope
from services.core.tracing import Spans
from services.ingest.access import GATE, OPEN, VARIABLE, Gate, Tokens
from services.ingest.admission import Admission, Rates
from services.ingest.answers import Answers, TracedWriter, serving_spans
from services.ingest.changes import WatchedFiles
from services.ingest.handlers import (
    ADMISSION,
    ANSWERS,
    METRICS,
    SETTINGS,
    STORING,
    expecter,
    get_problem,
    options,
    poster,
    shower,
)
from services.ingest.keys import Keys
from services.ingest.metrics import Metrics
from services.ingest.openapi import DOCS_PATH, OPENAPI_PATH, PAGE_HEADERS, PAGE_TYPE, as_page, describe
from services.ingest.pressure import Pressure
from services.ingest.problems import TYPE_PREFIX
from services.ingest.reading import (
    FOLLOWERS,
    READER,
    READS,
    Reads,
    get_event,
    list_consultations,
    list_events,
)
from services.ingest.reading_follow import Followers
from services.ingest.resources import EVENTS, RESOURCES
from services.ingest.server import CERTIFICATE_VARIABLE, KEY_VARIABLE, TLS, Certificate, check_both
from services.ingest.settings import Settings
from services.ingest.storing import Storing
from services.log.metrics import LogMetrics
from services.log.protocol import EventBrowser, EventWriter
from services.log.status import Backlog

#: what keeps the service from taking events just now
READY: web.AppKey[ReadinessCheck] = web.AppKey("ready")
#: paths of the resources that are only read
CONSULTATIONS_PATH = "/consultations"
EVENT_PATH = EVENTS.path + "/{message_id}"
#: seconds for which an answer of /readyz is kept: probes of many load balancers must not reach the broker
READY_SECONDS = 1.0
#: seconds between two looks at what is known of the backlog
PRESSURE_SECONDS = 1.0
#: seconds after which the broker's silence is an answer: most probes wait no longer than this
READY_TIMEOUT = 2.5


@dataclass(frozen=True, slots=True)
class OpenLog:
    """The log, ready for use.

    Attributes:
        writer: takes the events.
        ready: says what is wrong with the log; nothing when it takes events.
        reader: shows the events that are stored.
        backlog: what waits to be committed; None while that is not known, or in a log that has no persisters.
    """

    writer: EventWriter
    ready: ReadinessCheck
    reader: EventBrowser
    backlog: Callable[[], Backlog | None] = lambda: None


#: opens the log at start, and closes it when the application ends; shows it in the metrics while it is open
LogOpener = Callable[[LogMetrics], AbstractAsyncContextManager[OpenLog]]


def make_app(
    settings: Settings, open_log: LogOpener, spans: Spans | None = None, *, version: str = ""
) -> web.Application:
    """Build the application.

    Args:
        settings: of the process.
        open_log: called once, at start; may take as long as it needs.
        spans: makes spans of what is posted, if anybody wants them.
        version: of the product, for its description.
    """
    metrics = Metrics()
    pressure = Pressure(settings.max_backlog, settings.retry_after, metrics)
    answers = Answers(metrics, retry_after=pressure.retry_after)
    tokens = Tokens(settings.token_file)
    rates = Rates(settings.rate, settings.rate_burst)
    gate = Gate(answers, metrics, tokens, rates, pressure.check)
    middlewares = [gate.middleware()] if spans is None else [serving_spans(spans), gate.middleware()]
    app = web.Application(client_max_size=settings.max_event_bytes, middlewares=middlewares)
    app[GATE] = gate
    app[SETTINGS] = settings
    app[METRICS] = metrics
    app[ANSWERS] = answers
    # one event of the largest size is always taken: a limit below it would refuse such events for ever
    size = max(settings.max_in_flight_bytes, settings.max_event_bytes)
    app[ADMISSION] = admission = Admission(
        events=settings.max_in_flight, size=size, batched=settings.max_batched_events
    )
    metrics.bytes_in_flight.set_function(lambda: admission.size)
    check: CachedCheck | None = None

    async def log(app: web.Application) -> AsyncIterator[None]:
        nonlocal check
        async with open_log(metrics.log) as opened:
            app[READER] = opened.reader
            app[FOLLOWERS] = Followers(
                opened.reader, metrics, limit=settings.max_followers, interval=settings.follow_interval
            )
            keys = Keys(
                opened.reader,
                metrics,
                partitions=settings.log.partitions,
                window=settings.log.duplicate_window,
                wait=settings.key_lookup_wait,
            )
            writer = opened.writer if spans is None else TracedWriter(opened.writer, spans)
            app[STORING] = Storing(writer, keys, metrics, answers, pressure)
            pressure.observed = opened.backlog
            check = CachedCheck(opened.ready, seconds=READY_SECONDS, timeout=READY_TIMEOUT)
            try:
                yield
            finally:
                await keys.close()

    async def ready() -> list[str]:
        if answers.closing:
            return ["the service is stopping"]
        return ["the service is starting"] if check is None else await check()

    async def end_following(app: web.Application) -> None:
        await app[FOLLOWERS].close()

    app[READS] = Reads()
    app.cleanup_ctx.append(log)
    app.on_shutdown.append(end_following)
    app.cleanup_ctx.append(_beside(lambda: _look(pressure), "pressure"))
    _watch_tokens(app, tokens, rates, metrics)
    if check_both(settings.tls_cert, settings.tls_key):
        _watch_certificate(app, Certificate(settings.tls_cert, settings.tls_key), settings, metrics)
    for resource in RESOURCES:
        each = "{consultation}" not in resource.path
        gate.add(app, "POST", resource.path, poster(resource), Scope.WRITE, each=each, expect=expecter(resource))
    gate.add(app, "GET", EVENTS.path, list_events, Scope.READ)
    gate.add(app, "GET", EVENT_PATH, get_event, Scope.READ)
    gate.add(app, "GET", CONSULTATIONS_PATH, list_consultations, Scope.READ, each=True)
    gate.add(app, "GET", TYPE_PREFIX + "{slug}", get_problem, OPEN)
    description = describe(settings, version)
    gate.add(app, "GET", OPENAPI_PATH, shower(orjson.dumps(description), "application/json"), OPEN)
    gate.add(app, "GET", DOCS_PATH, shower(as_page(description), PAGE_TYPE, PAGE_HEADERS), OPEN)
    _add_options(app, gate)
    app[READY] = ready
    return app


async def _look(pressure: Pressure) -> None:
    while True:
        pressure.look()
        await asyncio.sleep(PRESSURE_SECONDS)


def _add_options(app: web.Application, gate: Gate) -> None:
    """Let each resource that there is so far answer OPTIONS with its methods."""
    methods: dict[str, set[str]] = {}
    for route in app.router.routes():
        if route.resource is not None:
            methods.setdefault(route.resource.canonical, {"OPTIONS"}).add(route.method)
    for path, names in methods.items():
        gate.add(app, "OPTIONS", path, options(", ".join(sorted(names))), OPEN)


def _watch_tokens(app: web.Application, tokens: Tokens, rates: Rates, metrics: Metrics) -> None:
    """Read the tokens now, and again whenever their file has changed.

    Raises ConfigurationError: the file cannot be read, or is none.
    """
    if not tokens.asked_for:
        return

    def load() -> None:
        tokens.load()
        rates.keep(tokens.names)

    watched = WatchedFiles(VARIABLE, [tokens.path], load, lambda good: metrics.token_file_broken.set(0 if good else 1))
    watched.start()
    app.cleanup_ctx.append(_beside(watched.run, "token file"))


def _watch_certificate(app: web.Application, certificate: Certificate, settings: Settings, metrics: Metrics) -> None:
    """Read the certificate now, and again whenever its files have changed.

    Raises ConfigurationError: it cannot be read, or its key is another one's.
    """

    def load() -> None:
        certificate.load()
        metrics.certificate_expiry.clear()
        metrics.certificate_expiry.labels(certificate.shown.name).set(certificate.shown.expires)

    paths = [settings.tls_cert, settings.tls_key]
    what = f"{CERTIFICATE_VARIABLE}, {KEY_VARIABLE}"
    watched = WatchedFiles(what, paths, load, lambda good: metrics.certificate_broken.set(0 if good else 1))
    watched.start()
    app[TLS] = certificate.context
    app.cleanup_ctx.append(_beside(watched.run, "certificate"))


def _beside(
    run: Callable[[], Coroutine[Any, Any, None]], name: str
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Return a cleanup context of aiohttp that lets *run* go on for as long as the application does."""

    async def context(_: web.Application) -> AsyncIterator[None]:
        async with background_task(run(), name):
            yield

    return context
