"""The command line of the HTTP edge, and its process from the settings to the exit code."""

from __future__ import annotations

import os

import uvloop

from services.contract import logs
from services.contract.command import complain, load_or_exit, parser, product_version
from services.contract.errors import FiqError
from services.contract.lifecycle import Stop, stop_on_signals
from services.contract.memory import memory_limit
from services.ingest import connections, memory
from services.ingest.settings import Settings

PROGRAM = "fiq-ingest"


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes, and return the exit code."""
    parser(PROGRAM, "Takes events over HTTP and appends them to the log.", Settings).parse_args(arguments)
    settings = load_or_exit(PROGRAM, Settings, os.environ)
    logs.configure("ingest", level=settings.log_level)
    log = logs.get_logger("ingest")
    bounded = memory.within(settings, memory_limit())
    if bounded != settings:
        log.warning("MEMORY_BOUNDED", max_in_flight_bytes=bounded.max_in_flight_bytes)
    if (connectable := connections.within(bounded)) != bounded:
        bounded = connectable
        log.warning("CONNECTIONS_BOUNDED", max_connections=bounded.max_connections, reason="ulimit -n")
    try:
        return uvloop.run(_run(bounded))
    except FiqError as error:
        return complain(PROGRAM, error)


async def _run(settings: Settings) -> int:
    stop = Stop()
    stop_on_signals(stop)
    # only now: these imports take a while, and from here on a signal ends the process in an orderly way
    from services.contract.telemetry import spans_of
    from services.ingest.service import serve

    with spans_of(PROGRAM, os.environ) as spans:
        await serve(settings, stop, version=product_version(), spans=spans)
    return stop.exit_code
