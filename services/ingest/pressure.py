"""How full the log is, and when it makes sense to come back.

A look each second tells for each partition how many events waited, and up to which sequence that counts. What was
stored since is known from the sequences in the broker's answers, by whichever process it was posted, and a partition is
taken to get an equal part of it. Nothing is taken for committed before a look shows it. So a request costs a comparison
and never a question to the broker, and when persisters stop, the limit holds.

The limit is for all partitions together. A partition that stands still (no process runs it, or its file has not moved
for 10 s) must not stop the clients of the others: while others move, those that stand still share half of the limit,
each refuses its own clients beyond its part, and counts for no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from fiq.event import Event
from services.ingest import problems
from services.ingest.metrics import Metrics
from services.ingest.problems import Problem, RequestRefusedError
from services.log.partitions import partition_name, partition_of
from services.log.status import Backlog

#: bounds of what clients are told to wait, seconds
SHORTEST, LONGEST = 1.0, 60.0
#: part of the limit that partitions which stand still share while others move
STILL_SHARE = 0.5
#: persisters commit in rounds, and say how far they are once a second: a rate over less time would be noise, seconds
_SPAN_SECONDS = 4.5
#: weight of the newest measurement of the rate against those before
_NEWEST = 0.5


class Pressure:
    """Watches the backlog of the log against a limit.

    Args:
        limit: events that may wait to be committed; 0 for no limit of our own.
        retry_after: what clients are told while no rate is known, seconds.
        metrics: where it is shown.

    Attributes:
        observed: returns the latest look; None while nothing is known of the backlog, and then nothing is refused.
    """

    def __init__(self, limit: int, retry_after: float, metrics: Metrics) -> None:
        self.observed: Callable[[], Backlog | None] = lambda: None
        self._limit = limit
        self._retry_after = retry_after
        self._last: tuple[Backlog, float] | None = None
        self._rate: float | None = None
        self._newest = 0
        self._partitions = 1
        #: all that waits is this and one for each sequence up to the newest
        self._base: float | None = None
        #: the sequence from which on nothing more is taken
        self._until = math.inf
        #: the same for each partition that stands still, and the smallest of them
        self._own: dict[int, float] = {}
        self._first = math.inf
        metrics.backlog.set_function(lambda: self._events())
        metrics.drain_rate.set_function(lambda: self._rate or 0.0)

    def note(self, sequence: int) -> None:
        """Learn that the stream has come to *sequence*, from an answer of the broker."""
        if sequence > self._newest:
            self._newest = sequence

    def look(self) -> None:
        """Take in what is known now; to be called each second."""
        seen = self.observed()
        self._own, self._first, self._until = {}, math.inf, math.inf
        if seen is None or not seen.partitions:
            self._last, self._rate, self._base = None, None, None
            return
        self._partitions = count = len(seen.partitions)
        base = sum(one.events - one.sequence / count for one in seen.partitions)
        self._measure(seen, base)
        self.note(seen.sequence)
        self._base = base
        if self._limit:
            self._set_limits(seen)

    def check(self) -> None:
        """Let a request through that wants to store something.

        Raises RequestRefusedError: too many events wait already.
        """
        if self._newest >= self._until:
            raise RequestRefusedError(problems.BACKLOG_FULL)

    def admit(self, events: Iterable[Event]) -> None:
        """Let *events* through to their partitions.

        Raises RequestRefusedError: one of these stands still, and too many events wait in it.
        """
        if self._newest < self._first:
            return
        for event in events:
            partition = partition_of(event.consultation, self._partitions)
            if self._newest >= self._own.get(partition, math.inf):
                raise RequestRefusedError(
                    problems.BACKLOG_FULL,
                    f"Partition {partition_name(partition)}, which this consultation belongs to, is not being written "
                    "to HDF5, and too many of its events wait. Other consultations are not affected.",
                    headers={"Retry-After": str(math.ceil(LONGEST))},
                )

    def retry_after(self, problem: Problem) -> float:
        """Return what ``Retry-After`` should say to *problem*, seconds: when there will be room, as far as is known."""
        if problem is problems.BACKLOG_FULL:
            return self._time_for(self._newest - self._until + 1)
        if problem is problems.LOG_FULL and self._last is not None:
            return self._time_for(self._events())
        return self._retry_after

    def _events(self) -> float:
        return 0.0 if self._base is None else max(0.0, self._base + self._newest)

    def _time_for(self, events: float) -> float:
        """Return how long it takes to drain *events*, within the bounds."""
        if self._rate is None:
            return self._retry_after
        return LONGEST if self._rate <= 0 else min(LONGEST, max(SHORTEST, events / self._rate))

    def _set_limits(self, seen: Backlog) -> None:
        count = len(seen.partitions)
        still = [p for p, one in enumerate(seen.partitions) if one.still]
        if len(still) == count:  # there are no others: nothing is drained, and one limit holds for all
            still = []
        own = STILL_SHARE * self._limit / max(1, len(still))
        room = float(self._limit)
        for partition, one in enumerate(seen.partitions):
            if partition in still:
                self._own[partition] = one.sequence + (own - one.events) * count
                room -= min(own, one.events + max(0, self._newest - one.sequence) / count)
            else:
                room -= one.events - one.sequence / count
        self._first = min(self._own.values(), default=math.inf)
        self._until = room * count / (count - len(still))

    def _measure(self, seen: Backlog, base: float) -> None:
        """Learn from two looks that are far enough apart how many events were committed between them."""
        if self._last is None or seen.sequence < self._last[0].sequence:  # another stream
            if self._last is not None:
                self._rate, self._newest = None, seen.sequence
            self._last = seen, base
            return
        before, was = self._last
        if seen.at - before.at < _SPAN_SECONDS:
            return
        self._last = seen, base
        rate = max(0.0, (was - base) / (seen.at - before.at))
        self._rate = rate if self._rate is None else _NEWEST * rate + (1 - _NEWEST) * self._rate
