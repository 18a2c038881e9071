"""Atomic batches (ADR-50): many events with one acknowledgement, stored at once or not at all.

A batch is measured faster than its events one by one, because it waits for the quorum once. The broker refuses one that
holds a message id which it knows: a retry, as a rule, of all of its events. Then its events are published one by one,
and the broker says of each whether it is new. Two new ones of one consultation are never on their way at the same time:
an election between them would change their order. Those that are known to be stored have their places, so nothing waits
for them: without that, a retry of a large batch would need as many round trips as it has events, and never end within
the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from uuid import UUID

from services.contract.event import Event
from services.eventlog.errors import CorpusAwayError, DuplicateInFlightError, LogRefusedError, LogUnavailableError
from services.eventlog.jetstream.exchange import (
    ATTEMPT_SECONDS,
    BATCH_HAS_DUPLICATE,
    DUPLICATE_IN_FLIGHT,
    Again,
    Exchange,
    Slot,
    hpub,
    read_batch_ack,
    waits,
)
from services.eventlog.jetstream.names import STREAM, subject_of
from services.eventlog.protocol import Appended

#: most messages of an atomic batch: the broker's limit
MAX_BATCH = 1000
#: batches of one process under way at once; the broker takes 50 of one stream from all of them, others wait here
MAX_UNDER_WAY = 8

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

#: publishes one event until a moment on the loop's clock
AppendOne = Callable[[Event, float], Awaitable[Appended]]
#: stores a batch until a moment on the loop's clock, or tells by None that the stream knows one of its events
AppendAtOnce = Callable[[Sequence[Event], float], Awaitable[list[Appended] | None]]
#: says which ids of a consultation are stored: :meth:`services.eventlog.protocol.EventReader.known`
AskKnown = Callable[[str, Collection[UUID]], Awaitable[set[UUID]]]


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
        self._turns = asyncio.Semaphore(MAX_UNDER_WAY)
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
                f"{MAX_UNDER_WAY} batches were under way for all of {self._deadline:g} s"
            ) from None
        try:
            if len(events) > 1 and (stored := await self._at_once(events, end)) is not None:
                return stored
            return await self._partly_known.store(events, end)
        finally:
            self._turns.release()

    async def once(self, events: Sequence[Event]) -> list[Appended] | None:
        """Try once to store *events*, two at least, as an atomic batch; None when it did not work, or nobody knows.

        Raises:
            LogFullError, LogRefusedError: nothing of it was stored.
        """
        slot = self._exchange.open(subject_of(events[0].consultation))
        try:
            end = self._loop.time() + _PATIENCE * ATTEMPT_SECONDS
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
        try:
            return await self._deliver(events, slot, end)
        finally:
            self._exchange.release(slot)

    async def _deliver(self, events: Sequence[Event], slot: Slot, end: float) -> list[Appended] | None:
        trouble, unanswered = Again("no answer"), False
        for patience, pause in waits():
            not_sent = await self._send(events, slot, end)
            answer = await self._exchange.answer(slot, end, _PATIENCE * patience if not_sent is None else pause)
            if answer is None:
                trouble = not_sent or Again(f"no answer within {self._deadline:g} s")
                unanswered = unanswered or not_sent is None
            while answer is not None:
                outcome = read_batch_ack(answer.data, answer.headers, STREAM, len(events))
                if not isinstance(outcome, Again):
                    return outcome
                if outcome.err_code == BATCH_HAS_DUPLICATE:
                    return None
                trouble = outcome
                answer = await self._exchange.answer(slot, end, pause)  # an earlier attempt's may still come
            if self._loop.time() >= end:
                break
        if trouble.err_code == DUPLICATE_IN_FLIGHT and not unanswered:
            raise DuplicateInFlightError(trouble.reason)
        raise LogUnavailableError(f"the log did not take the batch within {self._deadline:g} s: {trouble.reason}")

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

        Raises:
            Exception: as ``append``; the first one, when all that could be stored is.
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
