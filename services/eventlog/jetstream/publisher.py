"""Publishes events and waits for the broker's acknowledgement, within a deadline and a bound on what is in flight.

Every retry carries the same message id, so the broker stores a message once however often it is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from nats.aio.client import Client

from services.contract.event import Event
from services.eventlog.errors import DuplicateInFlightError, LogUnavailableError, TooManyInFlightError
from services.eventlog.jetstream.acks import DUPLICATE_IN_FLIGHT, Again, read_ack
from services.eventlog.jetstream.batches import AskKnown, Batches
from services.eventlog.jetstream.exchange import Exchange, Slot, waits
from services.eventlog.jetstream.names import stream_of, subject_of
from services.eventlog.protocol import Appended, EventWriter

#: what is in flight gets this long when the publisher is closed, seconds
CLOSE_GRACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class _Message:
    subject: str
    body: bytes
    headers: dict[str, str]
    stream: str


class Publisher(EventWriter):
    """The appending side of the log.

    Attributes:
        retries: attempts behind the first, over all calls, since the start.
    """

    def __init__(self, nc: Client, *, deadline: float, max_in_flight: int, known: AskKnown | None = None) -> None:
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
        self._exchange = Exchange(nc)
        self._batches = Batches(self._exchange, deadline=deadline, append=self._append_by, known=known)
        self._loop = asyncio.get_running_loop()

    @property
    def in_flight(self) -> int:
        """Single appends under way just now."""
        return self._in_flight

    async def start(self) -> None:
        """Subscribe to the answers.

        Raises:
            LogForbiddenError: the user of the connection may not hear them.
        """
        await self._exchange.start()

    async def append(self, event: Event) -> Appended:
        """Store *event*; see :meth:`services.eventlog.protocol.EventWriter.append`.

        ``duplicate`` is the broker's word: it is also true when an attempt of this very call was stored although its
        answer did not come back.
        """
        return await self.publish(subject_of(event.consultation), event.body, event.headers())

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
        self._exchange.check_open()
        if self._in_flight >= self._max_in_flight:
            raise TooManyInFlightError(f"{self._max_in_flight} appends are under way, nothing was sent")
        self._in_flight += 1
        try:
            return await self._publish(_Message(subject, body, headers, stream_of(subject)), self._end())
        finally:
            self._in_flight -= 1

    async def close(self, *, grace: float = CLOSE_GRACE_SECONDS) -> None:
        """Take no more, let what is in flight end for *grace* seconds, then fail the rest. Idempotent."""
        await self._exchange.close(grace=grace)

    # -- one call -----------------------------------------------------------------------------------------------------

    def _end(self) -> float:
        return self._loop.time() + self._deadline

    async def _append_by(self, event: Event, end: float) -> Appended:
        """Store one event of a batch until *end*, on the loop's clock."""
        subject = subject_of(event.consultation)
        return await self._publish(_Message(subject, event.body, event.headers(), stream_of(subject)), end)

    async def _publish(self, message: _Message, end: float) -> Appended:
        self._exchange.check_size(message.body, message.headers)
        slot = self._exchange.open(message.subject)
        try:
            return await self._deliver(message, slot, end)
        finally:
            self._exchange.release(slot)

    async def _deliver(self, message: _Message, slot: Slot, end: float) -> Appended:
        exchange = self._exchange
        trouble, unanswered = Again("no answer"), False
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
