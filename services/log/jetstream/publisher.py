"""Publishes events and waits for the broker's acknowledgement, within a deadline and a bound on what is in flight.

Every attempt carries the same message id, so the broker stores a message once however often it is sent.

**One event** is published at once while at most :data:`FEW_IN_FLIGHT` are in flight. Otherwise it gathers with others,
and they go as one atomic batch (ADR-50) as soon as nothing is in flight any more: the cluster agrees on them once
instead of once each. While several were in flight, the next batches were smaller and each event cost the nodes a third
more. A gathered batch that is refused or not answered is published one by one.

**A client's batch** is one atomic batch, too. The broker refuses one that holds a message id which it knows: usually a
retry of all of its events. Then the events are published one by one, and the broker says of each whether it is new. Two
new events of one consultation are never in flight at the same time, as an election between them would change their
order. Those that are known to be stored have their places, so nothing waits for them; otherwise a retry of a large
batch would need as many round trips as it has events, and never end within the deadline.

**Answers.** One inbox subscription takes all of them and one timer drives every wait: nats-py's ``publish_async`` never
resolves on an error answer and leaks its slots (nats.py #985), and its ``request`` costs a timer and an inbox each.
nats-py's ``publish`` takes some 10 µs a message, most of it to look at headers that are ours and to wake its writer, so
messages are written here, those of a batch in a few blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import nats.errors
import orjson
from nats.aio.subscription import Subscription

from fiq.event import Event
from services.core.lifecycle import spawn
from services.core.retry import backoff
from services.log.errors import (
    CorpusAwayError,
    DuplicateInFlightError,
    LogFullError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from services.log.jetstream.api import is_transient
from services.log.jetstream.connection import PENDING_BYTES, Connection, Received, Refusal
from services.log.jetstream.stream import STREAM, stream_of, subject_of
from services.log.protocol import Appended, EventWriter

#: an attempt without an answer is repeated after this; each further one waits twice as long, seconds
ATTEMPT_SECONDS = 1.0
#: pause after "not now"; each further one is twice as long, up to the second value, seconds
PAUSE_SECONDS = (0.05, 0.4)
#: how finely time is measured, seconds
TICK_SECONDS = 0.025
#: how long the broker may take to confirm the subscription to the answers, seconds
HEARING_SECONDS = 1.0
#: what is in flight gets this long when the publisher is closed, seconds
CLOSE_GRACE_SECONDS = 2.0

#: single appends in flight up to which none gathers: so few would only wait for each other
FEW_IN_FLIGHT = 3
#: an event gathers for this long at most, even if what is in flight is not acknowledged, seconds
GATHER_SECONDS = 0.1
#: events of a gathered batch, and bytes of their bodies, at most
MAX_GATHERED, MAX_GATHERED_BYTES = 256, 256 * 2**10

#: most messages of an atomic batch: the broker's limit
MAX_BATCH = 1000
#: clients' batches of one process in flight; the broker takes 50 of one stream from all of them, others wait here
MAX_BATCHES_UNDER_WAY = 8
#: a batch takes the cluster longer than one event, and a needless repetition costs all of it: an attempt waits so many
#: times as long
_BATCH_ATTEMPT_FACTOR = 3.0
#: events of one batch that are published one by one at the same time
MAX_SINGLES = 64
#: share of the time that is left in which ingest asks which events are known
_ASKING_SHARE = 0.25

#: headers of a message of a batch; the last one is on the last message only
BATCH_ID_HEADER = "Nats-Batch-Id"
BATCH_SEQUENCE_HEADER = "Nats-Batch-Sequence"
BATCH_COMMIT_HEADER = "Nats-Batch-Commit"
#: more than these headers take, bytes
_BATCH_HEADERS_BYTES = 128
#: messages of a batch are written together up to this size, bytes
_BLOCK_BYTES = 128 * 2**10
#: while more waits to be sent, a batch holds its next messages back: single events must find room, bytes
_CONGESTED_BYTES = 2**20
#: how often a batch looks whether there is room again, seconds
_ROOM_SECONDS = 0.005
#: more than headers ever take: only messages that come closer to the server's limit are measured exactly, bytes
_HEADERS_ROOM_BYTES = 64 * 2**10

#: the same message id is being stored just now
DUPLICATE_IN_FLIGHT = 10158
#: an atomic batch holds a message id that the stream knows, or one of them twice: nothing of it was stored
BATCH_HAS_DUPLICATE = 10201
#: an atomic batch lost its beginning in a change of leaders, or the stream has as many batches in flight as it takes
_BATCH_LATER = frozenset({10176, 10210})
#: generic failure to store; its text tells a stream at its limit from anything else
_STORE_FAILED = 10077
#: the account's or the server's storage is used up
_NO_STORAGE = frozenset({10002, 10047})

T = TypeVar("T")
#: returns which ids of a consultation are stored: :meth:`services.log.protocol.EventReader.known`
AskKnown = Callable[[str, Collection[UUID]], Awaitable[set[UUID]]]


@dataclass(frozen=True, slots=True)
class TryAgain:
    """The message was not stored, or that is not known, and may be sent again with the same id.

    Attributes:
        reason: for operators.
        err_code: the broker's, or 0.
    """

    reason: str
    err_code: int = 0


@dataclass(slots=True, eq=False)
class _Gathered:
    """An event that waits for others to go with; *since* and *end*, its deadline, are on the loop's clock."""

    event: Event
    since: float
    end: float
    stored: asyncio.Future[Appended]

    def done(self, outcome: Appended | Exception) -> None:
        if self.stored.done():  # its caller has gone
            return
        if isinstance(outcome, Appended):
            self.stored.set_result(outcome)
        else:
            self.stored.set_exception(outcome)


