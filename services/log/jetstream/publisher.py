"""Publishes events and waits for the broker's acknowledgement, within a deadline and a bound on what is in flight.

Every retry carries the same message id, so the broker stores a message once however often it is sent.

A few events are published as they come. While :data:`MAX_UNDER_WAY` publishes are under way the others gather, and go
as one atomic batch (ADR-50) as soon as one of those is acknowledged: the cluster agrees on them once instead of once
each. A batch that is refused, because the broker knows one of its events, or gets no answer is published one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import nats.errors
import orjson
from nats.aio.client import Client
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
from services.log.jetstream.connection import (
    PENDING_BYTES,
    Connection,
    Received,
    Refusal,
)
from services.log.jetstream.stream import STREAM, stream_of, subject_of
from services.log.protocol import Appended, EventWriter

# -- exchange ----------------------------------------------------------------------------------------------------------
#
# Publishing with answers: one inbox subscription takes all of them, one timer drives every wait.
#
# nats-py's ``publish_async`` never resolves on an error answer and leaks its slots (nats.py #985), and ``request``
# costs a timer and an inbox each. Here a token of an answer's subject leads to the call that waits for it.

#: the same message id is being stored just now
DUPLICATE_IN_FLIGHT = 10158
#: an atomic batch holds a message id that the stream knows, or one of them twice: nothing of it was stored
BATCH_HAS_DUPLICATE = 10201
#: an atomic batch lost its beginning in a change of leaders, or the stream has as many batches under way as it takes
_BATCH_LATER = frozenset({10176, 10210})

#: generic failure to store; its text tells a stream at its limit from anything else
_STORE_FAILED = 10077
#: the account's or the server's storage is used up
_NO_STORAGE = frozenset({10002, 10047})
#: an attempt without an answer is repeated after this; each further one waits twice as long, seconds
ATTEMPT_SECONDS = 1.0
#: pause after "not now"; each further one is twice as long, up to the second value, seconds
PAUSE_SECONDS = (0.05, 0.4)
#: how finely time is measured, seconds
TICK_SECONDS = 0.025
#: how long the broker may take to confirm the subscription, seconds
HEARING_SECONDS = 1.0
#: more than headers ever take: only messages that come closer to the server's limit are measured exactly, bytes
ROOM_BYTES = 64 * 2**10


# -- Messages as the NATS protocol writes them, many at a time
#
# nats-py's ``publish`` takes some 10 µs a message, most of it for looking at headers that are ours and for waking up
# its writer. A batch of 1,000 is written here into a few blocks.


@dataclass(frozen=True, slots=True)
class Again:
    """The message was not stored, or nobody knows, and may be sent again with the same id.

    Attributes:
        reason: for operators.
        err_code: the broker's, or 0.
    """

    reason: str
    err_code: int = 0


def read_ack(data: bytes, headers: Mapping[str, str] | None, stream: str) -> Appended | Again:
    """Return what the answer says about the message.

    Args:
        data: body of the answer.
        headers: of the answer, or None; a status is there when nobody took the message.
        stream: that must have stored it.

    Raises LogFullError: the stream is at its limit; LogRefusedError: the broker refuses for good, or another stream or
    service answered.
    """
    ack = _read(data, headers, stream)
    return ack if isinstance(ack, Again) else Appended(int(ack["seq"]), bool(ack.get("duplicate", False)))


def read_batch_ack(data: bytes, headers: Mapping[str, str] | None, stream: str, count: int) -> list[Appended] | Again:
    """Return what the answer to the last message of an atomic batch of *count* says about all of them (ADR-50).

    The broker names the last position; those before it are consecutive, whatever others publish meanwhile. An
    :class:`Again` with the code :data:`BATCH_HAS_DUPLICATE` is about the messages: the same batch would get it again.

    Raises LogFullError, LogRefusedError: as of :func:`read_ack`; nothing of the batch was stored.
    """
    ack = _read(data, headers, stream)
    if isinstance(ack, Again):
        return ack
    if ack.get("count") != count:
        raise LogRefusedError(f"the broker stored {ack.get('count')!r} messages of a batch of {count}")
    last = int(ack["seq"])
    return [Appended(sequence, duplicate=False) for sequence in range(last - count + 1, last + 1)]


def _read(data: bytes, headers: Mapping[str, str] | None, stream: str) -> dict[str, Any] | Again:
    if headers is not None and "Status" in headers:
        return Again(f"no node leads the stream just now (status {headers['Status']})")
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


def _read_error(error: Mapping[str, object]) -> Again:
    code, err_code = int(str(error.get("code", 0))), int(str(error.get("err_code", 0)))
    text = f"{error.get('description', 'no description')} (err_code {err_code})"
    if err_code in _NO_STORAGE or (err_code == _STORE_FAILED and "maximum" in text):
        raise LogFullError(f"the stream is full: {text}")
    if is_transient(code, err_code) or err_code in _BATCH_LATER or err_code == BATCH_HAS_DUPLICATE:
        return Again(text, err_code)
    raise LogRefusedError(f"the broker refuses the message: {text}")


def hpub(subject: str, reply_to: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return the bytes that publish *body* with *headers*, an answer going to *reply_to*, or none when that is empty.

    Raises ValueError: subject or headers hold what would end their line, or other than ASCII.
    """
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if head.count("\n") != len(headers) or " " in subject or "\n" in subject:
        raise ValueError("a subject has no blanks, a header no line breaks")
    block = f"NATS/1.0\r\n{head}\r\n".encode("ascii")
    line = f"HPUB {subject} {reply_to} {len(block)} {len(block) + len(body)}\r\n".encode("ascii")
    return b"".join((line, block, body, b"\r\n"))


