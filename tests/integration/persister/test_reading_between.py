"""Reading while the corpus is at a known position: what is stored twice, and what moves between two questions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from fiq.corpus import EventStore, Record
from fiq.event import Event, new_event_id
from services.cli.embedded.processes import Cluster
from services.log.errors import CorpusAwayError
from services.log.jetstream.questions import NatsAnswering
from services.log.jetstream.reader import JetStreamReader, Numbered, StreamReading
from services.log.jetstream.stream import STREAM
from services.log.partitions import partition_of
from services.log.protocol import Page
from services.log.questions import Stored, digest_of
from services.persister.answering import QuestionResponder
from services.persister.metrics import PersisterMetrics
from services.persister.rounds import Hdf5Thread, PartitionFile
from tests.support.broker import taken
from tests.support.persister import IDENTITY
from tests.support.persisters import PARTITIONS, Log, provisioned
from tests.support.polling import eventually

#: when each event is written
WRITTEN_NS = 1_700_000_000_000_000_000


class Halted:
    """A persister that answers, and commits only when the test calls it."""

    def __init__(self, log: Log, store: EventStore, hdf5: Hdf5Thread) -> None:
        self.log = log
        self.reader = JetStreamReader(log.nc, log.settings)
        self._store = store
        self._hdf5 = hdf5

    async def append(self, *events: Event) -> list[int]:
        return [(await self.log.publisher.append(one)).sequence for one in events]

    async def again(self, event: Event) -> int:
        """Publish *event* until the stream has taken it once more."""

        async def sequence() -> int:
            appended = await self.log.publisher.append(event)
            return 0 if appended.duplicate else appended.sequence

        return await eventually(sequence)

    async def commit(self, sequences: list[int], events: list[Event]) -> None:
        records = [
            Record(sequence, one.received_ns, WRITTEN_NS, one.event_id.bytes, one.body)
            for sequence, one in zip(sequences, events, strict=True)
        ]

        def work() -> None:
            self._store.append("c1", records)
            self._store.commit(sequences[-1])

        await self._hdf5.run(work)

    async def shown(self, limit: int, *, backward: bool = False) -> list[tuple[int, bool]]:
        """Read all, page by page, from the first event on or from the last one back."""
        found: list[tuple[int, bool]] = []
        read = self.reader.page_before if backward else self.reader.page
        page = Page([], 2**63 - 1 if backward else 0, more=True)
        while page.more:
            page = await read("c1", page.reached, limit)
            shown = [(one.sequence, one.written_ns == WRITTEN_NS) for one in page.events]
            found = shown + found if backward else found + shown
        return found


@pytest.fixture
async def halted(fresh_log: Cluster, tmp_path: Path) -> AsyncIterator[Halted]:
    async with provisioned(fresh_log, duplicate_window=0.1) as log:
        with ThreadPoolExecutor(1) as executor:
            hdf5 = Hdf5Thread(executor)
            file = PartitionFile(await hdf5.run(lambda: EventStore.create(tmp_path / "00.h5", IDENTITY)))
            responder = QuestionResponder(NatsAnswering(log.nc, "main"), hdf5, PersisterMetrics())
            await responder.open(partition_of("c1", PARTITIONS), file)
            work = asyncio.create_task(responder.run())
            await taken(log.nc)
            yield Halted(log, file.store, hdf5)
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            await hdf5.run(lambda: file.close(abandon=True))


def event(number: int) -> Event:
    return Event("c1", new_event_id(), number, b'{"event_type":"T","payload":%d}' % number)


async def test_a_copy_in_the_stream_of_what_the_corpus_holds_is_not_shown(halted: Halted) -> None:
    """Nor one of what waits; on whichever page either of them comes."""
    events = [event(number) for number in range(1, 6)]
    positions = await halted.append(*events)
    await halted.commit(positions[:3], events[:3])
    await halted.again(events[1])
    await halted.again(events[3])
    (last,) = await halted.append(event(6))
    expected = [(s, True) for s in positions[:3]] + [(s, False) for s in (*positions[3:], last)]
    for limit in (1, 2, 3, 100):
        assert expected == await halted.shown(limit)
        assert expected == await halted.shown(limit, backward=True)
    page = await halted.reader.page_before("c1", positions[4], 3)
    assert (positions[1:4], True) == ([one.sequence for one in page.events], page.more)


@pytest.mark.parametrize(("backward", "limit"), [(False, 100), (True, 100), (True, 3)])
async def test_what_is_committed_and_trimmed_between_the_questions_is_not_skipped(
    halted: Halted, monkeypatch: pytest.MonkeyPatch, backward: bool, limit: int
) -> None:
    """The stream is read after its beginning is gone: the corpus is asked again, and has it."""
    events = [event(number) for number in range(1, 8)]
    positions = await halted.append(*events)
    await halted.commit(positions[:2], events[:2])
    tail = StreamReading.tail
    moved = False

    async def trimmed(
        self: StreamReading, partition: int, consultation: str, after: int, last: int
    ) -> AsyncIterator[Numbered]:
        nonlocal moved
        if not moved:
            moved = True
            await halted.commit(positions[2:5], events[2:5])
            await halted.log.api.purge(STREAM, positions[4] + 1)
        async for one in tail(self, partition, consultation, after, last):
            yield one

    monkeypatch.setattr(StreamReading, "tail", trimmed)
    expected = [(s, True) for s in positions[:5]] + [(s, False) for s in positions[5:]]
    assert expected == await halted.shown(limit, backward=backward)
    assert moved


async def test_an_event_is_found_although_it_is_committed_and_trimmed_meanwhile(
    halted: Halted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not held, said the corpus; gone, says the stream: it is asked once more."""
    events = [event(number) for number in range(1, 4)]
    positions = await halted.append(*events)
    await halted.commit(positions[:1], events[:1])
    last = StreamReading.last

    async def trimmed(self: StreamReading, partition: int, consultation: str) -> int:
        await halted.commit(positions[1:], events[1:])
        await halted.log.api.purge(STREAM, positions[2] + 1)
        monkeypatch.undo()
        return await last(self, partition, consultation)

    monkeypatch.setattr(StreamReading, "last", trimmed)
    found = await halted.reader.locate("c1", events[1].event_id)
    assert found is not None
    assert (positions[1], WRITTEN_NS) == (found.sequence, found.written_ns)