class Publisher(EventWriter):
    """The appending side of the log.

    Args:
        nc: the connection; it stays the caller's to close.
        deadline: seconds for each append, retries included, and for each batch.
        max_in_flight: single appends in flight; one more fails at once.
        known: returns which events of a batch are stored already, so that a retry of one is quick.

    Attributes:
        retries: attempts after the first, over all calls, since the start.
    """

    def __init__(self, nc: Connection, *, deadline: float, max_in_flight: int, known: AskKnown | None = None) -> None:
        self.retries = 0
        self._deadline = deadline
        self._max_in_flight = max_in_flight
        self._ask_known = known
        self._in_flight = 0
        self._batches = 0
        #: first attempts that what gathers waits for
        self._under_way: set[object] = set()
        self._gathered: deque[_Gathered] = deque()
        self._batch_turns = asyncio.Semaphore(MAX_BATCHES_UNDER_WAY)
        self._tasks: set[asyncio.Task[None]] = set()
        self._exchange = _Exchange(nc, self._send_overdue)
        self._loop = asyncio.get_running_loop()

    @property
    def in_flight(self) -> int:
        """Single appends in flight."""
        return self._in_flight

    async def start(self) -> None:
        """Subscribe to the answers. Raises LogForbiddenError: the user of the connection may not."""
        await self._exchange.start()

    async def append(self, event: Event) -> Appended:
        """Store *event*; see :meth:`services.log.protocol.EventWriter.append`.

        ``duplicate`` is the broker's word: it is also true when an attempt of this very call was stored although its
        answer did not come back.
        """
        self._enter()
        try:
            if len(event.body) > MAX_GATHERED_BYTES:
                return await self._append_by(event, self._end())
            if not self._under_way or (not self._gathered and self._in_flight <= FEW_IN_FLIGHT):
                return await self._append_now(event, self._end())
            self._exchange.check_size(event.body, event.headers(), more=_BATCH_HEADERS_BYTES)
            one = _Gathered(event, self._loop.time(), self._end(), self._loop.create_future())
            self._gathered.append(one)
            return await one.stored
        finally:
            self._in_flight -= 1

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        """Store 1 to :data:`MAX_BATCH` events; see :meth:`services.log.protocol.EventWriter.append_batch`.

        The deadline is for all of them; the limit of what is in flight does not count them.
        """
        if not 0 < len(events) <= MAX_BATCH:
            raise ValueError(f"a batch is 1 to {MAX_BATCH} events, not {len(events)}")
        self._exchange.check_open()
        end = self._end()
        self._batches += 1
        try:
            return await self._append_batch(events, end)
        finally:
            self._batches -= 1

    async def _append_batch(self, events: Sequence[Event], end: float) -> list[Appended]:
        try:
            async with asyncio.timeout_at(end):
                await self._batch_turns.acquire()
        except TimeoutError:
            raise LogUnavailableError(
                f"{MAX_BATCHES_UNDER_WAY} batches were in flight for all of {self._deadline:g} s"
            ) from None
        try:
            if len(events) > 1 and (stored := await self._append_atomically(events, end)) is not None:
                return stored
            return await self._append_partly_known(events, end)
        finally:
            self._batch_turns.release()

    async def publish(self, subject: str, body: bytes, headers: dict[str, str]) -> Appended:
        """Store a message of any kind; *headers* must hold a ``Nats-Msg-Id`` and be ASCII.

        Raises Exception: as :meth:`append`; LogForbiddenError: the user of the connection may not publish on *subject*.
        """
        self._enter()
        try:
            return await self._publish(subject, body, headers, self._end())
        finally:
            self._in_flight -= 1

    async def close(self, *, grace: float = CLOSE_GRACE_SECONDS) -> None:
        """Take no more, let what is in flight end for *grace* seconds, then fail the rest. Idempotent."""
        self._exchange.closing = True
        end = self._loop.time() + grace
        while (self._in_flight or self._batches) and self._loop.time() < end:  # noqa: ASYNC110 - once, for a moment
            await asyncio.sleep(TICK_SECONDS)
        await self._exchange.close()
        while self._gathered:
            self._gathered.popleft().done(LogUnavailableError("the publisher was closed before the event was sent"))

    # -- one message --------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        self._exchange.check_open()
        if self._in_flight >= self._max_in_flight:
            raise TooManyInFlightError(f"{self._max_in_flight} appends are in flight, nothing was sent")
        self._in_flight += 1

    def _end(self) -> float:
        return self._loop.time() + self._deadline

    async def _append_now(self, event: Event, end: float) -> Appended:
        self._under_way.add(under_way := object())
        try:
            return await self._append_by(event, end)
        finally:
            self._left(under_way)

    async def _append_by(self, event: Event, end: float, *, unanswered: bool = False) -> Appended:
        """Store one event until *end*, on the loop's clock; *unanswered*: an earlier attempt of ours got no answer."""
        return await self._publish(
            subject_of(event.consultation), event.body, event.headers(), end, unanswered=unanswered
        )

    async def _publish(
        self, subject: str, body: bytes, headers: dict[str, str], end: float, *, unanswered: bool = False
    ) -> Appended:
        exchange, stream = self._exchange, stream_of(subject)
        exchange.check_size(body, headers)
        slot = exchange.open(subject)
        try:
            return await self._deliver(
                slot,
                end,
                send=lambda: exchange.send(subject, body, headers, slot.reply_to),
                read=lambda answer: read_ack(answer.data, answer.headers, stream),
                unanswered=unanswered,
            )
        finally:
            exchange.release(slot)

    async def _deliver(
        self,
        slot: _Slot,
        end: float,
        *,
        send: Callable[[], Awaitable[TryAgain | None]],
        read: Callable[[Received], T | TryAgain],
        what: str = "message",
        attempt_factor: float = 1.0,
        unanswered: bool = False,
    ) -> T:
        """Send until an answer says what became of it, or until *end*.

        Args:
            slot: of this call.
            end: on the loop's clock.
            send: sends it, or returns why not.
            read: what an answer says.
            what: it is, for the message of an error.
            attempt_factor: how many times as long as for one event an attempt waits.
            unanswered: an earlier attempt of ours may still be in flight: then a duplicate is not another writer's.
        """
        trouble = TryAgain("no answer")
        seconds = attempt_factor * ATTEMPT_SECONDS
        for pause in backoff(*PAUSE_SECONDS):
            not_sent = await send()
            answer = await self._exchange.answer(slot, end, seconds if not_sent is None else pause)
            if answer is None:
                trouble = not_sent or TryAgain(f"no answer within {self._deadline:g} s")
                unanswered = unanswered or not_sent is None
            while answer is not None:
                outcome = read(answer)
                if not isinstance(outcome, TryAgain):
                    return outcome
                trouble = outcome
                answer = await self._exchange.answer(slot, end, pause)  # an earlier attempt's may still come
            if self._loop.time() >= end:
                break
            self.retries += 1
            seconds *= 2
        if trouble.err_code == DUPLICATE_IN_FLIGHT and not unanswered:
            raise DuplicateInFlightError(trouble.reason)
        raise LogUnavailableError(f"the log did not take the {what} within {self._deadline:g} s: {trouble.reason}")

    # -- gathering ----------------------------------------------------------------------------------------------------

    def _left(self, ended: object) -> None:
        """Send what has gathered if it waits for nothing else than what has *ended*."""
        self._under_way.discard(ended)
        while self._gathered and not self._under_way:
            self._send_group()

    def _send_overdue(self) -> None:
        """Send what has gathered for too long; nothing waits any more for what hangs, or waits for another try."""
        if self._gathered and self._gathered[0].since <= self._loop.time() - GATHER_SECONDS:
            self._under_way.clear()
            self._send_group()

    def _send_group(self) -> None:
        """Send the events that go together next: each id once, or the broker would refuse all of them."""
        group: dict[str, _Gathered] = {}
        copies: list[_Gathered] = []
        size = 0
        while self._gathered and len(group) + len(copies) < MAX_GATHERED and size < MAX_GATHERED_BYTES:
            one = self._gathered.popleft()
            if one.stored.done():  # its caller has gone
                continue
            if one.event.message_id in group:
                copies.append(one)
            else:
                group[one.event.message_id] = one
                size += len(one.event.body)
        if group:
            spawn(self._tasks, self._store_group(list(group.values()), under_way := object()))
            self._under_way.add(under_way)
        for one in copies:
            spawn(self._tasks, self._store_one(one))

    async def _store_group(self, group: list[_Gathered], under_way: object) -> None:
        """Store *group* as a batch, or its events one by one; the next group goes when the first try has ended."""
        try:
            if len(group) == 1:
                await self._store_one(group[0])
                return
            stored = await self._append_once([one.event for one in group], min(one.end for one in group))
        except Exception as error:  # noqa: BLE001 - raised where each event is waited for
            for one in group:
                one.done(error)
        else:
            if stored is not None:
                for one, appended in zip(group, stored, strict=True):
                    one.done(appended)
                return
            self.retries += 1
            for one in group:
                spawn(self._tasks, self._store_one(one, tried=True))
        finally:
            self._left(under_way)

    async def _store_one(self, one: _Gathered, *, tried: bool = False) -> None:
        """Store one event; *tried*: it was in a batch before."""
        try:
            one.done(await self._append_by(one.event, one.end, unanswered=tried))
        except Exception as error:  # noqa: BLE001 - raised where the event is waited for
            one.done(error)

    # -- atomic batches -----------------------------------------------------------------------------------------------

    async def _append_once(self, events: Sequence[Event], end: float) -> list[Appended] | None:
        """Try once to store *events*, two at least, as a batch; None: it was refused, or that is not known.

        Raises LogFullError, LogRefusedError: nothing of it was stored.
        """
        slot = self._exchange.open(subject_of(events[0].consultation))
        try:
            # half of the time is for the events one by one
            seconds = min(_BATCH_ATTEMPT_FACTOR * ATTEMPT_SECONDS, (end - self._loop.time()) / 2)
            end = self._loop.time() + seconds
            if await self._send_batch(events, slot, end) is not None:
                return None
            answer = await self._exchange.answer(slot, end, seconds)
            if answer is None:
                return None
            outcome = read_batch_ack(answer.data, answer.headers, STREAM, len(events))
            return None if isinstance(outcome, TryAgain) else outcome
        finally:
            self._exchange.release(slot)

    async def _append_atomically(self, events: Sequence[Event], end: float) -> list[Appended] | None:
        """Store *events* as an atomic batch, or return None when the stream knows one of them."""
        longest = max(events, key=lambda event: len(event.body))
        self._exchange.check_size(longest.body, longest.headers() | _batch_headers("0" * 32, MAX_BATCH, last=True))
        slot = self._exchange.open(subject_of(events[0].consultation))

        def read(answer: Received) -> list[Appended] | TryAgain | None:
            outcome = read_batch_ack(answer.data, answer.headers, STREAM, len(events))
            has_known = isinstance(outcome, TryAgain) and outcome.err_code == BATCH_HAS_DUPLICATE
            return None if has_known else outcome

        try:
            return await self._deliver(
                slot,
                end,
                send=lambda: self._send_batch(events, slot, end),
                read=read,
                what="batch",
                attempt_factor=_BATCH_ATTEMPT_FACTOR,
            )
        finally:
            self._exchange.release(slot)

    async def _send_batch(self, events: Sequence[Event], slot: _Slot, end: float) -> TryAgain | None:
        """Send *events* under a new batch id; only the last one asks for an answer, which is about all of them."""
        batch, count = os.urandom(16).hex(), len(events)
        block: list[bytes] = []
        size = 0
        for number, event in enumerate(events, start=1):
            last = number == count
            headers = event.headers() | _batch_headers(batch, number, last=last)
            message = hpub(subject_of(event.consultation), slot.reply_to if last else "", headers, event.body)
            block.append(message)
            size += len(message)
            if last or size >= _BLOCK_BYTES:
                while self._exchange.unsent_bytes > _CONGESTED_BYTES:
                    if self._loop.time() >= end:
                        return TryAgain("the connection to the log is congested")
                    await asyncio.sleep(_ROOM_SECONDS)
                not_sent = await self._exchange.send_block(b"".join(block), len(block))
                if not_sent is not None:
                    return not_sent  # the broker forgets the beginning of a batch within seconds
                block, size = [], 0
        return None

    # -- batches of which the broker knows some events ----------------------------------------------------------------

    async def _append_partly_known(self, events: Sequence[Event], end: float) -> list[Appended]:
        """Store *events* until *end*: those that are known at the same time, the others of a consultation in order.

        Raises Exception: as :meth:`append`; the first one, when all that could be stored is.
        """
        stored: dict[int, Appended] = {}
        known = await self._known(events, end)
        await self._append_in_order(events, end, stored, ([number] for number in known))
        rest = [number for number in range(len(events)) if number not in stored]
        if known and len(rest) > 1:
            found = await self._append_atomically([events[number] for number in rest], end)
            stored.update(zip(rest, found or (), strict=found is not None))
        of_each: dict[str, list[int]] = {}
        for number, event in enumerate(events):
            if number not in stored:
                of_each.setdefault(event.consultation, []).append(number)
        await self._append_in_order(events, end, stored, of_each.values())
        return [stored[number] for number in range(len(events))]

    async def _append_in_order(
        self, events: Sequence[Event], end: float, stored: dict[int, Appended], sequences: Iterable[Sequence[int]]
    ) -> None:
        """Publish the events with the numbers of each sequence one after the other, several sequences at a time.

        A failure ends its sequence: the event may still be stored, and what follows must not be stored before it. The
        other sequences go on; then the first failure is raised.
        """
        failures: dict[int, Exception] = {}
        waiting = iter(sequences)

        async def work() -> None:
            for numbers in waiting:
                for number in numbers:
                    try:
                        stored[number] = await self._append_by(events[number], end)
                    except Exception as error:  # noqa: BLE001  # raised below, when the others are done
                        failures[number] = error
                        break

        async with asyncio.TaskGroup() as group:
            for _ in range(min(MAX_SINGLES, len(events))):
                group.create_task(work())
        if failures:
            raise failures[min(failures)]

    async def _known(self, events: Sequence[Event], end: float) -> list[int]:
        """Return the numbers of events that are certainly stored; others may be, too."""
        if self._ask_known is None:
            return []
        of_each: dict[str, list[UUID]] = {}
        for event in events:
            of_each.setdefault(event.consultation, []).append(event.event_id)
        known: set[tuple[str, UUID]] = set()
        now = self._loop.time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(now + _ASKING_SHARE * (end - now)):
                await asyncio.gather(*(self._ask(self._ask_known, name, ids, known) for name, ids in of_each.items()))
        return [number for number, event in enumerate(events) if (event.consultation, event.event_id) in known]

    async def _ask(self, ask: AskKnown, consultation: str, ids: Sequence[UUID], known: set[tuple[str, UUID]]) -> None:
        # what cannot be asked is stored in order, as if it were new
        with contextlib.suppress(CorpusAwayError, LogUnavailableError, LogRefusedError):
            known.update((consultation, event_id) for event_id in await ask(consultation, ids))


