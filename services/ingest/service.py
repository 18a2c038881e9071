"""One ingest process, from its start to its end."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import services.log
from fiq.errors import ConfigurationError
from services.core.lifecycle import Stop, freeze_garbage, run_until_stopped
from services.core.logs import get_logger
from services.core.management import bind, serve_management
from services.core.tracing import Spans
from services.ingest.app import READY, OpenLog, make_app
from services.ingest.handlers import METRICS
from services.ingest.server import TLS, HttpServer
from services.ingest.settings import Settings
from services.log.metrics import LogMetrics
from services.log.protocol import IngestRole

#: shown in the servers' monitoring
CONNECTION_NAME = "fi-ingest"
_MANAGEMENT = "FI_MANAGEMENT_HOST, FI_MANAGEMENT_PORT"


async def serve(settings: Settings, stop: Stop, *, version: str, spans: Spans | None = None) -> None:
    """Serve until *stop* is requested.

    Args:
        settings: of the process.
        stop: ends it.
        version: of the product.
        spans: makes spans of what is posted, if anybody wants them.

    Raises FiqError: the service could not start; its message says why.
    """
    # before the cluster is waited for: a taken port is known at once
    with (
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

    log = get_logger("ingest")
    app = make_app(settings, lambda shown: open_log(settings, lost, shown), spans, version=version)
    server = HttpServer(app, sock, grace=settings.shutdown_grace)

    async def run() -> None:  # in one task, which is cancelled when something that goes on beside it fails
        await server.start()
        freeze_garbage()
        host, port = sock.getsockname()[:2]
        where = {"host": host, "port": port, "management_port": management.getsockname()[1], "tls": TLS in app}
        log.info("INGEST_STARTED", **where, version=version)
        await asyncio.Event().wait()

    # first and last: probes learn why nothing is served yet, and what is still in flight
    async with serve_management(management, app[METRICS].registry, app[READY], _MANAGEMENT):
        try:
            await run_until_stopped(run(), stop)
            log.info("INGEST_STOPPING", reason=stop.reason)
        finally:
            await server.stop()
    log.info("INGEST_STOPPED", reason=stop.reason)


def _check_access(settings: Settings, host: str) -> None:
    """Let nobody be served without a token who was not meant to be.

    Args:
        settings: of the process.
        host: the address that it listens on.

    Raises ConfigurationError: everybody who reaches *host* could post and read, and nobody said that this is wanted.
    """
    if settings.token_file:
        return
    if not ipaddress.ip_address(host).is_loopback and not settings.allow_anonymous:
        problem = (
            f"FI_TOKEN_FILE is not set, and other machines may reach {host} (FI_HOST): make a file of tokens with "
            "`fiq init` or `fiq token new`, and name it; or set FI_ALLOW_ANONYMOUS=1 where everybody may post and read"
        )
        raise ConfigurationError([problem])
    get_logger("ingest").warning(
        "ACCESS_ANONYMOUS", host=host, reason="FI_TOKEN_FILE is not set: no token is asked for"
    )


@asynccontextmanager
async def open_log(settings: Settings, on_closed: Callable[[str], None], metrics: LogMetrics) -> AsyncIterator[OpenLog]:
    """Open the log that the settings name until the context ends.

    Args:
        settings: of the process.
        on_closed: called with the reason when the log is lost for good.
        metrics: where the log is shown while it is open.

    Raises Exception: as :func:`services.log.open_log`.
    """
    role = IngestRole(
        name=CONNECTION_NAME,
        max_event_bytes=settings.max_event_bytes,
        deadline=settings.publish_deadline,
        max_in_flight=settings.max_in_flight,
    )
    async with services.log.open_log(settings.log, role, metrics=metrics, on_closed=on_closed) as opened:
        yield OpenLog(opened.writer, opened.status.ready, opened.reader, opened.status.backlog)
