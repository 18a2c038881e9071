"""One ingest process: from the command line and the settings to the application, its routes, and the exit code.

Sockets are bound before the log is reached, so a taken port is reported at once. The management endpoints come first
and go last: probes learn why nothing is served yet, and what is still in flight.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import orjson
import uvloop
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

import services.log
from fiq.errors import ConfigurationError, FiqError
from fiq.event import Event
from services.core import logs
from services.core.command import load_or_exit, memory_limit, parser, product_version, report_error, warn_of_unknown
from services.core.lifecycle import Stop, background_task, freeze_garbage, run_until_stopped, stop_on_signals
from services.core.logs import LogThrottle, get_logger
from services.core.management import CachedCheck, ReadinessCheck, bind, serve_management
from services.core.tokens import Scope
from services.core.tracing import REQUEST_TRACE, Spans, open_spans, trace_of
from services.core.watchdog import Watchdog
from services.ingest.access import ACCESS, OPEN, VARIABLE, WHOAMI_PATH, AccessControl, TokenStore, describe_token
from services.ingest.admission import (
    ADMISSION,
    IN_FLIGHT,
    NEW_CONSULTATIONS,
    Admission,
    BacklogLimiter,
    InFlight,
    NewConsultations,
    RateLimiter,
    WindowLimiter,
)
from services.ingest.events import APPENDER, IdempotentAppender, expect_handler, post_handler
from services.ingest.following import FOLLOWERS, Followers
from services.ingest.formats import EVENTS, RESOURCES
from services.ingest.idempotency import IdempotencyKeys
from services.ingest.metrics import METRICS, IngestMetrics
from services.ingest.openapi import (
    DOCS_PATH,
    OPENAPI_PATH,
    PAGE_HEADERS,
    PAGE_TYPE,
    Json,
    as_page,
    describe,
    own_url,
)
from services.ingest.operations import (
    DEAD_LETTERS,
    STATUS,
    WRITER,
    drop_dead_letter,
    get_dead_letter,
    get_pipeline,
    list_dead_letters,
    requeue_dead_letter,
)
from services.ingest.problems import BY_SLUG, REFUSALS, SERVER, TYPE_PREFIX, Refusals, RequestRefusedError
from services.ingest.reading import (
    FEED,
    MAX_READS,
    MAX_VERIFICATIONS,
    READ_LIMIT,
    READER,
    VERIFY_LIMIT,
    ReadLimit,
    follow_all,
    get_event,
    get_verification,
    list_conflicts,
    list_consultations,
    list_events,
    negotiate,
)
from services.ingest.records import HTML, JSON
from services.ingest.server import (
    CERTIFICATE_VARIABLE,
    KEY_VARIABLE,
    MAX_REJECTED,
    TLS,
    Certificate,
    HttpServer,
    check_both,
    checked_parameters,
)
from services.ingest.settings import SETTINGS, Settings
from services.ingest.ui import UI_FILE_PATH, UI_PATH, handlers
from services.log.metrics import LogMetrics
from services.log.protocol import EVENT_LOG, Appended, EventWriter, IngestLog, IngestRole, Status

PROGRAM = "fiq-ingest"
#: name of the connection in the servers' monitoring
CONNECTION_NAME = "fi-ingest"
#: a process without requests: the interpreter and its libraries, bytes
BASE_BYTES = 96 * 2**20
#: a body is in memory as it was read, as the event, and in the buffer of the connection to the log
COPIES = 3
#: open files besides the clients' connections: the log, both listeners, the libraries
_OTHER_FILES = 64
_MANAGEMENT = "FI_MANAGEMENT_HOST, FI_MANAGEMENT_PORT"


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes, and return the exit code."""
    parser(PROGRAM, "Takes events over HTTP and appends them to the log.", Settings).parse_args(arguments)
    settings = load_or_exit(PROGRAM, Settings, os.environ)
    logs.configure("ingest", level=settings.log_level)
    log = logs.get_logger("ingest")
    warn_of_unknown(log, os.environ)
    bounded = fit_memory(settings, memory_limit())
    if bounded != settings:
        log.info("MEMORY_BOUNDED", limit=memory_limit(), max_in_flight_bytes=bounded.max_in_flight_bytes)
    if (connectable := fit_open_files(bounded)) != bounded:
        bounded = connectable
        log.warning("CONNECTIONS_BOUNDED", max_connections=bounded.max_connections, reason="ulimit -n")
    try:
        return uvloop.run(_run(bounded))
    except FiqError as error:
        return report_error(PROGRAM, error)


