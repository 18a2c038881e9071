"""Bounds that follow the memory of the container: fewer bodies at a time where the limit is small."""

from __future__ import annotations

import dataclasses

from services.ingest.settings import Settings

#: a process without requests: the interpreter and its libraries, bytes
BASE_BYTES = 96 * 2**20
#: a body is in memory as it was read, as the event, and in the buffer of the connection to the log
COPIES = 3


def within(settings: Settings, limit: int | None) -> Settings:
    """Return *settings* with bodies in flight that fit into *limit* bytes; None is no limit.

    One body of the largest size is always taken, whatever the limit.
    """
    if limit is None:
        return settings
    room = max(settings.max_event_bytes, (limit - BASE_BYTES) // COPIES)
    return dataclasses.replace(settings, max_in_flight_bytes=min(settings.max_in_flight_bytes, room))
