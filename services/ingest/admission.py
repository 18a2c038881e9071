"""How much one process takes at a time: a number of events that are stored, and a size of all that it holds.

A body counts from the moment at which its bytes are here, and not when its headers promise them: who only promises
holds nothing, so it cannot keep others out. Who sends some and then no more does hold memory; when there is none left
for others, the bodies that have been on their way for longest are given up. What is complete is never given up: it
waits for the log, for a bounded time.
"""

from __future__ import annotations

import asyncio
import time

from services.eventlog.errors import TooManyInFlightError

#: a body that is on its way for longer is given up when its memory is needed for others, seconds
PATIENCE_SECONDS = 1.0


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

        Raises:
            TooManyInFlightError: as many events are being stored as may be.
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

        Raises:
            TooManyInFlightError: it has been given up.
        """
        self._check()
        self._admission._incomplete.pop(self, None)
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        return body

    def store(self) -> None:
        """Count the event as one that is being stored.

        Raises:
            TooManyInFlightError: as many are being stored as may be.
        """
        self._admission._check_events()
        self._admission.storing += 1
        self._storing = True

    def store_batch(self, count: int) -> None:
        """Count *count* events as a batch that is being stored.

        Raises:
            TooManyInFlightError: as many are being stored as may be.
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
