"""How many events wait to be committed, in each partition, as the log was last seen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits in one partition.

    Attributes:
        events: that were stored up to *sequence* and are not committed.
        sequence: of the stream's youngest event that *events* counts.
        still: nothing of it is being committed: no process runs it, or its file has not moved for a while.
    """

    events: int
    sequence: int
    still: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in the store that has most of it.

    Attributes:
        at: when it was looked at, on :func:`time.monotonic`.
        sequence: of the stream's youngest event then.
        partitions: by number.
    """

    at: float
    sequence: int
    partitions: tuple[Waiting, ...]

    @property
    def events(self) -> int:
        """Of all partitions together."""
        return sum(one.events for one in self.partitions)
