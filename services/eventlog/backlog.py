"""How much of the log waits to be committed, as a look at it found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backlog:
    """The backlog at one moment.

    Attributes:
        at: when it was looked at, on :func:`time.monotonic`.
        sequence: of the stream's youngest event then.
        events: that were not acknowledged as committed, of the store that had most of them.
    """

    at: float
    sequence: int
    events: int
