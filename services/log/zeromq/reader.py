"""Reads events back from the corpus, through the owners of its partitions: no event waits anywhere else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar
from uuid import UUID

from fiq.event import Event
from services.log.errors import CorpusAwayError, LogRefusedError
from services.log.listing import ConsultationLister
from services.log.partitions import partition_name, partition_of
from services.log.protocol import Failure, Page, SequencedEvent
from services.log.questions import (
    KIND_OF,
    MAX_ITEMS,
    ConsultationSummary,
    Events,
    EventsAnswer,
    Find,
    Ids,
    IdSnapshot,
    MalformedError,
    Question,
    Row,
    Stored,
    Verification,
    decode_events,
    decode_found,
    decode_ids,
    decode_verified,
    encode_question,
    verify,
)
from services.log.settings import LogSettings
from services.log.zeromq.links import Links
from services.log.zeromq.wire import CODES

T = TypeVar("T")

#: how long one answer of a persister may take, seconds
_ANSWER_SECONDS = 4.0
#: pause before a question is asked again that could not be answered just then, seconds
_ASK_AGAIN_SECONDS = 0.02


class ZeroMqReader:
    """Asks the owners; see :class:`~services.log.protocol.EventBrowser`.

    Args:
        links: to the owners.
        settings: of the log.
    """

    def __init__(self, links: Links, settings: LogSettings) -> None:
        self._links = links
        self._partitions = settings.partitions
        self._listing = ConsultationLister(self._ask, settings.partitions)

    async def at(self, sequence: int) -> SequencedEvent | None:
        """Return None: no event waits in the log."""
        return None

    async def snapshot(self, consultation: str) -> IdSnapshot:
        """Return which ids the corpus holds of *consultation*."""
        return await self._ask(self._partition(consultation), Ids(consultation), decode_ids)

    async def find(self, consultation: str, event_ids: Collection[UUID]) -> Mapping[UUID, Stored]:
        """Return what the corpus holds under *event_ids*."""
        partition = self._partition(consultation)
        found: dict[UUID, Stored] = {}
        left = list(dict.fromkeys(event_ids))
        while left:
            asked, left = left[:MAX_ITEMS], left[MAX_ITEMS:]
            answer = await self._ask(partition, Find(consultation, asked), decode_found)
            if len(answer.rest) >= len(asked):
                raise _away(partition, "it answers nothing")
            found.update(answer.found)
            left += answer.rest
        return found

    async def known(self, consultation: str, event_ids: Collection[UUID]) -> set[UUID]:
        """Return those of *event_ids* that the corpus holds."""
        return set(await self.find(consultation, event_ids))

    async def page(self, consultation: str, after: int, limit: int) -> Page:
        """Return at most *limit* events of *consultation* after *after*, and where to go on."""
        answer = await self._events(consultation, after, limit)
        events = [_stored(consultation, row) for row in answer.rows]
        last = events[-1].sequence if events else after
        return Page(events, last if answer.more else max(last, answer.committed), answer.more)

    async def page_before(self, consultation: str, before: int, limit: int) -> Page:
        """Return the last events of *consultation* below *before*."""
        question = Events(consultation, 0, limit, before)
        answer = await self._ask(self._partition(consultation), question, decode_events)
        events = [_stored(consultation, row) for row in answer.rows]
        return Page(events, events[0].sequence if events else before, answer.more)

    async def locate(self, consultation: str, event_id: UUID) -> SequencedEvent | None:
        """Return the event, or None when the corpus does not hold it."""
        found = (await self.find(consultation, [event_id])).get(event_id)
        if found is None:
            return None
        answer = await self._events(consultation, found.sequence - 1, 1)
        return _stored(consultation, answer.rows[0]) if answer.rows else None

    async def has_news(self, consultation: str, after: int) -> bool:
        """Return whether the corpus has something of *consultation* after *after*; a question only if it may have."""
        last = self._links[self._partition(consultation)].last
        if last is not None and last.committed <= after:
            return False
        return bool((await self._events(consultation, after, 1)).rows)

    async def conflicts(self, consultation: str, after: int, limit: int) -> Page:
        """Return nothing: a client is told at once that its key is used, and the event is not kept."""
        return Page([], after, more=False)

    async def verify(self, consultation: str) -> Verification:
        """Have the owner verify the consultation."""
        partition = self._partition(consultation)
        return await verify(lambda question: self._ask(partition, question, decode_verified), consultation)

    async def consultations(self, prefix: str, after: str, limit: int) -> tuple[list[ConsultationSummary], bool]:
        """Return consultations that begin with *prefix*, sorted by id, and whether there are more."""
        return await self._listing.by_name(prefix, after, limit)

    async def active_consultations(
        self, prefix: str, before: tuple[int, str], limit: int
    ) -> tuple[list[ConsultationSummary], tuple[int, str] | None]:
        """Return the consultations with the newest events, newest first, and the place to go on at."""
        return await self._listing.by_activity(prefix, before, limit)

    async def _events(self, consultation: str, after: int, limit: int) -> EventsAnswer:
        return await self._ask(self._partition(consultation), Events(consultation, after, limit), decode_events)

    async def _ask(self, partition: int, question: Question, decode: Callable[[bytes], T]) -> T:
        """Ask the owner of *partition* until it answers.

        Raises CorpusAwayError: nobody answers, or not in time; LogRefusedError: it does not understand the question.
        """
        link, end = self._links[partition], time.monotonic() + _ANSWER_SECONDS
        while (left := end - time.monotonic()) > 0:
            answer = await link.ask(KIND_OF[type(question)], encode_question(question, left), left)
            if answer is None:
                raise _away(partition, "no persister answers")
            code, data = answer
            if not code:
                try:
                    return decode(data)
                except MalformedError:
                    raise _away(partition, "its answer is malformed") from None
            if code == CODES[Failure.MALFORMED]:
                raise LogRefusedError("the persister does not understand the question: is it of another version?")
            if code == CODES[Failure.TOO_LARGE]:
                raise LogRefusedError(f"partition {partition_name(partition)} holds an event that is too large to read")
            if code != CODES[Failure.NOT_NOW]:
                raise _away(partition, "its file cannot be read; the persister's log says why")
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
        raise _away(partition, f"no answer within {_ANSWER_SECONDS:g} s")

    def _partition(self, consultation: str) -> int:
        return partition_of(consultation, self._partitions)


def _stored(consultation: str, row: Row) -> SequencedEvent:
    return SequencedEvent(row.sequence, Event(consultation, row.event_id, row.received_ns, row.body), persisted=True)


def _away(partition: int, reason: str) -> CorpusAwayError:
    return CorpusAwayError(f"partition {partition_name(partition)}: {reason}")
