"""Publishes events and waits for the broker's acknowledgement, within a deadline and a bound on what is in flight.

nats-py's ``publish_async`` never resolves on an error answer and leaks its slots (nats.py #985), and ``request`` costs
a timer and an inbox each. Here one subscription takes all answers, a token of its subject leads to the waiting call,
and one timer for all calls drives retries and deadlines. Every retry carries the same message id, so the broker stores
a message once however often it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from services.contract.event import Event
from services.eventlog.errors import (
    DuplicateInFlightError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from services.eventlog.jetstream.acks import DUPLICATE_IN_FLIGHT, Again, read_ack
from services.eventlog.jetstream.connection import PENDING_BYTES
from services.eventlog.jetstream.names import stream_of, subject_of
from services.eventlog.jetstream.refusals import Refusal, check_hearing, listen, must_hear
from services.eventlog.protocol import Appended, EventWriter

#: an attempt without an answer is repeated after this; each further one waits twice as long, seconds
ATTEMPT_SECONDS = 1.0
#: pause after "not now"; each further one is twice as long, up to the second value, seconds
PAUSE_SECONDS = (0.05, 0.4)
#: how finely time is measured, seconds
TICK_SECONDS = 0.025
#: what is in flight gets this long when the publisher is closed, seconds
CLOSE_GRACE_SECONDS = 2.0

#: more than headers ever take: only messages that come closer to the server's limit are measured exactly, bytes
ROOM_BYTES = 64 * 2**10


@dataclass(slots=True)
class _Slot:
    """One call in flight: its subject, where its next answer goes, and when it stops waiting for one."""

    subject: str
    answer: asyncio.Future[Msg | None]
    due: float


@dataclass(frozen=True, slots=True)
class _Message:
    subject: str
    body: bytes
    headers: dict[str, str]
    reply_to: str
    stream: str


class Publisher(EventWriter):
    """The appending side of the log.

    Attributes:
        retries: attempts behind the first, over all calls, since the start.
    """

    def __init__(self, nc: Client, *, deadline: float, max_in_flight: int) -> None:
        """Make a publisher; :meth:`start` must follow.

        Args:
            nc: the connection; it stays the caller's to close.
            deadline: seconds for each append, retries included.
            max_in_flight: appends under way at once; one more fails at once.
        """
        self.retries = 0
        self._nc = nc
        self._deadline = deadline
        self._max_in_flight = max_in_flight
        self._slots: dict[str, _Slot] = {}
        self._tokens = (f"{number:x}" for number in itertools.count())
        self._prefix = ""
        self._subscription: Subscription | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.Future[None] | None = None
        self._deafen: Callable[[], None] = lambda: None

    @property
    def in_flight(self) -> int:
        """Appends under way just now."""
        return len(self._slots)

    async def start(self) -> None:
        """Subscribe to the answers.

        Raises:
            LogForbiddenError: the user of the connection may not hear them.
        """
        self._prefix = f"{self._nc.new_inbox()}."
        self._deafen = listen(self._nc, self._when_refused)
        self._subscription = await self._nc.subscribe(f"{self._prefix}*", cb=self._take_answer)
        await check_hearing(self._nc, timeout=ATTEMPT_SECONDS)

    async def append(self, event: Event) -> Appended:
        """Store *event*; see :meth:`services.eventlog.protocol.EventWriter.append`.

        ``duplicate`` is the broker's word: it is also true when an attempt of this very call was stored although its
        answer did not come back.
        """
        return await self.publish(subject_of(event.consultation), event.body, event.headers())

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
        self._admit(body, headers)
        token = next(self._tokens)
        message = _Message(subject, body, headers, self._prefix + token, stream_of(subject))
        slot = self._slots[token] = _Slot(subject, self._loop.create_future(), 0.0)
        try:
            return await self._deliver(message, slot)
        finally:
            del self._slots[token]
            if self._closing is not None and not self._slots and not self._closing.done():
                self._closing.set_result(None)

    async def close(self, *, grace: float = CLOSE_GRACE_SECONDS) -> None:
        """Take no more, let what is in flight end for *grace* seconds, then fail the rest. Idempotent."""
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

    # -- one call -----------------------------------------------------------------------------------------------------

    def _admit(self, body: bytes, headers: dict[str, str]) -> None:
        if self._subscription is None or self._closing is not None:
            raise LogUnavailableError("the publisher is not open: nothing was sent")
        must_hear(self._nc)
        if len(self._slots) >= self._max_in_flight:
            raise TooManyInFlightError(f"{self._max_in_flight} appends are under way, nothing was sent")
        # nats-py checks the body alone, and the server ends the connection of whoever exceeds the sum
        limit = self._nc.max_payload
        if len(body) + ROOM_BYTES > limit and len(body) + _headers_bytes(headers) > limit:
            raise LogRefusedError(f"a message of {len(body)} bytes and headers exceeds the server's limit, {limit}")

    async def _deliver(self, message: _Message, slot: _Slot) -> Appended:
        end = self._loop.time() + self._deadline
        trouble, unanswered = Again("no answer"), False
        for patience, pause in _waits():
            not_sent = await self._send(message)
            answer = await self._answer(slot, end, patience if not_sent is None else pause)
            if answer is None:
                trouble = not_sent or Again(f"no answer within {self._deadline:g} s")
                unanswered = unanswered or not_sent is None
            while answer is not None:
                outcome = read_ack(answer.data, answer.headers, message.stream)
                if isinstance(outcome, Appended):
                    return outcome
                trouble = outcome
                answer = await self._answer(slot, end, pause)  # an earlier attempt's may still come
            if self._loop.time() >= end:
                break
            self.retries += 1
        if trouble.err_code == DUPLICATE_IN_FLIGHT and not unanswered:
            raise DuplicateInFlightError(trouble.reason)
        raise LogUnavailableError(f"the log did not take the message within {self._deadline:g} s: {trouble.reason}")

    async def _send(self, message: _Message) -> Again | None:
        """Hand *message* to the connection without ever waiting for it; return why not, when it was not."""
        nc = self._nc
        if nc.is_closed or self._subscription is None:
            raise LogUnavailableError("the connection to the log, or the publisher, was closed")
        if not nc.is_connected:
            return Again("no connection to the log")
        if nc.pending_data_size + len(message.body) > PENDING_BYTES // 2:
            return Again("the connection to the log is congested")  # above PENDING_BYTES, publish() would block
        try:
            await nc.publish(message.subject, message.body, reply=message.reply_to, headers=message.headers)
        except (nats.errors.BadSubjectError, nats.errors.BadHeaderError) as error:
            raise LogRefusedError(f"the message cannot be published: {type(error).__name__}") from error
        except (nats.errors.Error, OSError) as error:
            return Again(f"the connection to the log failed: {type(error).__name__}")
        return None

    # -- answers and time ---------------------------------------------------------------------------------------------

    async def _answer(self, slot: _Slot, end: float, seconds: float) -> Msg | None:
        """Wait for the next answer, or None after *seconds* or at *end*; ready for the one after it."""
        slot.due = min(self._loop.time() + seconds, end)
        if self._timer is None:
            self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        answer = await slot.answer
        slot.answer = self._loop.create_future()
        return answer

    async def _take_answer(self, answer: Msg) -> None:
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
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick) if self._slots else None


def _waits() -> Iterator[tuple[float, float]]:
    """Yield for each attempt how long to wait for its answer, and how long to pause after "not now"."""
    patience, (pause, longest) = ATTEMPT_SECONDS, PAUSE_SECONDS
    while True:
        yield patience, pause
        patience, pause = 2 * patience, min(2 * pause, longest)


def _headers_bytes(headers: dict[str, str]) -> int:
    """Return what *headers* take on the wire: ``NATS/1.0``, a line each and an empty one."""
    return len("NATS/1.0\r\n\r\n") + sum(len(key) + len(value.encode()) + 4 for key, value in headers.items())
