"""Reading while the corpus stands at a known position: what is there twice, and what moves between two questions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from services.cli.cluster import Cluster
from services.contract.event import Event
from services.contract.ids import new_event_id
from services.corpus import EventStore, Record
from services.eventlog.jetstream.names import STREAM
from services.eventlog.jetstream.reading import JetStreamReader
from services.eventlog.jetstream.reading_stream import Numbered, StreamReading
from services.eventlog.partitions import partition_of
from services.eventlog.protocol import Page
from services.persister.answering import Desk
from services.persister.metrics import Metrics
from services.persister.partition_file import PartitionFile
from tests.support.broker import taken
from tests.support.persister import IDENTITY
from tests.support.persisters import PARTITIONS, Log, provisioned
from tests.support.polling import eventually


class Halted:
    """A persister that answers, and commits when it is told to."""

    def __init__(self, log: Log, store: EventStore, hdf5: ThreadPoolExecutor) -> None:
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
            Record(sequence, one.received_ns, one.event_id.bytes, one.body)
            for sequence, one in zip(sequences, events, strict=True)
        ]

        def work() -> None:
            self._store.append("c1", records)
            self._store.commit(sequences[-1])

        await asyncio.get_running_loop().run_in_executor(self._hdf5, work)

    async def shown(self, limit: int) -> list[tuple[int, bool]]:
        found: list[tuple[int, bool]] = []
        page = Page([], 0, more=True)
        while page.more:
            page = await self.reader.page("c1", page.reached, limit)
            found += [(one.sequence, one.persisted) for one in page.events]
        return found


@pytest.fixture
async def halted(fresh_log: Cluster, tmp_path: Path) -> AsyncIterator[Halted]:
    async with provisioned(fresh_log, duplicate_window=0.1) as log:
        with ThreadPoolExecutor(1) as hdf5:
            file = PartitionFile(lambda: EventStore.create(tmp_path / "00.h5", IDENTITY))
            store = await asyncio.get_running_loop().run_in_executor(hdf5, file.open)
            desk = Desk(log.nc, "main", hdf5, Metrics())
            await desk.open(partition_of("c1", PARTITIONS), file, store)
            work = asyncio.create_task(desk.run())
            await taken(log.nc)
            yield Halted(log, store, hdf5)
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            hdf5.submit(lambda: file.close(abandon=True)).result()


def event(number: int) -> Event:
    return Event("c1", new_event_id(), number, b'{"event_type":"T","payload":%d}' % number)


async def test_a_copy_in_the_stream_of_what_the_corpus_holds_is_not_shown(halted: Halted) -> None:
    """Nor one of what waits; on whichever page either of them comes."""
    events = [event(number) for number in range(1, 6)]
    stands = await halted.append(*events)
    await halted.commit(stands[:3], events[:3])
    await halted.again(events[1])
    await halted.again(events[3])
    (last,) = await halted.append(event(6))
    expected = [(s, True) for s in stands[:3]] + [(s, False) for s in (*stands[3:], last)]
    for limit in (1, 2, 3, 100):
        assert expected == await halted.shown(limit)


async def test_what_is_committed_and_trimmed_between_the_questions_is_not_skipped(
    halted: Halted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is read after its beginning is gone: the corpus is asked again, and has it."""
    events = [event(number) for number in range(1, 8)]
    stands = await halted.append(*events)
    await halted.commit(stands[:2], events[:2])
    tail = StreamReading.tail
    moved = False

    async def trimmed(
        self: StreamReading, partition: int, consultation: str, after: int, last: int
    ) -> AsyncIterator[Numbered]:
        nonlocal moved
        if not moved:
            moved = True
            await halted.commit(stands[2:5], events[2:5])
            await halted.log.api.purge(STREAM, stands[4] + 1)
        async for one in tail(self, partition, consultation, after, last):
            yield one

    monkeypatch.setattr(StreamReading, "tail", trimmed)
    assert [(s, True) for s in stands[:5]] + [(s, False) for s in stands[5:]] == await halted.shown(100)
    assert moved


