"""How full the log is, and when it makes sense to come back.

A count each second tells how many events waited and which one was the youngest. What was stored since is known from the
sequences in the broker's answers, by whichever process it was posted; what was committed since, from the rate between
counts some seconds apart. So a request costs a comparison and never a question to the broker, and what is let in beyond
the limit is at most what persisters who have just stopped would have committed since the last count: some two seconds'
worth, and when no count succeeds that of :data:`TRUSTED_SECONDS`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from services.eventlog.backlog import Backlog
from services.ingest import problems
from services.ingest.metrics import Metrics
from services.ingest.problems import Problem, RequestRefusedError

#: bounds of what clients are told to wait, seconds
SHORTEST, LONGEST = 1.0, 60.0
#: for so long what was committed is taken for granted while no count succeeds, seconds
TRUSTED_SECONDS = 6.0
#: persisters commit in batches: a rate over less time would be that of one batch, or none, seconds
_SPAN_SECONDS = 4.5
#: weight of the newest measurement of the rate against those before
_NEWEST = 0.5


class Pressure:
    """Watches the backlog of the log against a limit.

    Args:
        limit: events that may wait to be committed; 0 for no limit of our own.
        retry_after: what clients are told while no rate is known, seconds.
        observed: the latest look; None while nothing is known of the backlog, and then nothing is refused for it.
        metrics: where it is shown.
        clock: seconds, as of the looks.
    """

    def __init__(
        self,
        limit: int,
        retry_after: float,
        observed: Callable[[], Backlog | None],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._retry_after = retry_after
        self._observed = observed
        self._clock = clock
        self._last: Backlog | None = None
        self._rate: float | None = None
        self._newest = 0
        self._events = 0.0
        #: the sequence from which on nothing more is taken
        self._until = math.inf
        metrics.backlog.set_function(lambda: self._events)
        metrics.drain_rate.set_function(lambda: self._rate or 0.0)

    def note(self, sequence: int) -> None:
        """Learn that the stream has come to *sequence*, from an answer of the broker."""
        if sequence > self._newest:
            self._newest = sequence

    def look(self) -> None:
        """Take in what is known now; to be called each second."""
        seen = self._observed()
        if seen is None:
            self._last, self._rate, self._events, self._until = None, None, 0.0, math.inf
            return
        self._measure(seen)
        self.note(seen.sequence)
        drained = (self._rate or 0.0) * min(TRUSTED_SECONDS, max(0.0, self._clock() - seen.at))
        self._events = max(0.0, seen.events + self._newest - seen.sequence - drained)
        if self._limit:
            self._until = seen.sequence + self._limit - seen.events + drained

    def check(self) -> None:
        """Let a request through that wants to store something.

        Raises:
            RequestRefusedError: too much waits already.
        """
        if self._newest >= self._until:
            raise RequestRefusedError(problems.BACKLOG_FULL)

    def retry_after(self, problem: Problem) -> float:
        """Return what ``Retry-After`` should say to *problem*, seconds: when there will be room, as far as is known."""
        if problem is problems.BACKLOG_FULL:
            return self._time_for(self._newest - self._until + 1)
        if problem is problems.LOG_FULL and self._last is not None:
            return self._time_for(self._events)
        return self._retry_after

    def _time_for(self, events: float) -> float:
        """Return how long it takes to drain *events*, within the bounds."""
        if self._rate is None:
            return self._retry_after
        return LONGEST if self._rate <= 0 else min(LONGEST, max(SHORTEST, events / self._rate))

    def _measure(self, seen: Backlog) -> None:
        """Learn from two counts that are far enough apart how many events were committed between them."""
        before = self._last
        if before is None or seen.sequence < before.sequence:  # another stream
            self._last = seen
            if before is not None:
                self._rate, self._newest = None, seen.sequence
            return
        if seen.at - before.at < _SPAN_SECONDS:
            return
        self._last = seen
        drained = (seen.sequence - before.sequence) - (seen.events - before.events)
        rate = max(0.0, drained / (seen.at - before.at))
        self._rate = rate if self._rate is None else _NEWEST * rate + (1 - _NEWEST) * self._rate
