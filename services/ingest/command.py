"""The command line of the HTTP edge, and its process from the settings to the exit code."""

from __future__ import annotations

import dataclasses
import os

import uvloop

from fiq.errors import FiqError
from services.core import logs
from services.core.command import load_or_exit, memory_limit, parser, product_version, report_error
from services.core.lifecycle import Stop, stop_on_signals
from services.ingest import connections
from services.ingest.settings import Settings

#: a process without requests: the interpreter and its libraries, bytes
BASE_BYTES = 96 * 2**20
#: a body is in memory as it was read, as the event, and in the buffer of the connection to the log
COPIES = 3
PROGRAM = "fiq-ingest"


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal comes, and return the exit code."""
    parser(PROGRAM, "Takes events over HTTP and appends them to the log.", Settings).parse_args(arguments)
    settings = load_or_exit(PROGRAM, Settings, os.environ)
    logs.configure("ingest", level=settings.log_level)
    log = logs.get_logger("ingest")
    bounded = within(settings, memory_limit())
    if bounded != settings:
        log.warning("MEMORY_BOUNDED", max_in_flight_bytes=bounded.max_in_flight_bytes)
    if (connectable := connections.within(bounded)) != bounded:
        bounded = connectable
        log.warning("CONNECTIONS_BOUNDED", max_connections=bounded.max_connections, reason="ulimit -n")
    try:
        return uvloop.run(_run(bounded))
    except FiqError as error:
        return report_error(PROGRAM, error)


async def _run(settings: Settings) -> int:
    stop = Stop()
    stop_on_signals(stop)
    # only now: these imports take a while, and from here on a signal ends the process in an orderly way
    from services.core.tracing import open_spans
    from services.ingest.service import serve

    with open_spans(PROGRAM, os.environ) as spans:
        await serve(settings, stop, version=product_version(), spans=spans)
    return stop.exit_code


def within(settings: Settings, limit: int | None) -> Settings:
    """Return *settings* with bodies in flight that fit into *limit* bytes; None is no limit.

    One body of the largest size is always taken, whatever the limit.
    """
    if limit is None:
        return settings
    room = max(settings.max_event_bytes, (limit - BASE_BYTES) // COPIES)
    return dataclasses.replace(settings, max_in_flight_bytes=min(settings.max_in_flight_bytes, room))
