"""Asks the persisters what the corpus holds: one question at a time for the ids of a partition, with all that came."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from uuid import UUID

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.contract.lifecycle import cancellable
from services.eventlog.errors import CorpusAwayError, LogRefusedError, LogUnavailableError
from services.eventlog.jetstream import reading_wire as wire
from services.eventlog.jetstream.names import corpus_subject
from services.eventlog.jetstream.reading_wire import (
    KIND_OF,
    Consultations,
    ConsultationsAnswer,
    Events,
    EventsAnswer,
    Find,
    MalformedError,
    Question,
    Row,
)
from services.eventlog.partitions import partition_name

#: pause before a question is asked again that could not be answered just then; doubles up to the second, seconds
_PAUSE_SECONDS = (0.01, 0.2)


@dataclass(frozen=True, slots=True)
class Found:
    """What the corpus says of one id: its row, or None, as of the stream sequence *committed*."""

    row: Row | None
    committed: int


class _TooLargeError(LogRefusedError):
    """Raised when an event that was asked for is larger than the broker takes."""


class _Call:
    """Somebody who waits for what the corpus says of some ids of a consultation."""

    __slots__ = ("_left", "committed", "future", "rows")

    def __init__(self, count: int) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.rows: dict[UUID, Row] = {}
        self.committed = sys.maxsize
        self._left = count

    def tell(self, event_id: UUID, row: Row | None, committed: int) -> None:
        """Note the answer about one of the ids; the last one ends the call."""
        if row is not None:
            self.rows[event_id] = row
        self.committed = min(self.committed, committed)
        self._left -= 1
        if not self._left and not self.future.done():
            self.future.set_result(None)

    def fail(self, error: Exception) -> None:
        """End the call with *error*."""
        if not self.future.done():
            self.future.set_exception(error)


#: a consultation and an event's id; and who waits for what
Pair = tuple[str, UUID]
Waiting = dict[Pair, list[_Call]]


@dataclass(slots=True)
class _Asked:
    """Ids of one partition: those that wait for the next question, and who asks."""

    waiting: Waiting = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class CorpusReading:
    """The persisters of one store.

    Args:
        nc: the connection.
        store: its name.
        timeout: seconds for each answer, questions that are asked again included.
    """

    def __init__(self, nc: Client, store: str, *, timeout: float) -> None:
        self._nc = nc
        self._store = store
        self._timeout = timeout
        self._asked: dict[int, _Asked] = {}

    async def events(self, partition: int, question: Events) -> EventsAnswer:
        """Return a page of events.

        Raises:
            CorpusAwayError: nobody answers, or not in time.
            LogUnavailableError: there is no connection.
            LogRefusedError: an event is larger than the broker takes, or the user may not ask.
        """
        answer = await self._ask(partition, question)
        try:
            return wire.decode_events(answer)
        except MalformedError:
            raise self._away(partition, "its answer is malformed") from None

    async def consultations(self, partition: int, question: Consultations) -> ConsultationsAnswer:
        """Return a page of names; raises as :meth:`events` does."""
        answer = await self._ask(partition, question)
        try:
            return wire.decode_consultations(answer)
        except MalformedError:
            raise self._away(partition, "its answer is malformed") from None

    async def find(self, partition: int, consultation: str, event_id: UUID) -> Found:
        """Return what the corpus says of *event_id*; raises as :meth:`events` does."""
        rows, committed = await self.find_all(partition, consultation, [event_id])
        return Found(rows.get(event_id), committed)

    async def find_all(
        self, partition: int, consultation: str, event_ids: Collection[UUID]
    ) -> tuple[dict[UUID, Row], int]:
        """Return the rows of those of *event_ids* that are held, and the sequence as of which the others are not.

        While a question of the partition is under way, all that is to be found is gathered for the next one.
        """
        asked = self._asked.setdefault(partition, _Asked())
        wanted = set(event_ids)
        call = _Call(len(wanted))
        for event_id in wanted:
            asked.waiting.setdefault((consultation, event_id), []).append(call)
        if asked.task is None:
            asked.task = asyncio.create_task(self._find_all(partition, asked))
        await call.future
        return call.rows, call.committed

    async def _find_all(self, partition: int, asked: _Asked) -> None:
        try:
            while asked.waiting:
                taken = {pair: asked.waiting.pop(pair) for pair in list(asked.waiting)[: wire.MAX_ITEMS]}
                try:
                    rest = await self._find_part(partition, taken)
                except BaseException:
                    _fail(taken, self._away(partition, "the question was given up"))
                    raise
                for pair, calls in rest.items():
                    asked.waiting.setdefault(pair, []).extend(calls)
        finally:
            asked.task = None
            _fail(asked.waiting, self._away(partition, "the question was given up"))
            asked.waiting.clear()

    async def _find_part(self, partition: int, part: Waiting) -> Waiting:
        """Ask for *part*, tell those who wait for it, and return what is to be asked again."""
        try:
            return await self._find_some(partition, part)
        except _TooLargeError as error:
            if len(part) == 1:
                _fail(part, error)
                return {}
        except (CorpusAwayError, LogUnavailableError, LogRefusedError) as error:
            _fail(part, error)
            return {}
        # one of them is too large, and must not fail the others
        pairs, rest = list(part), Waiting()
        for half in (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]):
            rest |= await self._find_part(partition, {pair: part[pair] for pair in half})
        return rest

    async def _find_some(self, partition: int, part: Waiting) -> Waiting:
        pairs = list(part)
        question = Find(pairs)
        try:
            answer = wire.decode_found(question, await self._ask(partition, question))
        except MalformedError:
            raise self._away(partition, "its answer is malformed") from None
        rest = set(answer.rest)
        if len(rest) == len(pairs):
            raise self._away(partition, "it answers nothing")
        for index, pair in enumerate(pairs):
            if index not in rest:
                for call in part[pair]:
                    call.tell(pair[1], answer.found.get(index), answer.committed)
        return {pairs[index]: part[pairs[index]] for index in rest}

    async def _ask(self, partition: int, question: Question) -> bytes:
        subject = corpus_subject(self._store, partition, KIND_OF[type(question)])
        end = time.monotonic() + self._timeout
        for pause in _pauses():
            left = end - time.monotonic()
            if left <= 0:
                break
            message = await self._request(partition, subject, wire.encode_question(question, left), left)
            code = (message.headers or {}).get(wire.ERROR_CODE_HEADER)
            if code is None:
                return bytes(message.data)
            self._check(partition, int(code))
            await asyncio.sleep(pause)
        raise self._away(partition, f"no answer within {self._timeout:g} s")

    async def _request(self, partition: int, subject: str, data: bytes, within: float) -> Msg:
        try:
            return await cancellable(self._nc.request(subject, data, timeout=within))
        except nats.errors.NoRespondersError:
            raise self._away(partition, "nobody has it open") from None
        except TimeoutError:
            raise self._away(partition, f"no answer within {self._timeout:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailableError(f"{subject}: {type(error).__name__}") from error

    def _check(self, partition: int, code: int) -> None:
        """Raise what an error *code* stands for, unless asking again may help."""
        if code == wire.NOT_NOW:
            return
        if code == wire.TOO_LARGE:
            raise _TooLargeError(
                f"partition {partition_name(partition)} holds an event larger than the broker's max_payload"
            )
        if code == wire.MALFORMED:
            raise LogRefusedError("the persister does not understand the question: is it of another version?")
        raise self._away(partition, "its file cannot be read; the persister's log says why")

    def _away(self, partition: int, reason: str) -> CorpusAwayError:
        return CorpusAwayError(f"partition {partition_name(partition)} of store {self._store}: {reason}")


def _fail(waiting: Waiting, error: Exception) -> None:
    for calls in waiting.values():
        for call in calls:
            call.fail(error)


def _pauses() -> Iterator[float]:
    pause, longest = _PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, longest)
