"""What one process accepts: the rate of each token, the requests and bytes in flight, and the backlog of the log.

Five limits come one after the other. Each refuses before anything is stored:

1. **Rate** (:class:`RateLimiter`): requests and events a second of one token, a token bucket each. 429.
2. **In flight** (:class:`Admission`): events that are being stored, and the memory of all bodies and long headers.
   429. A body counts when its bytes arrive, not when its headers promise them, so a client that only promises keeps no
   one out. A client that stops in the middle of headers or a body does hold memory: when it is needed, those that
   began first are given up. A complete body is never given up; it waits for the log, for a bounded time.
3. **New consultations** (:class:`NewConsultations`): how many one token begins. 429.
4. **Backlog** (:class:`BacklogLimiter`): events that wait to be committed to HDF5. 503, with the time that draining
   takes.
5. **Duplicate window** (:class:`WindowLimiter`): events that the log has stored within its window, by any process. The
   nodes keep their ids in memory. 503, with the time until enough ids are forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from aiohttp import web

from fiq.event import Event
from services.ingest import problems
from services.ingest.metrics import IngestMetrics
from services.ingest.problems import ProblemType, RequestRefusedError
from services.log.errors import TooManyInFlightError
from services.log.partitions import partition_name, partition_of
from services.log.status import Backlog

# -- rate -------------------------------------------------------------------------------------------------------------


class TokenBucket:
    """Holds up to *burst* permits, and gets *rate* more each second.

    Args:
        rate: permits a second, above 0.
        burst: most permits that it holds.
        clock: seconds, monotonic.
    """

    __slots__ = ("_at", "_burst", "_clock", "_level", "_rate")

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._level = float(burst)
        self._at = clock()

    def take(self) -> float:
        """Take one permit and return 0, or return the seconds until there is one."""
        self._fill()
        if self._level < 1:
            return (1 - self._level) / self._rate
        self._level -= 1
        return 0.0

    def take_more(self, count: int) -> float:
        """Take *count* permits for a request that has one already and return 0, or return the seconds to wait.

        It may go below 0, which later requests wait for: a batch of *burst* events would otherwise never get in. A
        bucket below 0 gives nothing.
        """
        self._fill()
        if self._level < 0:
            return (1 - self._level) / self._rate  # the next request takes one before it gets here
        self._level -= count
        return 0.0

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now


class RateLimiter:
    """A token bucket for each client.

    Args:
        rate: of each client, a second; 0 for no limit.
        burst: of each client.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, client: str) -> float:
        """Take one permit of *client*; see :meth:`TokenBucket.take`."""
        return self._bucket(client).take() if self._rate else 0.0

    def take_more(self, client: str, count: int) -> float:
        """Take *count* more permits of *client*; see :meth:`TokenBucket.take_more`."""
        return self._bucket(client).take_more(count) if self._rate else 0.0

    def keep_only(self, clients: set[str]) -> None:
        """Forget all other clients."""
        self._buckets = {client: bucket for client, bucket in self._buckets.items() if client in clients}

    def _bucket(self, client: str) -> TokenBucket:
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = self._buckets[client] = TokenBucket(self._rate, self._burst)
        return bucket


#: consultations that a process remembers to have stored events of, some 100 bytes each
REMEMBERED_CONSULTATIONS = 32_768
#: consultations that are asked about at a time
_ASKED_AT_A_TIME = 50


