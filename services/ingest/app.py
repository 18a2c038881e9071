"""The application: its routes, its resources, and what they are made of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from aiohttp import web

from services.contract.management import CachedCheck, ReadinessCheck, add_management_routes
from services.eventlog.metrics import LogMetrics
from services.eventlog.protocol import EventBrowser, EventWriter
from services.ingest.admission import Admission
from services.ingest.answers import Answers
from services.ingest.handlers import (
    ADMISSION,
    ANSWERS,
    METRICS,
    SETTINGS,
    WRITER,
    continue_or_refuse,
    get_problem,
    options,
    post_event,
)
from services.ingest.metrics import Metrics
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
from services.ingest.reading import options as read_options
from services.ingest.reading_follow import Followers
from services.ingest.settings import Settings

#: paths of the resources
CONSULTATIONS_PATH = "/consultations"
EVENTS_PATH = CONSULTATIONS_PATH + "/{consultation}/events"
EVENT_PATH = EVENTS_PATH + "/{message_id}"
#: seconds for which an answer of /readyz is kept: probes of many load balancers must not reach the broker
READY_SECONDS = 1.0
#: seconds after which the broker's silence is an answer: most probes wait no longer than this
READY_TIMEOUT = 2.5


@dataclass(frozen=True, slots=True)
class OpenLog:
    """The log, ready for use.

    Attributes:
        writer: takes the events.
        ready: says what is wrong with the log; nothing when it takes events.
        reader: shows the events that are stored.
        watching: while entered, keeps the metrics of the log up to date; a log in memory has none.
    """

    writer: EventWriter
    ready: ReadinessCheck
    reader: EventBrowser
    watching: Callable[[LogMetrics], AbstractAsyncContextManager[None]] = lambda _: nullcontext()


#: opens the log at start, and closes it when the application ends
LogOpener = Callable[[], AbstractAsyncContextManager[OpenLog]]


def make_app(settings: Settings, open_log: LogOpener) -> web.Application:
    """Build the application.

    Args:
        settings: of the process.
        open_log: called once, at start; may take as long as it needs.
    """
    app = web.Application(client_max_size=settings.max_event_bytes)
    metrics = Metrics()
    answers = Answers(metrics, retry_after=settings.retry_after)
    app[SETTINGS] = settings
    app[METRICS] = metrics
    app[ANSWERS] = answers
    # one event of the largest size is always taken: a limit below it would refuse such events for ever
    size = max(settings.max_in_flight_bytes, settings.max_event_bytes)
    app[ADMISSION] = admission = Admission(events=settings.max_in_flight, size=size)
    metrics.bytes_in_flight.set_function(lambda: admission.size)
    check: CachedCheck | None = None

    async def log(app: web.Application) -> AsyncIterator[None]:
        nonlocal check
        async with open_log() as opened:
            app[WRITER] = opened.writer
            app[READER] = opened.reader
            app[FOLLOWERS] = Followers(
                opened.reader, metrics, limit=settings.max_followers, interval=settings.follow_interval
            )
            check = CachedCheck(opened.ready, seconds=READY_SECONDS, timeout=READY_TIMEOUT)
            async with opened.watching(metrics.log):
                yield

    async def ready() -> list[str]:
        if answers.closing:
            return ["the service is stopping"]
        return ["the service is starting"] if check is None else await check()

    async def end_following(app: web.Application) -> None:
        await app[FOLLOWERS].close()

    app[READS] = Reads()
    app.cleanup_ctx.append(log)
    app.on_shutdown.append(end_following)
    app.router.add_post(EVENTS_PATH, post_event, expect_handler=continue_or_refuse)
    app.router.add_route("OPTIONS", EVENTS_PATH, options)
    app.router.add_get(EVENTS_PATH, list_events)
    for path, handler in ((EVENT_PATH, get_event), (CONSULTATIONS_PATH, list_consultations)):
        app.router.add_get(path, handler)
        app.router.add_route("OPTIONS", path, read_options)
    app.router.add_get(TYPE_PREFIX + "{slug}", get_problem)
    add_management_routes(app, metrics.registry, ready)
    return app
