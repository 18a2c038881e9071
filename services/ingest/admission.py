"""How much one process takes at a time: a number of events that are stored, and a size of all that it holds.

A body counts from the moment at which its bytes are here, and not when its headers promise them: who only promises
holds nothing, so it cannot keep others out. Who sends some and then no more does hold memory; when there is none left
for others, the bodies that have been on their way for longest are given up. What is complete is never given up: it
waits for the log, for a bounded time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from services.log.errors import TooManyInFlightError

#: log lines of one kind a second in the long run, and at once
_LINE_RATE, _LINE_BURST = 5.0, 50
#: a body that is on its way for longer is given up when its memory is needed for others, seconds
PATIENCE_SECONDS = 1.0


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


class Admission:
    """What one process holds just now.

    Attributes:
        size: bytes of bodies that are being read or stored.
        storing: events that are being stored, each by a request of its own.
        batched: events of batches that are being stored.
    """

    def __init__(self, *, events: int, size: int, batched: int = 0) -> None:
        """Start with nothing.

        Args:
            events: most that are stored at a time, each by a request of its own.
            size: most bytes of bodies, at least one body's.
            batched: most events of batches that are stored at a time; one batch is always taken.
        """
        self.size = 0
        self.storing = 0
        self.batched = 0
        self._events = events
        self._batched = batched
        self._limit = size
        #: incomplete bodies and when their first bytes came, oldest first
        self._incomplete: dict[Share, float] = {}

    def share(self) -> Share:
        """Return the share of a request that comes in, which holds nothing yet.

        Raises TooManyInFlightError: as many events are being stored as may be.
        """
        self._check_events()
        return Share(self)

    def batch_share(self) -> Share:
        """Return the share of a request that brings a batch, as :meth:`share` does."""
        self._check_batched(1)
        return Share(self)

    def _check_events(self) -> None:
        if self.storing >= self._events:
            raise TooManyInFlightError("too many events are being stored")

    def _check_batched(self, count: int) -> None:
        if self.batched and self.batched + count > self._batched:
            raise TooManyInFlightError("too many events of batches are being stored")

    def _reserve(self, size: int, asking: Share) -> None:
        if self.size + size > self._limit:
            self._give_up_slow(self.size + size - self._limit, asking)
        if self.size + size > self._limit:
            raise TooManyInFlightError("the bodies that are being read or stored take too much memory")
        self.size += size

    def _give_up_slow(self, wanted: int, asking: Share) -> None:
        before = time.monotonic() - PATIENCE_SECONDS
        slow: list[Share] = []
        for share, since in self._incomplete.items():
            if wanted <= 0 or since > before:
                break
            if share is not asking:
                slow.append(share)
                wanted -= share.size
        for share in slow:
            share.give_up()


class Share:
    """What one request takes of an :class:`Admission`; to be released at its end.

    Attributes:
        size: bytes of the body that are here.
        given_up: the body was slow and its memory was needed.
    """

    def __init__(self, admission: Admission) -> None:
        self.size = 0
        self.given_up = False
        self._admission = admission
        self._chunks: list[bytes] = []
        self._storing = False
        self._batched = 0
        self._timeout: asyncio.Timeout | None = None

    def read_within(self, timeout: asyncio.Timeout) -> None:
        """Let the reading of the body, which *timeout* bounds, be ended early when it is given up."""
        self._timeout = timeout

    def take(self, chunk: bytes) -> None:
        """Take a part of the body. Raises TooManyInFlightError: there is no memory for it."""
        self._check()
        self._admission._reserve(len(chunk), self)
        self.size += len(chunk)
        self._chunks.append(chunk)
        if self._timeout is not None:
            self._admission._incomplete.setdefault(self, time.monotonic())

    def complete(self) -> bytes:
        """Return the body, all of whose parts were taken; it is not given up any more.

        Raises TooManyInFlightError: it has been given up.
        """
        self._check()
        self._admission._incomplete.pop(self, None)
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        return body

    def store(self) -> None:
        """Count the event as one that is being stored.

        Raises TooManyInFlightError: as many are being stored as may be.
        """
        self._admission._check_events()
        self._admission.storing += 1
        self._storing = True

    def store_batch(self, count: int) -> None:
        """Count *count* events as a batch that is being stored.

        Raises TooManyInFlightError: as many are being stored as may be.
        """
        self._admission._check_batched(count)
        self._admission.batched += count
        self._batched = count

    def give_up(self) -> None:
        """End the reading of the body and let go of what came of it."""
        self.given_up = True
        self._let_go()
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def release(self) -> None:
        """Let go of everything."""
        self._let_go()
        if self._storing:
            self._storing = False
            self._admission.storing -= 1
        self._admission.batched -= self._batched
        self._batched = 0

    def _let_go(self) -> None:
        self._admission._incomplete.pop(self, None)
        self._admission.size -= self.size
        self.size = 0
        self._chunks.clear()

    def _check(self) -> None:
        if self.given_up:
            raise TooManyInFlightError("the body was slow, and its memory was needed for others")
