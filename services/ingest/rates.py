"""How much one client may ask for, and how much is logged of it: buckets of allowances that fill at a steady rate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

#: log lines of one kind a second in the long run, and at once
_LINE_RATE, _LINE_BURST = 5.0, 50


class Bucket:
    """Holds up to *burst* allowances, and gets *rate* more each second.

    Args:
        rate: allowances a second, above 0.
        burst: most that it holds.
        clock: seconds, never going back.
    """

    __slots__ = ("_at", "_burst", "_clock", "_level", "_rate")

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._level = float(burst)
        self._at = clock()

    def take(self) -> float:
        """Take one allowance; return 0, or take none and return the seconds until there will be one."""
        self._fill()
        if self._level < 1:
            return (1 - self._level) / self._rate
        self._level -= 1
        return 0.0

    def take_more(self, count: int) -> float:
        """Take *count* for a request that was let in as one already; return 0, or the seconds until the debt is paid.

        Only a bucket that owes already gives nothing: asked for a full one, a batch of *burst* would never get in. More
        than it holds it owes, so that the rate holds.
        """
        self._fill()
        if self._level < 0:
            return (1 - self._level) / self._rate  # the next request takes one before it comes here
        self._level -= count
        return 0.0

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now


class Rates:
    """A bucket for each client.

    Args:
        rate: of each, a second; 0 for no limit.
        burst: of each.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[str, Bucket] = {}

    def take(self, name: str) -> float:
        """Take one from the bucket of the client called *name*, as :meth:`Bucket.take` does."""
        return self._bucket(name).take() if self._rate else 0.0

    def take_more(self, name: str, count: int) -> float:
        """Take *count* more for a request of the client called *name*, as :meth:`Bucket.take_more` does."""
        return self._bucket(name).take_more(count) if self._rate else 0.0

    def keep(self, names: set[str]) -> None:
        """Forget every client that is not one of *names*."""
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if name in names}

    def _bucket(self, name: str) -> Bucket:
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = Bucket(self._rate, self._burst)
        return bucket


class Lines:
    """Decides which log lines are written: who is refused decides how often, and must not fill a disk.

    The others are counted, and told with the next one of their kind.
    """

    def __init__(self) -> None:
        self._rates = Rates(_LINE_RATE, _LINE_BURST)
        self._left_out: Counter[str] = Counter()

    def told(self, kind: str) -> dict[str, int] | None:
        """Return what a line of *kind* should say besides, ``left_out`` if any were; None when it is left out itself.

        Args:
            kind: one of a few; each is remembered for ever.
        """
        if self._rates.take(kind):
            self._left_out[kind] += 1
            return None
        left_out = self._left_out.pop(kind, 0)
        return {"left_out": left_out} if left_out else {}
