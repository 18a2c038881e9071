"""One ingest process, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib

from services.contract.lifecycle import Stop, settle
from services.contract.logs import get_logger
from services.contract.management import bind, managed
from services.ingest.app import READY, make_app
from services.ingest.handlers import METRICS
from services.ingest.log import open_log
from services.ingest.server import HttpServer
from services.ingest.settings import Settings

_MANAGEMENT = "FI_MANAGEMENT_HOST, FI_MANAGEMENT_PORT"


async def serve(settings: Settings, stop: Stop, *, version: str) -> None:
    """Serve until *stop* is requested.

    Raises:
        FiqError: the service could not start; its message says why.
    """
    log = get_logger("ingest")
    # before the cluster is waited for: a taken port is known at once
    sock = bind(settings.host, settings.port, "FI_HOST, FI_PORT")
    management = bind(settings.management_host, settings.management_port, _MANAGEMENT)

    def lost(reason: str) -> None:
        stop.request(reason, failed=True)

    app = make_app(settings, lambda: open_log(settings, lost))
    server = HttpServer(app, sock, grace=settings.shutdown_grace)
    # first and last: probes learn why nothing is served yet, and what is still in flight
    async with managed(management, app[METRICS].registry, app[READY], _MANAGEMENT):
        try:
            if await _started(server, stop):
                settle()
                host, port = sock.getsockname()[:2]
                management_port = management.getsockname()[1]
                log.info("INGEST_STARTED", host=host, port=port, management_port=management_port, version=version)
                await stop.wait()
            log.info("INGEST_STOPPING", reason=stop.reason)
        finally:
            await server.stop()
    log.info("INGEST_STOPPED", reason=stop.reason)


async def _started(server: HttpServer, stop: Stop) -> bool:
    """Start *server*, and give that up when a stop is requested first."""
    start = asyncio.create_task(server.start())
    asked = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({start, asked}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            await start
            return not stop.requested
        start.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await start
        return False
    finally:
        asked.cancel()