async def _run(settings: Settings) -> int:
    stop = Stop()
    stop_on_signals(stop)
    with open_spans(PROGRAM, os.environ) as spans:
        await serve(settings, stop, version=product_version(), spans=spans)
    return stop.exit_code


def fit_memory(settings: Settings, limit: int | None) -> Settings:
    """Return *settings* with bodies in flight that fit into *limit* bytes; None is no limit.

    One body of the largest size is always taken.
    """
    if limit is None:
        return settings
    room = max(settings.max_event_bytes, (limit - BASE_BYTES) // COPIES)
    return dataclasses.replace(settings, max_in_flight_bytes=min(settings.max_in_flight_bytes, room))


def fit_open_files(settings: Settings) -> Settings:
    """Return *settings* with connections that fit into the limit of open files, which is raised as far as possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + MAX_REJECTED + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    return dataclasses.replace(settings, max_connections=max(1, soft - MAX_REJECTED - _OTHER_FILES))


async def serve(settings: Settings, stop: Stop, *, version: str, spans: Spans | None = None) -> None:
    """Serve until *stop* is requested.

    Args:
        settings: of the process.
        stop: ends it.
        version: of the product.
        spans: makes spans of what is posted, if they are wanted.

    Raises FiqError: the service could not start; its message says why.
    """
    with (
        Watchdog(settings.watchdog),
        bind(settings.host, settings.port, "FI_HOST, FI_PORT") as sock,
        bind(settings.management_host, settings.management_port, _MANAGEMENT) as management,
    ):
        _check_access(settings, sock.getsockname()[0])
        await _serve(settings, stop, version, sock, management, spans)


async def _serve(
    settings: Settings,
    stop: Stop,
    version: str,
    sock: socket.socket,
    management: socket.socket,
    spans: Spans | None,
) -> None:
    def lost(reason: str) -> None:
        stop.request(reason, failed=True)

    log = logs.get_logger("ingest")
    app = make_app(settings, lambda metrics: open_log(settings, lost, metrics), spans, version=version)
    server = HttpServer(app, sock, grace=settings.shutdown_grace)

    async def run() -> None:  # in one task, which is cancelled when a background task fails
        await server.start()
        freeze_garbage()
        host, port = sock.getsockname()[:2]
        where = {"host": host, "port": port, "management_port": management.getsockname()[1], "tls": TLS in app}
        log.info("INGEST_STARTED", **where, version=version)
        await asyncio.Event().wait()

    async with serve_management(management, app[METRICS].registry, app[READY], _MANAGEMENT):
        try:
            await run_until_stopped(run(), stop)
            log.info("INGEST_STOPPING", reason=stop.reason)
        finally:
            await server.stop()
    log.info("INGEST_STOPPED", reason=stop.reason)


def _check_access(settings: Settings, host: str) -> None:
    """Check that clients need tokens if other machines may reach *host*, the address that the process listens on.

    Raises ConfigurationError: they do not, and FI_ALLOW_ANONYMOUS is not set.
    """
    if settings.token_file:
        return
    if not ipaddress.ip_address(host).is_loopback and not settings.allow_anonymous:
        problem = (
            f"FI_TOKEN_FILE is not set, and other machines may reach {host} (FI_HOST): make a file of tokens with "
            "`fiq init` or `fiq token new`, and set FI_TOKEN_FILE to it; or set FI_ALLOW_ANONYMOUS=1 to let every "
            "client post and read"
        )
        raise ConfigurationError([problem])
    logs.get_logger("ingest").warning(
        "ACCESS_ANONYMOUS", host=host, reason="FI_TOKEN_FILE is not set: clients need no token"
    )


def open_log(
    settings: Settings, on_closed: Callable[[str], None], metrics: LogMetrics
) -> AbstractAsyncContextManager[IngestLog]:
    """Open the log that the settings name; see :func:`services.log.open_log`.

    Args:
        settings: of the process.
        on_closed: called with the reason when the log is lost for good.
        metrics: shows the log while it is open.
    """
    role = IngestRole(
        name=CONNECTION_NAME,
        max_event_bytes=settings.max_event_bytes,
        deadline=settings.publish_deadline,
        max_in_flight=settings.max_in_flight,
    )
    return services.log.open_log(settings.log, role, metrics=metrics, on_closed=on_closed)


# -- the application --------------------------------------------------------------------------------------------------

#: returns why the service takes no events at present
READY: web.AppKey[ReadinessCheck] = web.AppKey("ready")
INDEX_PATH, PROBLEMS_PATH = "/", "/problems"
CONSULTATIONS_PATH = "/consultations"
CONFLICTS_PATH = CONSULTATIONS_PATH + "/{consultation}/conflicts"
VERIFICATION_PATH = CONSULTATIONS_PATH + "/{consultation}/verification"
PIPELINE_PATH = "/pipeline"
DEAD_LETTERS_PATH = "/dead-letters"
DEAD_LETTER_PATH = DEAD_LETTERS_PATH + "/{sequence}"
FEED_PATH = "/events"
EVENT_PATH = EVENTS.path + "/{message_id}"
#: what ``GET /`` answers, as URI templates
LINKS = {
    "consultations": CONSULTATIONS_PATH + "{?prefix,after,limit,order}",
    "events": EVENTS.path + "{?after,before,limit,type,since,key,bodies}",
    "event": EVENT_PATH + "{?bodies}",
    "conflicts": CONFLICTS_PATH + "{?after,limit,bodies}",
    "verification": VERIFICATION_PATH,
    "follow": EVENTS.path + "?follow=1{&after,type,since,bodies}",
    "follow_all": FEED_PATH + "?follow=1{&after,type,since,bodies}",
    "pipeline": PIPELINE_PATH,
    "dead_letters": DEAD_LETTERS_PATH + "{?after,limit}",
    "dead_letter": DEAD_LETTER_PATH,
    "token": WHOAMI_PATH,
    "page": UI_PATH,
    "problems": PROBLEMS_PATH,
    "description": OPENAPI_PATH,
    "documentation": DOCS_PATH,
}
#: for which an answer of /readyz is kept: probes of many load balancers must not reach the log, seconds
READY_SECONDS = 1.0
#: for the log to answer /readyz: most probes wait no longer, seconds
READY_TIMEOUT = 2.5
#: between two updates of the backlog, seconds
BACKLOG_SECONDS = 1.0
#: between two looks at watched files, seconds
RELOAD_SECONDS = 1.0

#: opens the log, and shows it in the metrics, until the context ends
LogOpener = Callable[[LogMetrics], AbstractAsyncContextManager[IngestLog]]


def make_app(
    settings: Settings, open_log: LogOpener, spans: Spans | None = None, *, version: str = ""
) -> web.Application:
    """Build the application.

    Args:
        settings: of the process.
        open_log: called once, at start; may take as long as it needs.
        spans: makes spans of what is posted, if they are wanted.
        version: of the product, for the description.

    Raises ConfigurationError: the token file or the certificate cannot be used.
    """
    metrics = IngestMetrics()
    backlog = BacklogLimiter(settings.max_backlog, settings.retry_after, metrics)
    window = WindowLimiter(settings.max_window_events, settings.log.duplicate_window, metrics)
    refusals = Refusals(metrics.refused, metrics.duration, backlog.retry_after)
    tokens = TokenStore(settings.token_file)
    rates = RateLimiter(settings.rate, settings.rate_burst)
    new_rates = RateLimiter(settings.new_consultations_rate, settings.new_consultations_burst)

    access = AccessControl(
        refusals,
        metrics,
        tokens,
        rates,
        (backlog.check, window.check),
        hosts=settings.allowed_hosts,
        proxies=settings.trusted_proxies,
    )
    in_flight = InFlight()
    # one event of the largest size is always taken: a limit below it would refuse such events for ever
    size = max(settings.max_in_flight_bytes, settings.max_event_bytes)
    admission = Admission(events=settings.max_in_flight, size=size, batched=settings.max_batched_events)
    metrics.in_flight.set_function(lambda: in_flight.count)
    metrics.bytes_in_flight.set_function(lambda: admission.size)

    description = describe(settings, version)
    middlewares = [access.middleware(), checked_parameters(refusals, description)]
    if spans is not None:
        middlewares.insert(0, _serving_spans(spans))
    app = web.Application(client_max_size=settings.max_event_bytes, middlewares=middlewares)
    app[SETTINGS], app[METRICS], app[REFUSALS], app[ACCESS] = settings, metrics, refusals, access
    app[IN_FLIGHT], app[ADMISSION] = in_flight, admission
    app[READ_LIMIT], app[VERIFY_LIMIT] = ReadLimit(MAX_READS), ReadLimit(MAX_VERIFICATIONS)
    check: CachedCheck | None = None
    status: Status | None = None

    async def log(app: web.Application) -> AsyncIterator[None]:
        nonlocal check, status
        async with open_log(metrics.log) as opened:
            reader = opened.reader
            keys = IdempotencyKeys(
                reader,
                metrics,
                partitions=settings.log.partitions,
                window=settings.log.duplicate_window,
                wait=0.0 if opened.remembers_ids else settings.key_lookup_wait,
            )
            writer = opened.writer if spans is None else TracedWriter(opened.writer, spans)
            app[STATUS], app[DEAD_LETTERS], app[WRITER] = opened.status, opened.dead_letters, writer
            app[READER], app[FEED] = reader, opened.feed
            app[FOLLOWERS] = Followers(metrics, limit=settings.max_followers, interval=settings.follow_interval)
            app[APPENDER] = IdempotentAppender(writer, keys, backlog, metrics)
            app[NEW_CONSULTATIONS] = NewConsultations(new_rates, keys.holds)
            backlog.read_backlog = opened.status.backlog
            status = opened.status
            check = CachedCheck(opened.status.ready, seconds=READY_SECONDS, timeout=READY_TIMEOUT)
            try:
                yield
            finally:
                await keys.close()

    async def ready() -> list[str]:
        if in_flight.closing:
            return ["the service is stopping"]
        return ["the service is starting"] if check is None else await check()

    async def end_following(app: web.Application) -> None:
        await app[FOLLOWERS].close()

    async def update_limits() -> None:
        while True:
            backlog.update()
            stream = None if status is None else status.state.stream
            window.update(None if stream is None else stream.last_sequence)
            await asyncio.sleep(BACKLOG_SECONDS)

    app[READY] = ready
    app.cleanup_ctx.append(log)
    app.on_shutdown.append(end_following)
    app.cleanup_ctx.append(_in_background(update_limits, "limits of the log"))
    _load_tokens(app, tokens, rates, new_rates)
    if check_both(settings.tls_cert, settings.tls_key):
        _load_certificate(app, Certificate(settings.tls_cert, settings.tls_key))
    _add_routes(app, description)
    return app


# -- routes -----------------------------------------------------------------------------------------------------------


def _add_routes(app: web.Application, description: Json) -> None:
    access = app[ACCESS]
    for one in RESOURCES:
        post, expect = post_handler(one), expect_handler(one)
        each = "{consultation}" not in one.path
        access.add(app, "POST", one.path, post, Scope.WRITE, each=each, expect=expect)
    access.add(app, "GET", EVENTS.path, list_events, Scope.READ)
    access.add(app, "GET", EVENT_PATH, get_event, Scope.READ)
    access.add(app, "GET", FEED_PATH, follow_all, Scope.READ, each=True)
    access.add(app, "GET", CONSULTATIONS_PATH, list_consultations, Scope.READ, each=True)
    access.add(app, "GET", CONFLICTS_PATH, list_conflicts, Scope.READ)
    access.add(app, "GET", VERIFICATION_PATH, get_verification, Scope.READ)
    access.add(app, "GET", PIPELINE_PATH, get_pipeline, Scope.OPS)
    access.add(app, "GET", INDEX_PATH, _get_index, OPEN)
    access.add(app, "GET", PROBLEMS_PATH, _static(_problem_list(), JSON), OPEN)
    access.add(app, "GET", DEAD_LETTERS_PATH, list_dead_letters, Scope.OPS)
    access.add(app, "GET", DEAD_LETTER_PATH, get_dead_letter, Scope.OPS)
    access.add(app, "POST", DEAD_LETTER_PATH + "/requeue", requeue_dead_letter, Scope.OPS)
    access.add(app, "POST", DEAD_LETTER_PATH + "/drop", drop_dead_letter, Scope.OPS)
    access.add(app, "GET", TYPE_PREFIX + "{slug}", _get_problem, OPEN)
    access.add(app, "GET", OPENAPI_PATH, _static(orjson.dumps(description), JSON), OPEN)
    access.add(app, "GET", DOCS_PATH, _docs(description), OPEN)
    access.add(app, "GET", WHOAMI_PATH, describe_token, OPEN)
    version, masked = description["info"]["version"], app[SETTINGS].ui_masked
    index, file = handlers(version, masked=masked, token_required=access.required)
    access.add(app, "GET", UI_PATH, index, OPEN)
    access.add(app, "GET", UI_FILE_PATH, file, OPEN)
    methods: dict[str, set[str]] = {}
    for route in app.router.routes():
        if route.resource is not None:
            methods.setdefault(route.resource.canonical, {"OPTIONS"}).add(route.method)
    for path, names in methods.items():
        access.add(app, "OPTIONS", path, _options(", ".join(sorted(names))), OPEN)


async def _get_problem(request: web.Request) -> web.Response:
    problem = BY_SLUG.get(request.match_info["slug"])
    if problem is None:
        raise web.HTTPNotFound
    return web.Response(body=problem.render(), content_type=JSON, headers={"Server": SERVER})


def _problem_list() -> bytes:
    return orjson.dumps({"problems": [problem.document() for problem in BY_SLUG.values()]})


async def _get_index(request: web.Request) -> web.Response:
    """Answer with links; send a browser to the page for people."""
    headers = {"Server": SERVER, "Cache-Control": "no-cache", "Vary": "Accept"}
    try:
        wanted = negotiate(request, JSON, HTML)
    except RequestRefusedError:
        wanted = JSON  # better than nothing for a client that is looking around
    if wanted == HTML:
        note = f'<a href="{UI_PATH}">{UI_PATH}</a>'
        return web.Response(status=303, text=note, content_type=HTML, headers=headers | {"Location": UI_PATH})
    return web.Response(body=orjson.dumps({"name": "fiq", "links": LINKS}), content_type=JSON, headers=headers)


def _static(body: bytes, content_type: str) -> Handler:
    # it changes with the version, so caches must ask again
    headers = {"Content-Type": content_type, "Server": SERVER, "Cache-Control": "no-cache"}

    async def get(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, headers=headers)

    return get


def _docs(description: Json) -> Handler:
    page = lru_cache(maxsize=16)(partial(as_page, description))
    headers = {"Content-Type": PAGE_TYPE, "Server": SERVER, "Cache-Control": "no-cache", "Vary": "Host", **PAGE_HEADERS}

    async def get(request: web.Request) -> web.StreamResponse:
        return web.Response(body=page(own_url(request)), headers=headers)

    return get


def _options(methods: str) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=204, headers={"Allow": methods, "Server": SERVER})

    return answer


# -- spans ------------------------------------------------------------------------------------------------------------


def _serving_spans(spans: Spans) -> Middleware:
    """Return a middleware that makes a span of each POST; its trace becomes that of the request."""

    @web.middleware
    async def serve(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != hdrs.METH_POST:
            return await handler(request)
        resource = request.match_info.route.resource
        route = None if resource is None else resource.canonical
        with spans.serving(request.method, route, trace_of(request)) as span:
            request[REQUEST_TRACE] = span.trace
            try:
                response = await handler(request)
            except web.HTTPException as answer:  # the router's 404 and 405 are no failures
                response = answer
            span.answered(response.status)
        if isinstance(response, web.HTTPException):
            raise response
        return response

    return serve


class TracedWriter(EventWriter):
    """Makes a span of each append; its trace becomes that of the events."""

    def __init__(self, writer: EventWriter, spans: Spans) -> None:
        self._writer = writer
        self._spans = spans

    async def append(self, event: Event) -> Appended:
        """Append *event*; see :meth:`services.log.protocol.EventWriter.append`."""
        with self._spans.publishing(EVENT_LOG, event.trace) as trace:
            return await self._writer.append(dataclasses.replace(event, trace=trace))

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        """Append *events*; see :meth:`services.log.protocol.EventWriter.append_batch`."""
        with self._spans.publishing(EVENT_LOG, events[0].trace, events=len(events)) as trace:
            return await self._writer.append_batch([dataclasses.replace(event, trace=trace) for event in events])


# -- files that are read again when they change -----------------------------------------------------------------------

#: tells two versions of a file apart; None if it cannot be seen
_Signature = tuple[int, int, int, int] | None


class ReloadedFiles:
    """Files that belong together, read again when they change.

    If their new content is invalid, the former content stays in force. That is logged once for each reason and tried
    again at each look, because a file may be looked at while it is being written.

    Args:
        what: their name in log lines.
        paths: of the files.
        load: reads them; raises ConfigurationError, and then changes nothing.
        on_state: called with whether the last load succeeded.
    """

    def __init__(
        self, what: str, paths: Sequence[str], load: Callable[[], None], on_state: Callable[[bool], None]
    ) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._load = load
        self._on_state = on_state
        self._seen: tuple[_Signature, ...] | None = None
        self._throttle = LogThrottle.of_repeated()
        self._log = get_logger("ingest.files")

    def start(self) -> None:
        """Read them for the first time. Raises ConfigurationError: they are invalid."""
        seen = self._signatures()
        self._load()
        self._seen = seen
        self._on_state(True)

    def look(self) -> None:
        """Read them again if they have changed."""
        seen = self._signatures()
        if seen == self._seen:
            return
        try:
            self._load()
        except ConfigurationError as error:
            self._refused("; ".join(error.problems))
            return
        except Exception as error:  # noqa: BLE001 - whatever a file holds, it must not end the watch
            self._refused(f"it cannot be read: {type(error).__name__}")
            return
        self._seen = seen
        self._throttle.reset()
        self._on_state(True)
        self._log.info("FILE_READ_AGAIN", what=self._what)

    def _refused(self, reason: str) -> None:
        self._seen = None
        self._on_state(False)
        allowed = self._throttle.allow(reason)
        if allowed is not None:
            action = "the former content stays in force"
            self._log.error("FILE_REFUSED", what=self._what, reason=reason, action=action, **allowed)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            self.look()

    def _signatures(self) -> tuple[_Signature, ...]:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: str) -> _Signature:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_dev, found.st_size


def _load_tokens(app: web.Application, tokens: TokenStore, *limiters: RateLimiter) -> None:
    if not tokens.required:
        return
    broken = app[METRICS].token_file_broken

    def load() -> None:
        tokens.load()
        mode = Path(tokens.path).stat().st_mode & 0o777
        if mode & 0o077:
            action = f"chmod 600 {tokens.path}"
            get_logger("ingest").warning("SECRET_READABLE", file=tokens.path, mode=f"{mode:04o}", action=action)
        for rates in limiters:
            rates.keep_only(tokens.names)

    files = ReloadedFiles(VARIABLE, [tokens.path], load, lambda good: broken.set(not good))
    files.start()
    app.cleanup_ctx.append(_in_background(files.run, "token file"))


def _load_certificate(app: web.Application, certificate: Certificate) -> None:
    settings, metrics = app[SETTINGS], app[METRICS]

    def load() -> None:
        certificate.load()
        metrics.certificate_expiry.clear()
        metrics.certificate_expiry.labels(certificate.info.name).set(certificate.info.expires)

    paths = [settings.tls_cert, settings.tls_key]
    what = f"{CERTIFICATE_VARIABLE}, {KEY_VARIABLE}"
    files = ReloadedFiles(what, paths, load, lambda good: metrics.certificate_broken.set(not good))
    files.start()
    app[TLS] = certificate.context
    app.cleanup_ctx.append(_in_background(files.run, "certificate"))


def _in_background(
    run: Callable[[], Coroutine[Any, Any, None]], name: str
) -> Callable[[web.Application], AsyncIterator[None]]:
    """Return a cleanup context of aiohttp that runs *run* for as long as the application runs."""

    async def context(_: web.Application) -> AsyncIterator[None]:
        async with background_task(run(), name):
            yield

    return context