class NewConsultations:
    """Limits the consultations that each token begins.

    A consultation that this process does not remember counts as new, without a question. Only a token that has used its
    limit up waits for one: the owner is asked whether the corpus holds anything of the consultation. So posts to known
    consultations are never refused. If the owner does not answer, the event is accepted: the backlog bounds these.

    Args:
        rates: of the new consultations of each token.
        holds: asks whether the corpus holds anything of a consultation; returns None without an answer.
    """

    def __init__(self, rates: RateLimiter, holds: Callable[[str], Awaitable[bool | None]]) -> None:
        self._rates = rates
        self._holds = holds
        #: hashes of their names, the least recently used first
        self._known: dict[int, None] = {}

    async def check(self, token: str, consultations: Iterable[str]) -> None:
        """Count those of *consultations* that *token* seems to begin.

        Raises RequestRefusedError: the token's limit is used up, and one of them is new.
        """
        unknown = [name for name in consultations if not self._touch(name)]
        if not unknown or not self._rates.take_more(token, len(unknown)):
            return
        new = []
        for first in range(0, len(unknown), _ASKED_AT_A_TIME):
            asked = unknown[first : first + _ASKED_AT_A_TIME]
            answers = await asyncio.gather(*map(self._holds, asked))
            new += [name for name, held in zip(asked, answers, strict=True) if held is False]
            self.remember(name for name, held in zip(asked, answers, strict=True) if held)
        if new and (wait := self._rates.take_more(token, len(new))):
            headers = {"Retry-After": str(math.ceil(wait))}
            raise RequestRefusedError(problems.TOO_MANY_NEW_CONSULTATIONS, headers=headers)

    def remember(self, consultations: Iterable[str]) -> None:
        """Note that events of *consultations* are stored."""
        for name in consultations:
            self._known[hash(name)] = None
        while len(self._known) > REMEMBERED_CONSULTATIONS:
            del self._known[next(iter(self._known))]

    def _touch(self, name: str) -> bool:
        key = hash(name)
        if key not in self._known:
            return False
        del self._known[key]
        self._known[key] = None
        return True


# -- in flight --------------------------------------------------------------------------------------------------------

#: headers or a body that take longer to arrive may be given up when their memory is needed, seconds
SLOW_SECONDS = 1.0


class InFlight:
    """Counts the requests between their headers and their answers; ``with`` counts one.

    Attributes:
        count: of requests.
        closing: the service is stopping: each answer closes its connection.
    """

    def __init__(self) -> None:
        self.count = 0
        self.closing = False
        self._idle = asyncio.Event()

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count and self.closing:
            self._idle.set()

    async def drain(self, grace: float) -> None:
        """Let answers close their connections from now on, and wait at most *grace* seconds until none is due."""
        self.closing = True
        await asyncio.sleep(0)  # requests that have been parsed get to their handler
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self.count:
                    self._idle.clear()
                    await self._idle.wait()


class Holder(Protocol):
    """What holds bytes that a client sends.

    Attributes:
        size: bytes that are counted for it.
    """

    size: int

    def give_up(self) -> None:
        """Drop them: they are not complete, and their memory is needed."""