async def test_a_snapshot_shows_what_is_committed_and_nothing_else(halted: Halted) -> None:
    """What waits in the stream the broker knows itself."""
    events = [event(number) for number in range(1, 5)]
    positions = await halted.append(*events)
    empty = await halted.reader.snapshot("c1")
    await halted.commit(positions[:2], events[:2])
    snapshot = await halted.reader.snapshot("c1")
    assert (True, 0) == (empty.whole, empty.size)
    assert (True, 16) == (snapshot.whole, snapshot.size)
    assert [True, True, False, False] == [snapshot.may_hold(one.event_id) for one in events]
    assert not empty.may_hold(events[0].event_id)


async def test_a_consultation_with_too_many_ids_has_no_snapshot(
    halted: Halted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then each id may be held, and is asked for."""
    events = [event(number) for number in range(1, 5)]
    await halted.commit(await halted.append(*events), events)
    monkeypatch.setattr("services.persister.answering.MAX_IDS", 3)
    snapshot = await halted.reader.snapshot("c1")
    assert (False, True) == (snapshot.whole, snapshot.may_hold(event(9).event_id))
    found = await halted.reader.find("c1", [events[1].event_id, event(9).event_id])
    assert {events[1].event_id: Stored(2, digest_of(events[1].body), WRITTEN_NS)} == found


async def test_of_a_batch_it_is_known_what_is_persisted_and_what_waits(halted: Halted) -> None:
    """So its retry waits for neither."""
    events = [event(number) for number in range(1, 5)]
    positions = await halted.append(*events)
    await halted.commit(positions[:2], events[:2])
    wanted = [events[0].event_id, events[3].event_id, event(9).event_id]
    assert {events[0].event_id, events[3].event_id} == await halted.reader.known("c1", wanted)


@pytest.mark.parametrize("bound", ["MOST_EVENTS", "MOST_BYTES"])
async def test_what_is_read_of_a_long_backlog_for_a_batch_is_bounded(
    halted: Halted, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """The others are published in order, as if they were new."""
    events = [event(number) for number in range(1, 41)]
    await halted.append(*events)
    monkeypatch.setattr(f"services.log.jetstream.reader.{bound}", 20)
    assert {events[0].event_id} == await halted.reader.known("c1", [events[0].event_id, events[39].event_id])


async def test_without_a_persister_the_stream_shows_what_is_known(log: Log) -> None:
    """A retry of a batch in an outage must be quick, too."""
    reader = JetStreamReader(log.nc, log.settings)
    events = [event(number) for number in range(1, 4)]
    for one in events:
        await log.publisher.append(one)
    assert {events[1].event_id} == await reader.known("c1", [events[1].event_id, event(9).event_id])
    with pytest.raises(CorpusAwayError):
        await reader.snapshot("c1")