async def test_an_event_is_found_although_it_is_committed_and_trimmed_meanwhile(
    halted: Halted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not held, said the corpus; gone, says the stream: it is asked once more."""
    events = [event(number) for number in range(1, 4)]
    stands = await halted.append(*events)
    await halted.commit(stands[:1], events[:1])
    last = StreamReading.last

    async def trimmed(self: StreamReading, partition: int, consultation: str) -> int:
        await halted.commit(stands[1:], events[1:])
        await halted.log.api.purge(STREAM, stands[2] + 1)
        monkeypatch.undo()
        return await last(self, partition, consultation)

    monkeypatch.setattr(StreamReading, "last", trimmed)
    found = await halted.reader.locate("c1", events[1].event_id)
    assert found is not None
    assert (stands[1], True) == (found.sequence, found.persisted)


async def held(halted: Halted, *events: Event, before: int | None = None) -> tuple[list[int], bool]:
    """Return where the first event under each of the ids stands, 0 for none, and whether that is all."""
    found = await halted.reader.held("c1", [one.event_id for one in events], before)
    places = [found.events[one.event_id].sequence if one.event_id in found.events else 0 for one in events]
    return places, found.complete


async def test_of_a_key_the_first_event_is_found_whether_it_is_persisted_or_waits(halted: Halted) -> None:
    """The broker has taken both a second time."""
    events = [event(number) for number in range(1, 5)]
    stands = await halted.append(*events)
    await halted.commit(stands[:2], events[:2])
    await halted.again(events[0])
    copy = await halted.again(events[2])

    for before in (None, copy, stands[3]):
        assert await held(halted, events[0], events[2], event(9), before=before) == ([1, 3, 0], True)
    assert await held(halted, *events, before=stands[2]) == ([1, 2, 0, 0], True)


async def test_the_stream_is_not_asked_where_the_corpus_has_come_as_far(
    halted: Halted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a short backlog a new key costs one question to the persister."""
    events = [event(number) for number in range(1, 4)]
    stands = await halted.append(*events)
    await halted.commit(stands[:2], events[:2])
    for name in ("last", "tail", "first"):
        monkeypatch.delattr(StreamReading, name)

    assert await held(halted, events[1], event(9), before=stands[2]) == ([2, 0], True)


async def test_a_key_is_found_although_its_event_is_committed_and_trimmed_meanwhile(
    halted: Halted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader finds it: the corpus is asked once more."""
    events = [event(number) for number in range(1, 4)]
    stands = await halted.append(*events)
    await halted.commit(stands[:1], events[:1])
    tail = StreamReading.tail

    async def trimmed(
        self: StreamReading, partition: int, consultation: str, after: int, last: int
    ) -> AsyncIterator[Numbered]:
        await halted.commit(stands[1:], events[1:])
        await halted.log.api.purge(STREAM, stands[2])
        async for numbered in tail(self, partition, consultation, after, last):
            yield numbered

    monkeypatch.setattr(StreamReading, "tail", trimmed)
    assert await held(halted, events[1], before=stands[2] + 1) == ([2], True)


@pytest.mark.parametrize("bound", ["MOST_EVENTS", "MOST_BYTES"])
async def test_what_is_read_of_a_long_backlog_for_a_key_is_bounded(
    halted: Halted, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """Then it is not known whether there is an event under the key; those that were met are known."""
    events = [event(number) for number in range(1, 41)]
    await halted.append(*events)
    monkeypatch.setattr(f"services.eventlog.jetstream.reading_held.{bound}", 20)

    assert await held(halted, events[0]) == ([1], True)
    assert await held(halted, events[0], events[39]) == ([1, 0], False)


async def test_one_question_at_a_time_reads_the_stream(halted: Halted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of keys while much waits must leave the process time for its events."""
    events = [event(number) for number in range(1, 11)]
    await halted.append(*events)
    tail, reading, most = StreamReading.tail, 0, 0

    async def counted(
        self: StreamReading, partition: int, consultation: str, after: int, last: int
    ) -> AsyncIterator[Numbered]:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        async for numbered in tail(self, partition, consultation, after, last):
            yield numbered
        reading -= 1

    monkeypatch.setattr(StreamReading, "tail", counted)
    found = await asyncio.gather(*(held(halted, one, event(99)) for one in events))

    assert [([one, 0], True) for one in range(1, 11)] == found
    assert most == 1


async def test_without_a_persister_only_a_whole_stream_can_say_that_a_key_is_new(log: Log) -> None:
    """What it has is found all the same."""
    reader = JetStreamReader(log.nc, log.settings)
    events = [event(number) for number in range(1, 4)]
    for one in events:
        await log.publisher.append(one)

    async def found(wanted: Event) -> tuple[int, bool]:
        said = await reader.held("c1", [wanted.event_id], None)
        return (said.events[wanted.event_id].sequence if said.events else 0), said.complete

    assert [(2, True), (0, True)] == [await found(events[1]), await found(event(9))]
    await log.api.purge(STREAM, 2)
    assert [(2, False), (0, False)] == [await found(events[1]), await found(event(9))]


async def test_without_a_persister_new_events_do_not_queue_for_the_stream(log: Log) -> None:
    """Intake goes on at its pace in an outage: of those that come together one has its key looked for."""
    reader = JetStreamReader(log.nc, log.settings)
    events = [event(number) for number in range(1, 11)]
    for one in events:
        await log.publisher.append(one)

    said = await asyncio.gather(*(reader.held("c1", [one.event_id], 11) for one in events))

    assert [(1, True), *[(0, False)] * 9] == sorted(((len(one.events), one.complete) for one in said), reverse=True)
