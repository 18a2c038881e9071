"""Publishes events and waits for the broker's acknowledgement, within a deadline and a bound on what is in flight.

Every retry carries the same message id, so the broker stores a message once however often it is sent.

A few events are published as they come. While :data:`MAX_UNDER_WAY` publishes are under way the others gather, and go
as one atomic batch (ADR-50) as soon as one of those is acknowledged: the cluster agrees on them once instead of once
each. A batch that is refused, because the broker knows one of its events, or gets no answer is published one by one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from services.contract.event import Event
from services.eventlog.errors import DuplicateInFlightError, LogUnavailableError, TooManyInFlightError
from services.eventlog.jetstream.batches import AskKnown, Batches
from services.eventlog.jetstream.exchange import (
    ATTEMPT_SECONDS,
    DUPLICATE_IN_FLIGHT,
    Again,
    Exchange,
    Slot,
    read_ack,
    waits,
)
from services.eventlog.jetstream.names import stream_of, subject_of
from services.eventlog.jetstream.tolerance import TolerantClient
from services.eventlog.protocol import Appended, EventWriter

#: what is in flight gets this long when the publisher is closed, seconds
CLOSE_GRACE_SECONDS = 2.0
#: publishes under way, singles and batches, from which on events gather
MAX_UNDER_WAY = 4
#: events of a gathered batch, and bytes of their bodies, at most
MAX_GATHERED, MAX_GATHERED_BYTES = 256, 256 * 2**10
#: more than the headers that make a message one of a batch take, bytes
_BATCH_HEADERS_BYTES = 256


@dataclass(frozen=True, slots=True)
class _Message:
    subject: str
    body: bytes
    headers: dict[str, str]
    stream: str


@dataclass(slots=True, eq=False)
class _Gathered:
    """An event that waits for others to go with.

    Attributes:
        event: the event.
        since: when it came, and *end*, when it must be stored, on the loop's clock.
        stored: where the outcome goes.
    """

    event: Event
    since: float
    end: float
    stored: asyncio.Future[Appended]


class Publisher(EventWriter):
    """The appending side of the log.

    Attributes:
        retries: attempts behind the first, over all calls, since the start.
    """

    def __init__(
        self, nc: TolerantClient, *, deadline: float, max_in_flight: int, known: AskKnown | None = None
    ) -> None:
        """Make a publisher; :meth:`start` must follow.

        Args:
            nc: the connection; it stays the caller's to close.
            deadline: seconds for each append, retries included, and for each batch.
            max_in_flight: single appends under way at once; one more fails at once.
            known: says which events of a batch are stored already, so that a retry of one is quick.
        """
        self.retries = 0
        self._deadline = deadline
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._under_way = 0
        self._gathered: deque[_Gathered] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._exchange = Exchange(nc, self._send_what_waits_too_long)
        self._batches = Batches(self._exchange, deadline=deadline, append=self._append_by, known=known)
        self._loop = asyncio.get_running_loop()

    @property
    def in_flight(self) -> int:
        """Single appends under way just now."""
        return self._in_flight

    async def start(self) -> None:
        """Subscribe to the answers. Raises LogForbiddenError: the user of the connection may not hear them."""
        await self._exchange.start()

    async def append(self, event: Event) -> Appended:
        """Store *event*; see :meth:`services.eventlog.protocol.EventWriter.append`.

        ``duplicate`` is the broker's word: it is also true when an attempt of this very call was stored although its
        answer did not come back.
        """
        self._enter()
        try:
            if self._under_way < MAX_UNDER_WAY or len(event.body) > MAX_GATHERED_BYTES:
                return await self._append_now(event, self._end())
            self._exchange.check_size(event.body, event.headers(), more=_BATCH_HEADERS_BYTES)
            one = _Gathered(event, self._loop.time(), self._end(), self._loop.create_future())
            self._gathered.append(one)
            return await one.stored
        finally:
            self._in_flight -= 1

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        """Store *events* in atomic batches; see :meth:`services.eventlog.protocol.EventWriter.append_batch`.

        The deadline is for all of them; the limit of what is in flight does not count them.
        """
        return await self._batches.append(events)

    async def publish(self, subject: str, body: bytes, headers: dict[str, str]) -> Appended:
        """Store a message of any kind; *headers* must hold a ``Nats-Msg-Id`` and be ASCII.

        Raises:
            LogFullError: the stream is at its limit; nothing was stored.
            LogUnavailableError: no answer within the deadline, or the publisher is being closed; the message may or
                may not be stored, and publishing it again with the same id is safe.
            DuplicateInFlightError: until the deadline, somebody else was storing the same message id.
            TooManyInFlightError: this publisher has its limit under way; nothing was sent.
            LogRefusedError: the broker refuses for good, or the message is too large for it.
            LogForbiddenError: the user of the connection may not publish on *subject*.
        """
        self._enter()
        try:
            return await self._publish(_Message(subject, body, headers, stream_of(subject)), self._end())
        finally:
            self._in_flight -= 1

    async def close(self, *, grace: float = CLOSE_GRACE_SECONDS) -> None:
        """Take no more, let what is in flight end for *grace* seconds, then fail the rest. Idempotent."""
        await self._exchange.close(grace=grace)
        while self._gathered:
            if not (stored := self._gathered.popleft().stored).done():
                stored.set_exception(LogUnavailableError("the publisher was closed before the event was sent"))

    # -- one call -----------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        self._exchange.check_open()
        if self._in_flight >= self._max_in_flight:
            raise TooManyInFlightError(f"{self._max_in_flight} appends are under way, nothing was sent")
        self._in_flight += 1

    def _end(self) -> float:
        return self._loop.time() + self._deadline

    async def _append_now(self, event: Event, end: float) -> Appended:
        self._under_way += 1
        try:
            return await self._append_by(event, end)
        finally:
            self._done()

    # -- gathering ----------------------------------------------------------------------------------------------------

    def _send_gathered(self) -> None:
        """Send what has gathered, as far as the number of publishes under way allows."""
        while self._gathered and self._under_way < MAX_UNDER_WAY:
            self._send(self._next())

    def _send_what_waits_too_long(self) -> None:
        """Send what has waited for as long as an attempt takes: those before it hang, and it has a deadline, too."""
        before = self._loop.time() - ATTEMPT_SECONDS
        while self._gathered and self._gathered[0].since <= before:
            self._send(self._next())

    def _send(self, group: list[_Gathered]) -> None:
        if len(group) == 1:
            self._under_way += 1
            self._spawn(self._store_one(group[0]))
        elif group:
            self._under_way += 1
            self._spawn(self._store_all(group))

    def _next(self) -> list[_Gathered]:
        """Return the events that go together next: each id once, or the broker would refuse all of them."""
        group: dict[str, _Gathered] = {}
        size = 0
        while self._gathered and len(group) < MAX_GATHERED and size < MAX_GATHERED_BYTES:
            one = self._gathered[0]
            if not one.stored.done():  # else its caller has gone
                if one.event.message_id in group:
                    break
                group[one.event.message_id] = one
                size += len(one.event.body)
            self._gathered.popleft()
        return list(group.values())

    async def _store_all(self, group: list[_Gathered]) -> None:
        """Store *group* as a batch, which counts as under way already, or its events one by one."""
        try:
            stored = await self._batches.once([one.event for one in group])
        except Exception as error:  # noqa: BLE001 - raised where each event is waited for
            for one in group:
                _end(one, error)
        else:
            if stored is None:
                self.retries += 1
                self._under_way += len(group)
                for one in group:
                    self._spawn(self._store_one(one, tried=True))
            for one, appended in zip(group, stored or (), strict=stored is not None):
                _end(one, appended)
        finally:
            self._done()

    async def _store_one(self, one: _Gathered, *, tried: bool = False) -> None:
        """Store one event, which counts as under way already; *tried*: it was in a batch before."""
        try:
            # an earlier attempt of ours may be under way still: a duplicate in flight is then no other writer's
            _end(one, await self._append_by(one.event, one.end, unanswered=tried))
        except Exception as error:  # noqa: BLE001 - raised where the event is waited for
            _end(one, error)
        finally:
            self._done()

    def _done(self) -> None:
        self._under_way -= 1
        self._send_gathered()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _append_by(self, event: Event, end: float, *, unanswered: bool = False) -> Appended:
        """Store one event of a batch until *end*, on the loop's clock; *unanswered*: an attempt of ours was before."""
        subject = subject_of(event.consultation)
        message = _Message(subject, event.body, event.headers(), stream_of(subject))
        return await self._publish(message, end, unanswered=unanswered)

    async def _publish(self, message: _Message, end: float, *, unanswered: bool = False) -> Appended:
        self._exchange.check_size(message.body, message.headers)
        slot = self._exchange.open(message.subject)
        try:
            return await self._deliver(message, slot, end, unanswered)
        finally:
            self._exchange.release(slot)

    async def _deliver(self, message: _Message, slot: Slot, end: float, unanswered: bool) -> Appended:
        exchange = self._exchange
        trouble = Again("no answer")
        for patience, pause in waits():
            not_sent = await exchange.send(message.subject, message.body, message.headers, slot.reply_to)
            answer = await exchange.answer(slot, end, patience if not_sent is None else pause)
            if answer is None:
                trouble = not_sent or Again(f"no answer within {self._deadline:g} s")
                unanswered = unanswered or not_sent is None
            while answer is not None:
                outcome = read_ack(answer.data, answer.headers, message.stream)
                if isinstance(outcome, Appended):
                    return outcome
                trouble = outcome
                answer = await exchange.answer(slot, end, pause)  # an earlier attempt's may still come
            if self._loop.time() >= end:
                break
            self.retries += 1
        if trouble.err_code == DUPLICATE_IN_FLIGHT and not unanswered:
            raise DuplicateInFlightError(trouble.reason)
        raise LogUnavailableError(f"the log did not take the message within {self._deadline:g} s: {trouble.reason}")


def _end(one: _Gathered, outcome: Appended | Exception) -> None:
    if one.stored.done():  # its caller has gone
        return
    if isinstance(outcome, Appended):
        one.stored.set_result(outcome)
    else:
        one.stored.set_exception(outcome)