async def write(nc: Client, block: bytes, messages: int) -> None:
    """Write *messages* messages, which :func:`hpub` made a *block* of, as :meth:`Client.publish` writes one."""
    nc.stats["out_msgs"] += messages
    nc.stats["out_bytes"] += len(block)
    await nc._send_command(block)
    if nc._flush_queue is not None and nc._flush_queue.empty():
        await nc._flush_pending()


@dataclass(slots=True, eq=False)
class Slot:
    """One call in flight.

    Attributes:
        subject: that it publishes on, or one of them: a refusal of it ends the call.
        token: last part of the subject of its answers.
        reply_to: subject of its answers.
        answer: where its next answer goes.
        due: when it stops waiting for that, on the loop's clock; never while it does not wait.
    """

    subject: str
    token: str
    reply_to: str
    answer: asyncio.Future[Received | None]
    due: float = math.inf


class Exchange:
    """Messages out, answers in."""

    def __init__(self, nc: Connection, on_tick: Callable[[], None] = lambda: None) -> None:
        """Make it on the connection *nc*, which stays the caller's to close; :meth:`start` must follow.

        Args:
            nc: the connection.
            on_tick: called every :data:`TICK_SECONDS` while calls are open.
        """
        self._on_tick = on_tick
        self._nc = nc
        self._slots: dict[str, Slot] = {}
        self._tokens = (f"{number:x}" for number in itertools.count())
        self._prefix = ""
        self._subscription: Subscription | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.Future[None] | None = None
        self._deafen: Callable[[], None] = lambda: None

    @property
    def in_flight(self) -> int:
        """Calls that are open just now."""
        return len(self._slots)

    @property
    def backed_up(self) -> int:
        """Bytes that wait to be sent."""
        return self._nc.pending_data_size

    async def start(self) -> None:
        """Subscribe to the answers. Raises LogForbiddenError: the user of the connection may not hear them."""
        self._prefix = f"{self._nc.new_inbox()}."
        self._deafen = self._nc.listen(self._when_refused)
        self._subscription = await self._nc.subscribe_directly(f"{self._prefix}*", self._take_answer)
        await self._nc.confirm_hearing(timeout=HEARING_SECONDS)

    async def close(self, *, grace: float) -> None:
        """Open no more calls, let what is in flight end for *grace* seconds, then fail the rest. Idempotent."""
        if self._closing is None:
            self._closing = self._loop.create_future()
            if self._slots:
                await asyncio.wait([self._closing], timeout=grace)
        for slot in self._slots.values():
            if not slot.answer.done():
                slot.answer.set_exception(LogUnavailableError("the publisher was closed before the broker answered"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._deafen()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._nc.unsubscribe_directly(subscription)

    # -- calls --------------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Check that a call may begin.

        Raises LogUnavailableError: it is not started, or being closed; nothing was sent; LogForbiddenError: the user of
        the connection may not hear answers.
        """
        if self._subscription is None or self._closing is not None:
            raise LogUnavailableError("the publisher is not open: nothing was sent")
        self._nc.check_hearing()

    def check_size(self, body: bytes, headers: dict[str, str], *, more: int = 0) -> None:
        """Check that the server takes such a message: nats-py looks at the body alone, and the server ends the
        connection of whoever exceeds the sum.

        Raises LogRefusedError: it does not.
        """
        limit = self._nc.max_payload - more
        if len(body) + ROOM_BYTES > limit and len(body) + headers_bytes(headers) > limit:
            raise LogRefusedError(f"a message of {len(body)} bytes and headers exceeds the server's limit, {limit}")

    def open(self, subject: str) -> Slot:
        """Begin a call; :meth:`release` must follow."""
        token = next(self._tokens)
        slot = self._slots[token] = Slot(subject, token, self._prefix + token, self._loop.create_future())
        return slot

    def release(self, slot: Slot) -> None:
        """End a call."""
        del self._slots[slot.token]
        if self._closing is not None and not self._slots and not self._closing.done():
            self._closing.set_result(None)

    async def send(self, subject: str, body: bytes, headers: dict[str, str], reply_to: str = "") -> Again | None:
        """Hand a message to the connection without ever waiting for it; return why not, when it was not.

        Raises LogUnavailableError: the connection or the exchange was closed; LogRefusedError: no such message can be
        published.
        """
        try:
            message = hpub(subject, reply_to, headers, body)
        except ValueError as error:
            raise LogRefusedError(f"the message cannot be published: {type(error).__name__}") from error
        return await self.send_block(message, 1)

    async def send_block(self, block: bytes, messages: int) -> Again | None:
        """Hand over many *messages*, written by :func:`hpub`, as :meth:`send` does.

        Raises LogUnavailableError: the connection or the exchange was closed.
        """
        if (not_now := self._why_not(len(block))) is not None:
            return not_now
        try:
            await write(self._nc, block, messages)
        except (nats.errors.Error, OSError) as error:
            return Again(f"the connection to the log failed: {type(error).__name__}")
        return None

    def _why_not(self, size: int) -> Again | None:
        nc = self._nc
        if nc.is_closed or self._subscription is None:
            raise LogUnavailableError("the connection to the log, or the publisher, was closed")
        if not nc.is_connected:
            return Again("no connection to the log")
        if nc.pending_data_size + size > PENDING_BYTES // 2:
            return Again("the connection to the log is congested")  # above PENDING_BYTES, publish() would block
        return None

    async def answer(self, slot: Slot, end: float, seconds: float) -> Received | None:
        """Wait for the next answer, or None after *seconds* or at *end*; ready for the one after it."""
        slot.due = min(self._loop.time() + seconds, end)
        if self._timer is None:
            self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        answer = await slot.answer
        slot.answer, slot.due = self._loop.create_future(), math.inf
        return answer

    # -- what happens to them -----------------------------------------------------------------------------------------

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


def headers_bytes(headers: dict[str, str]) -> int:
    """Return what *headers* take on the wire: ``NATS/1.0``, a line each and an empty one."""
    return len("NATS/1.0\r\n\r\n") + sum(len(key) + len(value.encode()) + 4 for key, value in headers.items())


def waits() -> Iterator[tuple[float, float]]:
    """Yield for each attempt how long to wait for its answer, and how long to pause after "not now", seconds."""
    patience = ATTEMPT_SECONDS
    for pause in backoff(*PAUSE_SECONDS):
        yield patience, pause
        patience *= 2


#: most messages of an atomic batch: the broker's limit
MAX_BATCH = 1000
#: batches of one process under way at once; the broker takes 50 of one stream from all of them, others wait here
MAX_BATCHES_UNDER_WAY = 8

#: headers of a message of a batch; the last one is on the last message only
BATCH_ID_HEADER = "Nats-Batch-Id"
BATCH_SEQUENCE_HEADER = "Nats-Batch-Sequence"
BATCH_COMMIT_HEADER = "Nats-Batch-Commit"

#: messages of a batch are written together up to this size, bytes
_BLOCK_BYTES = 128 * 2**10
#: while more waits to be sent, a batch holds its next messages back: single events must find room, bytes
_BACKED_UP_BYTES = 2**20
#: how often it is looked whether there is room again, seconds
_ROOM_SECONDS = 0.005
#: a batch takes the cluster longer than one event, and sending it again in vain costs all of it: each attempt gets so
#: many times the patience with one event
_PATIENCE = 3.0
#: events of one batch that are on their way at the same time
MAX_SINGLES = 64
#: share of the time that is left in which it is asked which events are known
_ASKING = 0.25

#: what an answer of the broker says
Outcome = TypeVar("Outcome")
#: publishes one event until a moment on the loop's clock
AppendOne = Callable[[Event, float], Awaitable[Appended]]
#: stores a batch until a moment on the loop's clock, or tells by None that the stream knows one of its events
AppendAtOnce = Callable[[Sequence[Event], float], Awaitable[list[Appended] | None]]
#: says which ids of a consultation are stored: :meth:`services.log.protocol.EventReader.known`
AskKnown = Callable[[str, Collection[UUID]], Awaitable[set[UUID]]]
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

    def __init__(self, nc: Connection, *, deadline: float, max_in_flight: int, known: AskKnown | None = None) -> None:
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
        """Store *event*; see :meth:`services.log.protocol.EventWriter.append`.

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
        """Store *events* in atomic batches; see :meth:`services.log.protocol.EventWriter.append_batch`.

        The deadline is for all of them; the limit of what is in flight does not count them.
        """
        return await self._batches.append(events)

    async def publish(self, subject: str, body: bytes, headers: dict[str, str]) -> Appended:
        """Store a message of any kind; *headers* must hold a ``Nats-Msg-Id`` and be ASCII.

        Raises LogFullError: the stream is at its limit; nothing was stored; LogUnavailableError: no answer within the
        deadline, or the publisher is being closed; the message may or may not be stored, and publishing it again with
        the same id is safe; DuplicateInFlightError: until the deadline, somebody else was storing the same message id;
        TooManyInFlightError: this publisher has its limit under way; nothing was sent; LogRefusedError: the broker
        refuses for good, or the message is too large for it; LogForbiddenError: the user of the connection may not
        publish on *subject*.
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
        if group:
            self._under_way += 1
            spawn(self._tasks, self._store_one(group[0]) if len(group) == 1 else self._store_all(group))

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
            stored = await self._batches.once([one.event for one in group], min(one.end for one in group))
        except Exception as error:  # noqa: BLE001 - raised where each event is waited for
            for one in group:
                _end(one, error)
        else:
            if stored is not None:
                for one, appended in zip(group, stored, strict=True):
                    _end(one, appended)
                return
            self.retries += 1
            self._under_way += len(group)
            for one in group:
                spawn(self._tasks, self._store_one(one, tried=True))
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

    async def _append_by(self, event: Event, end: float, *, unanswered: bool = False) -> Appended:
        """Store one event until *end*, on the loop's clock; *unanswered*: an attempt of ours was before."""
        subject = subject_of(event.consultation)
        message = _Message(subject, event.body, event.headers(), stream_of(subject))
        return await self._publish(message, end, unanswered=unanswered)

    async def _publish(self, message: _Message, end: float, *, unanswered: bool = False) -> Appended:
        exchange = self._exchange
        exchange.check_size(message.body, message.headers)
        slot = exchange.open(message.subject)
        try:
            return await _delivered(
                exchange,
                slot,
                end,
                send=lambda: exchange.send(message.subject, message.body, message.headers, slot.reply_to),
                read=lambda answer: read_ack(answer.data, answer.headers, message.stream),
                what="message",
                deadline=self._deadline,
                unanswered=unanswered,
                on_retry=self._count_retry,
            )
        finally:
            exchange.release(slot)

    def _count_retry(self) -> None:
        self.retries += 1


async def _delivered(
    exchange: Exchange,
    slot: Slot,
    end: float,
    *,
    send: Callable[[], Awaitable[Again | None]],
    read: Callable[[Received], Outcome | Again],
    what: str,
    deadline: float,
    patience: float = 1.0,
    unanswered: bool = False,
    on_retry: Callable[[], None] = lambda: None,
) -> Outcome:
    """Send until an answer says what became of it, or until *end*.

    Args:
        exchange: hears the answers.
        slot: of this call.
        end: on the loop's clock.
        send: sends it, or tells why not.
        read: what an answer says.
        what: it is, and *deadline*, how long it had, seconds: for the message of an error.
        patience: how many times the patience with one event an attempt gets.
        unanswered: whether an earlier attempt of ours may be under way still.
        on_retry: called before each attempt behind the first.

    Raises LogUnavailableError: nothing said so; DuplicateInFlightError: somebody else was storing it; what *read* and
    *send* raise.
    """
    trouble = Again("no answer")
    for seconds, pause in waits():
        not_sent = await send()
        answer = await exchange.answer(slot, end, patience * seconds if not_sent is None else pause)
        if answer is None:
            trouble = not_sent or Again(f"no answer within {deadline:g} s")
            unanswered = unanswered or not_sent is None
        while answer is not None:
            outcome = read(answer)
            if not isinstance(outcome, Again):
                return outcome
            trouble = outcome
            answer = await exchange.answer(slot, end, pause)  # an earlier attempt's may still come
        if asyncio.get_running_loop().time() >= end:
            break
        on_retry()
    if trouble.err_code == DUPLICATE_IN_FLIGHT and not unanswered:
        raise DuplicateInFlightError(trouble.reason)
    raise LogUnavailableError(f"the log did not take the {what} within {deadline:g} s: {trouble.reason}")


def _end(one: _Gathered, outcome: Appended | Exception) -> None:
    if one.stored.done():  # its caller has gone
        return
    if isinstance(outcome, Appended):
        one.stored.set_result(outcome)
    else:
        one.stored.set_exception(outcome)


# -- Atomic batches (ADR-50): many events with one acknowledgement, stored at once or not at all ---------------------
#
# A batch is measured faster than its events one by one, because it waits for the quorum once. The broker refuses one
# that holds a message id which it knows: a retry, as a rule, of all of its events. Then its events are published one
# by one, and the broker says of each whether it is new. Two new ones of one consultation are never on their way at the
# same time: an election between them would change their order. Those that are known to be stored have their places, so
# nothing waits for them: without that, a retry of a large batch would need as many round trips as it has events, and
# never end within the deadline.


class Batches:
    """Appends batches through an exchange."""

    def __init__(
        self, exchange: Exchange, *, deadline: float, append: AppendOne, known: AskKnown | None = None
    ) -> None:
        """Make it.

        Args:
            exchange: sends and hears.
            deadline: seconds for one batch, waiting for its turn included.
            append: publishes one event, for batches that hold known ones.
            known: says which of those are known; None when that cannot be asked.
        """
        self._exchange = exchange
        self._deadline = deadline
        self._partly_known = PartlyKnown(append, self._at_once, known)
        self._turns = asyncio.Semaphore(MAX_BATCHES_UNDER_WAY)
        self._loop = asyncio.get_running_loop()

    async def append(self, events: Sequence[Event]) -> list[Appended]:
        """Store *events*, at most :data:`MAX_BATCH` with message ids of their own; see the protocol's EventWriter."""
        if not 0 < len(events) <= MAX_BATCH:
            raise ValueError(f"a batch is 1 to {MAX_BATCH} events, not {len(events)}")
        self._exchange.check_open()
        end = self._loop.time() + self._deadline
        try:
            async with asyncio.timeout_at(end):
                await self._turns.acquire()
        except TimeoutError:
            raise LogUnavailableError(
                f"{MAX_BATCHES_UNDER_WAY} batches were under way for all of {self._deadline:g} s"
            ) from None
        try:
            if len(events) > 1 and (stored := await self._at_once(events, end)) is not None:
                return stored
            return await self._partly_known.store(events, end)
        finally:
            self._turns.release()

    async def once(self, events: Sequence[Event], end: float) -> list[Appended] | None:
        """Try once, until *end* at most, to store *events*, two at least, as a batch; None: it failed, or nobody knows.

        Raises LogFullError, LogRefusedError: nothing of it was stored.
        """
        slot = self._exchange.open(subject_of(events[0].consultation))
        try:
            end = min(end, self._loop.time() + _PATIENCE * ATTEMPT_SECONDS)
            if await self._send(events, slot, end) is not None:
                return None
            answer = await self._exchange.answer(slot, end, _PATIENCE * ATTEMPT_SECONDS)
            if answer is None:
                return None
            outcome = read_batch_ack(answer.data, answer.headers, STREAM, len(events))
            return None if isinstance(outcome, Again) else outcome
        finally:
            self._exchange.release(slot)

    # -- at once ------------------------------------------------------------------------------------------------------

    async def _at_once(self, events: Sequence[Event], end: float) -> list[Appended] | None:
        """Store *events* as an atomic batch, or return None when the stream knows one of them."""
        longest = max(events, key=lambda event: len(event.body))
        self._exchange.check_size(longest.body, longest.headers() | _headers("0" * 32, MAX_BATCH, last=True))
        slot = self._exchange.open(subject_of(events[0].consultation))

        def read(answer: Received) -> list[Appended] | Again | None:
            outcome = read_batch_ack(answer.data, answer.headers, STREAM, len(events))
            has_known = isinstance(outcome, Again) and outcome.err_code == BATCH_HAS_DUPLICATE
            return None if has_known else outcome

        try:
            return await _delivered(
                self._exchange,
                slot,
                end,
                send=lambda: self._send(events, slot, end),
                read=read,
                what="batch",
                deadline=self._deadline,
                patience=_PATIENCE,
            )
        finally:
            self._exchange.release(slot)

    async def _send(self, events: Sequence[Event], slot: Slot, end: float) -> Again | None:
        """Send *events* under a new batch id; only the last one asks for an answer, which is about all of them."""
        batch, count = os.urandom(16).hex(), len(events)
        block: list[bytes] = []
        size = 0
        for number, event in enumerate(events, start=1):
            last = number == count
            headers = event.headers() | _headers(batch, number, last=last)
            message = hpub(subject_of(event.consultation), slot.reply_to if last else "", headers, event.body)
            block.append(message)
            size += len(message)
            if last or size >= _BLOCK_BYTES:
                not_sent = await self._send_block(block, end)
                if not_sent is not None:
                    return not_sent  # what the broker got of the batch it forgets within seconds
                block, size = [], 0
        return None

    async def _send_block(self, block: list[bytes], end: float) -> Again | None:
        while self._exchange.backed_up > _BACKED_UP_BYTES:
            if self._loop.time() >= end:
                return Again("the connection to the log is congested")
            await asyncio.sleep(_ROOM_SECONDS)
        return await self._exchange.send_block(b"".join(block), len(block))


def _headers(batch: str, number: int, *, last: bool) -> dict[str, str]:
    headers = {BATCH_ID_HEADER: batch, BATCH_SEQUENCE_HEADER: str(number)}
    if last:
        headers[BATCH_COMMIT_HEADER] = "1"
    return headers


# -- batches of which the broker knows some events ---------------------------------------------------------------------


class PartlyKnown:
    """Stores such batches.

    Args:
        append: publishes one event.
        at_once: stores several.
        known: says which are known; None when that cannot be asked.
    """

    def __init__(self, append: AppendOne, at_once: AppendAtOnce, known: AskKnown | None) -> None:
        self._append = append
        self._at_once = at_once
        self._ask_known = known

    async def store(self, events: Sequence[Event], end: float) -> list[Appended]:
        """Store *events*, one at least, until *end* on the loop's clock; those of a consultation in their order.

        Raises Exception: as ``append``; the first one, when all that could be stored is.
        """
        run = _Run(events, end)
        known = await self._known(events, end)
        await run.lanes(self._append, ([number] for number in known))
        rest = run.left()
        if known and len(rest) > 1:
            stored = await self._at_once([events[number] for number in rest], end)
            run.found.update(zip(rest, stored or (), strict=stored is not None))
        of_each: dict[str, list[int]] = {}
        for number in run.left():
            of_each.setdefault(events[number].consultation, []).append(number)
        await run.lanes(self._append, of_each.values())
        return [run.found[number] for number in range(len(events))]

    async def _known(self, events: Sequence[Event], end: float) -> list[int]:
        """Return the numbers of events that are stored for certain; the others may be, too."""
        if self._ask_known is None:
            return []
        of_each: dict[str, list[UUID]] = {}
        for event in events:
            of_each.setdefault(event.consultation, []).append(event.event_id)
        known: set[tuple[str, UUID]] = set()
        now = asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(now + _ASKING * (end - now)):
                await asyncio.gather(*(self._ask(self._ask_known, name, ids, known) for name, ids in of_each.items()))
        return [number for number, event in enumerate(events) if (event.consultation, event.event_id) in known]

    async def _ask(self, ask: AskKnown, consultation: str, ids: Sequence[UUID], known: set[tuple[str, UUID]]) -> None:
        # what cannot be asked is stored in order, as if it were new
        with contextlib.suppress(CorpusAwayError, LogUnavailableError, LogRefusedError):
            known.update((consultation, event_id) for event_id in await ask(consultation, ids))


class _Run:
    """One batch on its way."""

    def __init__(self, events: Sequence[Event], end: float) -> None:
        self.found: dict[int, Appended] = {}
        self._events = events
        self._end = end

    def left(self) -> list[int]:
        """Return the numbers of the events that are not stored yet."""
        return [number for number in range(len(self._events)) if number not in self.found]

    async def lanes(self, append: AppendOne, lanes: Iterable[Sequence[int]]) -> None:
        """Store the events with the numbers of each lane one after the other, lanes side by side.

        One that fails ends its lane, since it may still be stored, and what came behind it would stand before it. The
        others are stored all the same; then the first failure is raised.
        """
        failures: dict[int, Exception] = {}
        waiting = iter(lanes)

        async def work() -> None:
            for lane in waiting:
                for number in lane:
                    try:
                        self.found[number] = await append(self._events[number], self._end)
                    except Exception as error:  # noqa: BLE001  # raised below, when the others are done
                        failures[number] = error
                        break

        async with asyncio.TaskGroup() as group:
            for _ in range(min(MAX_SINGLES, len(self._events))):
                group.create_task(work())
        if failures:
            raise failures[min(failures)]