class Admission:
    """Bounds the events that are being stored, and the bytes of all bodies and long headers.

    Args:
        events: most that are stored at a time, each by a request of its own.
        size: most bytes; at least one largest body.
        batched: most events of batches that are stored at a time; one batch is always taken.

    Attributes:
        size: bytes of bodies and long headers that are being read or stored.
        storing: events that are being stored, each by a request of its own.
        batched: events of batches that are being stored.
        long_batch: held while a long batch is read.
    """

    def __init__(self, *, events: int, size: int, batched: int = 0) -> None:
        self.size = self.storing = self.batched = 0
        self.long_batch = asyncio.Lock()
        self._max_storing = events
        self._max_batched = batched
        self._max_size = size
        #: what is incomplete and when its first bytes came, oldest first
        self._incomplete: dict[Holder, float] = {}

    def reserve(self, *, batch: bool = False) -> Reservation:
        """Return a reservation for a request, which holds nothing yet.

        Raises TooManyInFlightError: the limit of events is reached.
        """
        self.check(1, batch=batch)
        return Reservation(self, batch=batch)

    def check(self, count: int, *, batch: bool) -> None:
        """Raise TooManyInFlightError when *count* more events would exceed the limit."""
        if batch:
            if self.batched and self.batched + count > self._max_batched:
                raise TooManyInFlightError("too many events of batches are being stored")
        elif self.storing >= self._max_storing:
            raise TooManyInFlightError("too many events are being stored")

    def take_bytes(self, size: int, holder: Holder, *, complete: bool) -> None:
        """Count *size* more bytes of *holder*. Raises TooManyInFlightError: there is no memory for them."""
        if self.size + size > self._max_size:
            self._give_up_slow(self.size + size - self._max_size, holder)
        if self.size + size > self._max_size:
            raise TooManyInFlightError("the bodies that are being read or stored take too much memory")
        self.size += size
        holder.size += size
        if not complete:
            self._incomplete.setdefault(holder, time.monotonic())

    def drop_bytes(self, size: int, holder: Holder) -> None:
        """Count *size* bytes of *holder* no more."""
        self.size -= size
        holder.size -= size

    def completed(self, holder: Holder) -> None:
        """Note that what *holder* holds is complete, or is no longer read."""
        self._incomplete.pop(holder, None)

    def _give_up_slow(self, wanted: int, asking: Holder) -> None:
        before = time.monotonic() - SLOW_SECONDS
        slow: list[Holder] = []
        for holder, since in self._incomplete.items():
            if wanted <= 0 or since > before:
                break
            if holder is not asking:
                slow.append(holder)
                wanted -= holder.size
        for holder in slow:
            holder.give_up()


class Reservation:
    """What one request holds of an :class:`Admission`; release it at the end.

    Attributes:
        size: bytes of the body that have arrived.
        given_up: the body was slow and its memory was needed.
    """

    def __init__(self, admission: Admission, *, batch: bool) -> None:
        self.size = 0
        self.given_up = False
        self._admission = admission
        self._batch = batch
        self._chunks: list[bytes] = []
        self._events = 0
        self._timeout: asyncio.Timeout | None = None

    def read_within(self, timeout: asyncio.Timeout) -> None:
        """Let :meth:`give_up` end the reading of the body, which *timeout* bounds."""
        self._timeout = timeout

    def take(self, chunk: bytes) -> None:
        """Take a part of the body. Raises TooManyInFlightError: there is no memory for it."""
        self._check()
        self._admission.take_bytes(len(chunk), self, complete=self._timeout is None)
        self._chunks.append(chunk)

    def complete(self) -> bytes:
        """Return the body; it is not given up any more. Raises TooManyInFlightError: it was given up."""
        self._check()
        self._admission.completed(self)
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        return body

    def store(self, count: int = 1) -> None:
        """Count *count* events as being stored. Raises TooManyInFlightError: the limit is reached."""
        self._admission.check(count, batch=self._batch)
        self._count(count)

    def give_up(self) -> None:
        """End the reading of the body and drop what came of it."""
        self.given_up = True
        self._drop()
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    def release(self) -> None:
        """Return everything. Idempotent."""
        self._drop()
        self._count(-self._events)

    def _count(self, count: int) -> None:
        self._events += count
        if self._batch:
            self._admission.batched += count
        else:
            self._admission.storing += count

    def _drop(self) -> None:
        self._admission.completed(self)
        self._admission.drop_bytes(self.size, self)
        self._chunks.clear()

    def _check(self) -> None:
        if self.given_up:
            raise TooManyInFlightError("the body was slow, and its memory was needed for others")


# -- backlog ----------------------------------------------------------------------------------------------------------

#: bounds of Retry-After, seconds
SHORTEST, LONGEST = 1.0, 60.0
#: part of the limit that stalled partitions share while others move
STALLED_SHARE = 0.5
#: persisters commit in rounds and report once a second: a rate over less time would be noise, seconds
_RATE_SECONDS = 4.5
#: weight of the newest measurement of the rate
_NEWEST_WEIGHT = 0.5


