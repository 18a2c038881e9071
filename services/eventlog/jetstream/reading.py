"""Reads events back: what the corpus holds, then what still waits in the stream.

Nothing is skipped, shown twice or out of order, and what a client was told is stored is there at once. The order of
the questions makes that so. The partition's position is asked, then the stream is read behind it, then the corpus is
asked *again*: trim deletes nothing that was not committed when it did, so what the stream lost meanwhile lies below the
second position, in rows that the second answer has, and what the stream showed above it is complete.

The stream may hold an event twice, when it was retried behind the broker's window; the corpus holds the first. So an
event of the stream counts only when neither the corpus nor an earlier message there has its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from nats.aio.client import Client

from services.contract.event import Event
from services.eventlog.errors import CorpusAwayError
from services.eventlog.jetstream.reading_corpus import CorpusReading
from services.eventlog.jetstream.reading_held import HeldReading, persisted
from services.eventlog.jetstream.reading_stream import StreamReading
from services.eventlog.jetstream.reading_wire import Consultations, Events, EventsAnswer
from services.eventlog.partitions import partition_of
from services.eventlog.protocol import EventBrowser, Held, Page, StoredEvent
from services.eventlog.settings import LogSettings

#: how long one answer of a persister or of the broker may take, seconds
TIMEOUT_SECONDS = 4.0
#: bodies that a page takes from the stream, at most, but for a single event, bytes
PAGE_BYTES = 1 << 20


@dataclass(slots=True)
class _Tail:
    """What the stream holds behind a position."""

    events: list[tuple[int, Event]]
    reached: int
    more: bool


class JetStreamReader(EventBrowser):
    """The reading side of the log and of one store's corpus; see :class:`services.eventlog.protocol.EventBrowser`.

    Args:
        nc: the connection; it stays the caller's to close.
        settings: which store is read, and the number of partitions.
        timeout: seconds for each answer.
    """

    def __init__(self, nc: Client, settings: LogSettings, *, timeout: float = TIMEOUT_SECONDS) -> None:
        self._partitions = settings.partitions
        self._stream = StreamReading(nc, timeout=timeout)
        self._corpus = CorpusReading(nc, settings.store, timeout=timeout)
        self._held = HeldReading(self._stream, self._corpus)

    async def at(self, sequence: int) -> StoredEvent | None:
        """Return the event at *sequence* of the log, or None when the log holds none there (any more)."""
        found = await self._stream.at(sequence)
        if found is None or found[1] is None:
            return None
        return StoredEvent(sequence, found[1], persisted=False)

    async def find(self, consultation: str, event_id: UUID) -> StoredEvent | None:
        """Return the event that the corpus holds under *event_id*, or None when it holds none."""
        found = await self._corpus.find(self._partition(consultation), consultation, event_id)
        return None if found.row is None else persisted(consultation, found.row)

    async def held(self, consultation: str, event_ids: Collection[UUID], before: int | None) -> Held:
        """Return what is stored under *event_ids*; see :meth:`services.eventlog.protocol.EventReader.held`."""
        return await self._held.held(self._partition(consultation), consultation, event_ids, before)

    async def read(self, consultation: str, after: int, limit: int) -> list[StoredEvent]:
        """Return events behind *after*, at least one when there is one; see :meth:`page`."""
        return (await self.page(consultation, after, limit)).events

    async def page(self, consultation: str, after: int, limit: int) -> Page:
        """Return at most *limit* events of *consultation* behind *after*, and where to go on.

        A page may be shorter although there are more: it is bounded in bytes, too.

        Raises:
            CorpusAwayError: the partition's persister does not answer, and the stream alone cannot show all.
            LogUnavailableError: the log does not answer in time.
            LogRefusedError: an operator must act.
        """
        while True:
            page = await self._page(consultation, after, limit)
            if page.events or not page.more:
                return page
            after = page.reached  # nothing but copies and poison up to there

    async def locate(self, consultation: str, event_id: UUID) -> StoredEvent | None:
        """Return the event wherever it is, corpus or stream, or None when neither holds it; raises as :meth:`page`."""
        partition = self._partition(consultation)
        try:
            found = await self._corpus.find(partition, consultation, event_id)
        except CorpusAwayError:
            event = await self._in_stream(consultation, event_id, 0)
            if event is None and await self._stream.first() > 1:
                raise
            return event
        if found.row is None:
            event = await self._in_stream(consultation, event_id, found.committed)
            if event is not None:
                return event
            found = await self._corpus.find(partition, consultation, event_id)  # it may have been committed meanwhile
        return None if found.row is None else persisted(consultation, found.row)

    async def consultations(self, prefix: str, after: str, limit: int) -> tuple[list[str], bool]:
        """Return the sorted ids of at most *limit* consultations of the corpus, and whether there are more behind them.

        Those whose first event was not persisted yet are not among them.

        Raises:
            CorpusAwayError: a partition's persister does not answer.
            LogUnavailableError: there is no connection.
        """
        question = Consultations(prefix, after, limit)
        asked = [self._corpus.consultations(partition, question) for partition in range(self._partitions)]
        answers = await asyncio.gather(*asked)
        names = sorted(name for answer in answers for name in answer.names)
        return names[:limit], len(names) > limit or any(answer.more for answer in answers)

    async def has_news(self, consultation: str, after: int) -> bool:
        """Return whether the stream has a message of *consultation* behind *after*; cheap, and perhaps a moment late.

        Raises:
            LogUnavailableError: no answer.
        """
        return await self._stream.has_news(self._partition(consultation), consultation, after)

    # -- a page -------------------------------------------------------------------------------------------------------

    async def _page(self, consultation: str, after: int, limit: int) -> Page:
        partition = self._partition(consultation)
        last = asyncio.ensure_future(self._stream.last(partition, consultation))
        last.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # it may not be needed in the end
        try:
            try:
                first = await self._corpus.events(partition, Events(consultation, after, limit))
            except CorpusAwayError as away:
                return await self._from_stream(consultation, after, limit, await last, away)
            if first.more:
                return _corpus_page(consultation, after, first)
            end = await last
        finally:
            last.cancel()
        if end <= max(first.committed, after):
            return _corpus_page(consultation, after, first)
        return await self._joined(consultation, after, limit, first, end)

    async def _joined(self, consultation: str, after: int, limit: int, first: EventsAnswer, end: int) -> Page:
        """Return *first*, the corpus's answer, with what came behind it, up to *end*."""
        partition = self._partition(consultation)
        events = [persisted(consultation, row) for row in first.rows]
        position = events[-1].sequence if events else after
        if len(events) == limit:
            return Page(events, position, more=True)
        tail = await self._tail(consultation, first.committed, max(after, position), end, limit - len(events))
        second = await self._corpus.events(partition, Events(consultation, position, limit - len(events)))
        events += [persisted(consultation, row) for row in second.rows]
        if second.more or len(events) == limit:
            return Page(events, events[-1].sequence if events else position, more=True)
        queued = [(sequence, event) for sequence, event in tail.events if sequence > second.committed]
        new = await self._new(partition, queued)
        room = limit - len(events)
        if len(new) > room:
            new, reached, more = new[:room], new[room - 1].sequence, True
        else:
            reached, more = tail.reached, tail.more
        events += new
        return Page(events, max(reached, position, events[-1].sequence if events else 0), more)

    async def _tail(self, consultation: str, base: int, after: int, end: int, limit: int) -> _Tail:
        """Return the first *limit* new events behind *after* that the stream holds; those from *base* on are known."""
        seen: set[UUID] = set()
        found = _Tail([], after, more=False)
        size = 0
        async for sequence, event in self._stream.tail(self._partition(consultation), consultation, base, end):
            if event is not None and event.event_id not in seen:
                seen.add(event.event_id)
                if sequence > after:
                    if found.events and (len(found.events) == limit or size + len(event.body) > PAGE_BYTES):
                        found.more = True
                        return found
                    found.events.append((sequence, event))
                    size += len(event.body)
            found.reached = max(found.reached, sequence)
        return found

    async def _new(self, partition: int, queued: list[tuple[int, Event]]) -> list[StoredEvent]:
        """Return those of *queued* whose id the corpus does not hold from an earlier message."""
        asked = [self._corpus.find(partition, event.consultation, event.event_id) for _, event in queued]
        new = []
        for (sequence, event), found in zip(queued, await asyncio.gather(*asked), strict=True):
            if found.row is None or found.row.sequence == sequence:
                new.append(StoredEvent(sequence, event, persisted=found.row is not None))
        return new

    async def _from_stream(self, consultation: str, after: int, limit: int, end: int, away: CorpusAwayError) -> Page:
        """Return a page of what the stream alone holds, if it has lost nothing behind *after*."""
        if await self._stream.first() > after + 1:
            raise away
        tail = await self._tail(consultation, 0, after, end, limit)
        if await self._stream.first() > after + 1:  # trimmed meanwhile: something may be missing
            raise away
        events = [StoredEvent(sequence, event, persisted=False) for sequence, event in tail.events]
        return Page(events, tail.reached, tail.more)

    async def _in_stream(self, consultation: str, event_id: UUID, after: int) -> StoredEvent | None:
        partition = self._partition(consultation)
        end = await self._stream.last(partition, consultation)
        async for sequence, event in self._stream.tail(partition, consultation, after, end):
            if event is not None and event.event_id == event_id:
                return StoredEvent(sequence, event, persisted=False)
        return None

    def _partition(self, consultation: str) -> int:
        return partition_of(consultation, self._partitions)


def _corpus_page(consultation: str, after: int, answer: EventsAnswer) -> Page:
    events = [persisted(consultation, row) for row in answer.rows]
    return Page(events, events[-1].sequence if events else after, answer.more)