def _batch_headers(batch: str, number: int, *, last: bool) -> dict[str, str]:
    headers = {BATCH_ID_HEADER: batch, BATCH_SEQUENCE_HEADER: str(number)}
    if last:
        headers[BATCH_COMMIT_HEADER] = "1"
    return headers


# -- messages out, answers in -----------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Slot:
    """One call in flight.

    Attributes:
        subject: that it publishes on, or one of them: a refusal of it ends the call.
        token: last part of the subject of its answers.
        reply_to: subject of its answers.
        answer: where its next answer goes.
        due: when it stops waiting for that, on the loop's clock.
    """

    subject: str
    token: str
    reply_to: str
    answer: asyncio.Future[Received | None]
    due: float = math.inf


class _Exchange:
    """Sends messages and brings their answers; *on_tick* is called every :data:`TICK_SECONDS` while calls are open."""

    def __init__(self, nc: Connection, on_tick: Callable[[], None]) -> None:
        self._nc = nc
        self._on_tick = on_tick
        self._slots: dict[str, _Slot] = {}
        self._tokens = (f"{number:x}" for number in itertools.count())
        self._prefix = ""
        self._subscription: Subscription | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        #: no further call may begin
        self.closing = False
        self._stop_listening: Callable[[], None] = lambda: None

    @property
    def unsent_bytes(self) -> int:
        return self._nc.pending_data_size

    async def start(self) -> None:
        self._prefix = f"{self._nc.new_inbox()}."
        self._stop_listening = self._nc.listen(self._when_refused)
        self._subscription = await self._nc.subscribe_directly(f"{self._prefix}*", self._take_answer)
        await self._nc.confirm_hearing(timeout=HEARING_SECONDS)

    async def close(self) -> None:
        """Fail the calls in flight, and take no further ones. Idempotent."""
        self.closing = True
        for slot in self._slots.values():
            if not slot.answer.done():
                slot.answer.set_exception(LogUnavailableError("the publisher was closed before the broker answered"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._stop_listening()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._nc.unsubscribe_directly(subscription)

    def check_open(self) -> None:
        """Raise LogUnavailableError when no call may begin, LogForbiddenError when no answer can arrive."""
        if self._subscription is None or self.closing:
            raise LogUnavailableError("the publisher is not open: nothing was sent")
        self._nc.check_hearing()

    def check_size(self, body: bytes, headers: dict[str, str], *, more: int = 0) -> None:
        """Raise LogRefusedError when the server does not take such a message.

        nats-py looks at the body alone, and the server ends the connection of a client that exceeds the sum.
        """
        limit = self._nc.max_payload - more
        if len(body) + _HEADERS_ROOM_BYTES > limit and len(body) + headers_bytes(headers) > limit:
            raise LogRefusedError(f"a message of {len(body)} bytes and headers exceeds the server's limit, {limit}")

    def open(self, subject: str) -> _Slot:
        """Begin a call; :meth:`release` must follow."""
        token = next(self._tokens)
        slot = self._slots[token] = _Slot(subject, token, self._prefix + token, self._loop.create_future())
        return slot

    def release(self, slot: _Slot) -> None:
        del self._slots[slot.token]

    async def send(self, subject: str, body: bytes, headers: dict[str, str], reply_to: str) -> TryAgain | None:
        """Hand a message to the connection without ever waiting for it; return why not, when it was not.

        Raises LogUnavailableError: the connection or the publisher was closed; LogRefusedError: no such message can be
        published.
        """
        try:
            message = hpub(subject, reply_to, headers, body)
        except ValueError as error:
            raise LogRefusedError(f"the message cannot be published: {type(error).__name__}") from error
        return await self.send_block(message, 1)

    async def send_block(self, block: bytes, messages: int) -> TryAgain | None:
        """Hand over *messages* messages, written by :func:`hpub`, as :meth:`send`."""
        nc = self._nc
        if nc.is_closed or self._subscription is None:
            raise LogUnavailableError("the connection to the log, or the publisher, was closed")
        if not nc.is_connected:
            return TryAgain("no connection to the log")
        if nc.pending_data_size + len(block) > PENDING_BYTES // 2:
            return TryAgain("the connection to the log is congested")  # above PENDING_BYTES, writing would block
        try:
            await nc.write_block(block, messages)
        except (nats.errors.Error, OSError) as error:
            return TryAgain(f"the connection to the log failed: {type(error).__name__}")
        return None

    async def answer(self, slot: _Slot, end: float, seconds: float) -> Received | None:
        """Wait for the next answer; None after *seconds* or at *end*."""
        slot.due = min(self._loop.time() + seconds, end)
        if self._timer is None:
            self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        answer = await slot.answer
        slot.answer, slot.due = self._loop.create_future(), math.inf
        return answer

    def _take_answer(self, answer: Received) -> None:
        slot = self._slots.get(answer.subject[len(self._prefix) :])
        if slot is not None and not slot.answer.done():
            slot.answer.set_result(answer)

    def _when_refused(self, refusal: Refusal) -> None:
        for slot in self._slots.values():
            if refusal.hits(slot.subject, self._prefix) and not slot.answer.done():
                slot.answer.set_exception(refusal.error())

    def _tick(self) -> None:
        now = self._loop.time()
        for slot in self._slots.values():
            if slot.due <= now and not slot.answer.done():
                slot.answer.set_result(None)
        self._on_tick()
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick) if self._slots else None


# -- messages and answers as bytes ------------------------------------------------------------------------------------


def hpub(subject: str, reply_to: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return the bytes that publish *body* with *headers*; the answer goes to *reply_to*, or there is none.

    Raises ValueError: subject or headers hold what would end their line, or other than ASCII.
    """
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if head.count("\n") != len(headers) or " " in subject or "\n" in subject:
        raise ValueError("a subject has no blanks, a header no line breaks")
    block = f"NATS/1.0\r\n{head}\r\n".encode("ascii")
    line = f"HPUB {subject} {reply_to} {len(block)} {len(block) + len(body)}\r\n".encode("ascii")
    return b"".join((line, block, body, b"\r\n"))


def headers_bytes(headers: dict[str, str]) -> int:
    """Return what *headers* take on the wire: ``NATS/1.0``, a line each and an empty one."""
    return len("NATS/1.0\r\n\r\n") + sum(len(key) + len(value.encode()) + 4 for key, value in headers.items())


def read_ack(data: bytes, headers: Mapping[str, str] | None, stream: str) -> Appended | TryAgain:
    """Return what an answer says about a message that *stream* must have stored.

    Raises LogFullError: the stream is at its limit; LogRefusedError: the broker refuses for good, or another stream or
    service answered.
    """
    ack = _read(data, headers, stream)
    return ack if isinstance(ack, TryAgain) else Appended(int(ack["seq"]), bool(ack.get("duplicate", False)))


def read_batch_ack(
    data: bytes, headers: Mapping[str, str] | None, stream: str, count: int
) -> list[Appended] | TryAgain:
    """Return what the answer to the last message of an atomic batch of *count* says about all of them (ADR-50).

    The broker names the last position; those before it are consecutive, whatever others publish meanwhile. A
    :class:`TryAgain` with the code :data:`BATCH_HAS_DUPLICATE` is about the messages: repeating the batch is futile.

    Raises LogFullError, LogRefusedError: as :func:`read_ack`; nothing of the batch was stored.
    """
    ack = _read(data, headers, stream)
    if isinstance(ack, TryAgain):
        return ack
    if ack.get("count") != count:
        raise LogRefusedError(f"the broker stored {ack.get('count')!r} of the {count} in a batch")
    last = int(ack["seq"])
    return [Appended(sequence, duplicate=False) for sequence in range(last - count + 1, last + 1)]


def _read(data: bytes, headers: Mapping[str, str] | None, stream: str) -> dict[str, Any] | TryAgain:
    if headers is not None and "Status" in headers:
        return TryAgain(f"no node leads the stream just now (status {headers['Status']})")
    try:
        ack = orjson.loads(data)
    except orjson.JSONDecodeError:
        ack = None
    if not isinstance(ack, dict):
        raise LogRefusedError("the answer to a publish is no JetStream acknowledgement: another service is listening")
    if "error" in ack:
        return _read_error(ack["error"])
    if ack.get("stream") != stream:
        raise LogRefusedError(f"stream {ack.get('stream')!r} took a message of {stream}: its subjects overlap")
    return ack


def _read_error(error: Mapping[str, object]) -> TryAgain:
    code, err_code = int(str(error.get("code", 0))), int(str(error.get("err_code", 0)))
    text = f"{error.get('description', 'no description')} (err_code {err_code})"
    if err_code in _NO_STORAGE or (err_code == _STORE_FAILED and "maximum" in text):
        raise LogFullError(f"the stream is full: {text}")
    if is_transient(code, err_code) or err_code in _BATCH_LATER or err_code == BATCH_HAS_DUPLICATE:
        return TryAgain(text, err_code)
    raise LogRefusedError(f"the broker refuses the message: {text}")
