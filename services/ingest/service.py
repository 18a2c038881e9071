"""One ingest process, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib

from services.contract.lifecycle import Stop, settle
from services.contract.logs import get_logger
from services.contract.management import bind
from services.ingest.app import make_app
from services.ingest.log import open_log
from services.ingest.server import HttpServer
from services.ingest.settings import Settings


async def serve(settings: Settings, stop: Stop, *, version: str) -> None:
    """Serve until *stop* is requested.

    Raises:
        FiqError: the service could not start; its message says why.
    """
    log = get_logger("ingest")
    # before the cluster is waited for: a taken port is known at once
    sock = bind(settings.host, settings.port, "FI_HOST, FI_PORT")

    def lost(reason: str) -> None:
        stop.request(reason, failed=True)

    server = HttpServer(make_app(settings, lambda: open_log(settings, lost)), sock, grace=settings.shutdown_grace)
    try:
        if await _started(server, stop):
            settle()
            host, port = sock.getsockname()[:2]
            log.info("INGEST_STARTED", host=host, port=port, version=version)
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