class BacklogLimiter:
    """Refuses events while too many wait to be committed.

    Once a second :meth:`update` reads how many events wait in each partition, and up to which sequence that counts.
    What was stored since then, by any process, follows from the sequences in the log's answers; each partition is taken
    to get an equal part of it. Nothing counts as committed before it is reported, so the limit holds when persisters
    stop, and a request costs a comparison.

    The limit is for all partitions together. A stalled partition (no process runs it, or its file has not moved for
    10 s) must not stop the clients of the others: while others move, the stalled ones share half of the limit, and each
    refuses its own clients beyond its part.

    Args:
        limit: events that may wait; 0 for no limit.
        retry_after: Retry-After while no rate is known, seconds.
        metrics: shows backlog and rate.

    Attributes:
        read_backlog: returns the latest count; while it is None nothing is refused.
    """

    def __init__(self, limit: int, retry_after: float, metrics: IngestMetrics) -> None:
        self.read_backlog: Callable[[], Backlog | None] = lambda: None
        self._limit = limit
        self._retry_after = retry_after
        #: the count that the rate was measured from, with its base
        self._measured: tuple[Backlog, float] | None = None
        self._rate: float | None = None
        self._newest = 0
        self._partitions = 1
        #: the backlog is this plus the newest sequence
        self._base: float | None = None
        #: the newest sequence from which on everything is refused
        self._until = math.inf
        #: the same of each stalled partition, and the smallest of them
        self._stalled: dict[int, float] = {}
        self._first_stalled = math.inf
        metrics.backlog.set_function(self._events)
        metrics.drain_rate.set_function(lambda: self._rate or 0.0)

    def note(self, sequence: int) -> None:
        """Note that the log has reached *sequence*."""
        if sequence > self._newest:
            self._newest = sequence

    def update(self) -> None:
        """Read the backlog; call it each second."""
        backlog = self.read_backlog()
        self._stalled, self._first_stalled, self._until = {}, math.inf, math.inf
        if backlog is None or not backlog.partitions:
            self._measured, self._rate, self._base = None, None, None
            return
        self._partitions = count = len(backlog.partitions)
        base = sum(one.events - one.sequence / count for one in backlog.partitions)
        self._measure(backlog, base)
        self.note(backlog.sequence)
        self._base = base
        if self._limit:
            self._set_limits(backlog)

    def check(self) -> None:
        """Raise RequestRefusedError when too many events wait."""
        if self._newest >= self._until:
            raise RequestRefusedError(problems.BACKLOG_FULL)

    def check_partitions(self, events: Iterable[Event]) -> None:
        """Raise RequestRefusedError when one of *events* is of a stalled partition in which too many wait."""
        if self._newest < self._first_stalled:
            return
        for event in events:
            partition = partition_of(event.consultation, self._partitions)
            if self._newest >= self._stalled.get(partition, math.inf):
                raise RequestRefusedError(
                    problems.BACKLOG_FULL,
                    f"Partition {partition_name(partition)}, which this consultation belongs to, is not being written "
                    "to HDF5, and too many of its events are waiting. Other consultations are not affected.",
                    headers={"Retry-After": str(math.ceil(LONGEST))},
                )

    def retry_after(self, problem: ProblemType) -> float:
        """Return when there is likely to be room again after *problem*, seconds."""
        if problem is problems.BACKLOG_FULL:
            return self._time_for(self._newest - self._until + 1)
        if problem is problems.LOG_FULL and self._measured is not None:
            return self._time_for(self._events())
        return self._retry_after

    def _events(self) -> float:
        return 0.0 if self._base is None else max(0.0, self._base + self._newest)

    def _time_for(self, events: float) -> float:
        if self._rate is None:
            return self._retry_after
        return LONGEST if self._rate <= 0 else min(LONGEST, max(SHORTEST, events / self._rate))

    def _set_limits(self, backlog: Backlog) -> None:
        count = len(backlog.partitions)
        stalled = [p for p, one in enumerate(backlog.partitions) if one.stalled]
        if len(stalled) == count:  # nothing is drained, so one limit holds for all
            stalled = []
        own = STALLED_SHARE * self._limit / max(1, len(stalled))
        room = float(self._limit)
        for partition, one in enumerate(backlog.partitions):
            if partition in stalled:
                self._stalled[partition] = one.sequence + (own - one.events) * count
                room -= min(own, one.events + max(0, self._newest - one.sequence) / count)
            else:
                room -= one.events - one.sequence / count
        self._first_stalled = min(self._stalled.values(), default=math.inf)
        self._until = room * count / (count - len(stalled))

    def _measure(self, backlog: Backlog, base: float) -> None:
        """Measure from two counts that are far enough apart how many events were committed between them."""
        if self._measured is None or backlog.sequence < self._measured[0].sequence:  # another stream
            if self._measured is not None:
                self._rate, self._newest = None, backlog.sequence
            self._measured = backlog, base
            return
        before, base_before = self._measured
        if backlog.at - before.at < _RATE_SECONDS:
            return
        self._measured = backlog, base
        rate = max(0.0, (base_before - base) / (backlog.at - before.at))
        self._rate = rate if self._rate is None else _NEWEST_WEIGHT * rate + (1 - _NEWEST_WEIGHT) * self._rate


