"""Publishing with answers: one inbox subscription takes all of them, one timer drives every wait.

nats-py's ``publish_async`` never resolves on an error answer and leaks its slots (nats.py #985), and ``request`` costs
a timer and an inbox each. Here a token of an answer's subject leads to the call that waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import nats.errors
import orjson
from nats.aio.client import Client

from services.core.retry import backoff
from services.log.errors import LogFullError, LogRefusedError, LogUnavailableError
from services.log.jetstream.api import is_transient
from services.log.jetstream.connection import PENDING_BYTES
from services.log.jetstream.refusals import (
    DirectSubscription,
    Received,
    Refusal,
    TolerantClient,
    check_hearing,
    listen,
    must_hear,
)
from services.log.protocol import Appended

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

    def __init__(self, nc: TolerantClient, on_tick: Callable[[], None] = lambda: None) -> None:
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
        self._subscription: DirectSubscription | None = None
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
        self._deafen = listen(self._nc, self._when_refused)
        self._subscription = await self._nc.subscribe_directly(f"{self._prefix}*", self._take_answer)
        await check_hearing(self._nc, timeout=HEARING_SECONDS)

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
                await subscription.unsubscribe()

    # -- calls --------------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Check that a call may begin.

        Raises LogUnavailableError: it is not started, or being closed; nothing was sent; LogForbiddenError: the user of
        the connection may not hear answers.
        """
        if self._subscription is None or self._closing is not None:
            raise LogUnavailableError("the publisher is not open: nothing was sent")
        must_hear(self._nc)

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
