"""One ingest process: from the command line and the settings to the exit code.

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
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import uvloop

import services.log
from fiq.errors import ConfigurationError, FiqError
from services.core import logs
from services.core.command import load_or_exit, memory_limit, parser, product_version, report_error, warn_of_unknown
from services.core.lifecycle import Stop, freeze_garbage, run_until_stopped, stop_on_signals
from services.core.management import bind, serve_management
from services.core.tracing import Spans, open_spans
from services.core.watchdog import Watchdog
from services.ingest.app import READY, make_app
from services.ingest.metrics import METRICS
from services.ingest.server import MAX_REJECTED, TLS, HttpServer
from services.ingest.settings import Settings
from services.log.metrics import LogMetrics
from services.log.protocol import IngestLog, IngestRole

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