# -- duplicate window -------------------------------------------------------------------------------------------------


class WindowLimiter:
    """Refuses events while the log has stored too many within its duplicate window.

    Every node keeps the ids of the window in memory: 0.33 to 0.39 KB each, as measured with three nodes and up to
    2,200,000 ids (nats-server 2.15.1, 2026-11-27). Nothing in nats-server bounds their number, so a rate that the disks
    can take ends all nodes at once, and again after each restart, when they read the ids of the window back.

    Once a second :meth:`update` notes the log's last sequence, so what any process has stored within the window is a
    difference of two, and a request costs a comparison. A process that has just started knows no earlier ones: if all
    of them restart at full rate, up to twice the limit is stored in one window.

    Args:
        limit: events within the window; 0 for no limit.
        window: seconds.
        metrics: shows the number.
        clock: seconds, monotonic.
    """

    def __init__(
        self, limit: int, window: float, metrics: IngestMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._window = window
        self._clock = clock
        #: times and last sequences; the first one is the newest that is older than the window
        self._seen: deque[tuple[float, int]] = deque()
        metrics.window_events.set_function(lambda: self.events)

    @property
    def events(self) -> int:
        """Events that were stored within the window, as far as this process saw; 0 while it knows none."""
        return self._seen[-1][1] - self._seen[0][1] if self._seen else 0

    def update(self, sequence: int | None) -> None:
        """Note the log's last *sequence*; None: it is not known, or the log has no window."""
        now = self._clock()
        if sequence is not None:
            if self._seen and sequence < self._seen[-1][1]:  # another log
                self._seen.clear()
            self._seen.append((now, sequence))
        while len(self._seen) > 1 and self._seen[1][0] <= now - self._window:
            self._seen.popleft()

    def check(self) -> None:
        """Raise RequestRefusedError when too many events were stored within the window."""
        if self._limit and self.events >= self._limit:
            wait = math.ceil(min(LONGEST, max(SHORTEST, self._time_for_room())))
            raise RequestRefusedError(problems.WINDOW_FULL, headers={"Retry-After": str(wait)})

    def _time_for_room(self) -> float:
        """Return when the number falls below the limit if nothing more is stored, seconds."""
        enough = self._seen[-1][1] - self._limit
        return next(at for at, sequence in self._seen if sequence > enough) + self._window - self._clock()


IN_FLIGHT = web.AppKey("in_flight", InFlight)
ADMISSION = web.AppKey("admission", Admission)
NEW_CONSULTATIONS = web.AppKey("new_consultations", NewConsultations)
