"""Finds out what a client's keys stand for: in the corpus, else in what waits in the stream behind it.

Unlike a reader's questions these come with every new event, so what is read of the stream for one is bounded, and the
answer says whether it is complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from uuid import UUID

from services.contract.event import Event
from services.eventlog.errors import CorpusAwayError
from services.eventlog.jetstream.reading_corpus import CorpusReading
from services.eventlog.jetstream.reading_stream import StreamReading
from services.eventlog.jetstream.reading_wire import Row
from services.eventlog.protocol import Held, StoredEvent

#: what is read of the stream for one question, at most: events, and bytes of their bodies
MOST_EVENTS, MOST_BYTES = 1024, 4 << 20
#: a partition that nobody answers for is not asked about new events again for this long, seconds
AWAY_SECONDS = 0.5
#: pause behind a look at the stream, in times of its length; while persisters are away new events need the time more
_PAUSE, _PAUSE_AWAY = 1.0, 9.0


class HeldReading:
    """Looks ids up.

    Args:
        stream: holds what waits.
        corpus: holds the rest.
    """

    def __init__(self, stream: StreamReading, corpus: CorpusReading) -> None:
        self._stream = stream
        self._corpus = corpus
        self._turn = asyncio.Semaphore(1)
        self._away: dict[int, float] = {}  # until when

    async def held(self, partition: int, consultation: str, event_ids: Collection[UUID], before: int | None) -> Held:
        """Return what is stored under *event_ids*; see :meth:`services.eventlog.protocol.EventReader.held`."""
        try:
            rows, committed = await self._in_corpus(partition, consultation, event_ids, new=before is not None)
        except CorpusAwayError:
            if before is not None and self._turn.locked():
                # an outage of persisters must not let new events queue here
                return Held({}, complete=False)
            async with self._own_turn(_PAUSE if before is None else _PAUSE_AWAY):
                waiting, complete = await self._waiting(partition, consultation, set(event_ids), 0, before)
                return Held(waiting, complete and await self._stream.first() == 1)
        found = {event_id: persisted(consultation, row) for event_id, row in rows.items()}
        missing = set(event_ids) - found.keys()
        if not missing or (before is not None and before <= committed + 1):
            return Held(found, complete=True)
        async with self._own_turn(_PAUSE):
            waiting, complete = await self._waiting(partition, consultation, missing, committed, before)
        if missing := missing - waiting.keys():  # they may have been committed and trimmed meanwhile
            rows, _ = await self._corpus.find_all(partition, consultation, missing)
            waiting |= {event_id: persisted(consultation, row) for event_id, row in rows.items()}
        return Held(found | waiting, complete)

    async def _in_corpus(
        self, partition: int, consultation: str, event_ids: Collection[UUID], *, new: bool
    ) -> tuple[dict[UUID, Row], int]:
        loop = asyncio.get_running_loop()
        if new and loop.time() < self._away.get(partition, 0.0):
            raise CorpusAwayError("nobody answered a moment ago")
        try:
            return await self._corpus.find_all(partition, consultation, event_ids)
        except CorpusAwayError:
            self._away[partition] = loop.time() + AWAY_SECONDS
            raise

    async def _waiting(
        self, partition: int, consultation: str, wanted: set[UUID], after: int, before: int | None
    ) -> tuple[dict[UUID, StoredEvent], bool]:
        """Return the first event that the stream has under each of *wanted*, and whether nothing was left unread."""
        end = await self._stream.last(partition, consultation) if before is None else before - 1
        found: dict[UUID, StoredEvent] = {}
        events = size = 0
        async for sequence, event in self._stream.tail(partition, consultation, after, end):
            if sequence > end or len(found) == len(wanted):
                break
            if events == MOST_EVENTS or size > MOST_BYTES:
                return found, False
            events += 1
            if event is not None:
                size += len(event.body)
                if event.event_id in wanted:
                    found.setdefault(event.event_id, StoredEvent(sequence, event, persisted=False))
        return found, True

    @asynccontextmanager
    async def _own_turn(self, pause: float) -> AsyncIterator[None]:
        """Read alone, and let *pause* times as long pass afterwards: so much is left for events, however many ask."""
        loop = asyncio.get_running_loop()
        await self._turn.acquire()
        began = loop.time()
        try:
            yield
        finally:
            loop.call_later(pause * (loop.time() - began), self._turn.release)


def persisted(consultation: str, row: Row) -> StoredEvent:
    """Return what the corpus holds in *row*."""
    return StoredEvent(row.sequence, Event(consultation, row.event_id, row.received_ns, row.body), persisted=True)
