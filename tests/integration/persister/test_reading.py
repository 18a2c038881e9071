"""Reading back over a real cluster and real persisters: no gap, no repeat, and one's own writes at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest
from nats.aio.msg import Msg

from fiq.corpus import open_corpus
from fiq.event import Event, new_event_id
from services.cli.embedded.processes import Cluster
from services.log.errors import CorpusAwayError, LogUnavailableError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.reader import JetStreamReader, StreamReading
from services.log.jetstream.stream import STREAM, parse_cursor_name
from services.log.listing import NEWEST
from services.log.partitions import partition_of
from services.log.protocol import Page, SequencedEvent
from services.log.questions import Stored, digest_of
from tests.support.persisters import PARTITIONS, Log, Persister, persisted, provisioned
from tests.support.polling import eventually

#: of the rounds in which a client posts and reads: in this one the events wait for certain, in that they are committed
WAITS, COMMITTED = 50, 75


@pytest.fixture
async def reader(log: Log) -> JetStreamReader:
    return JetStreamReader(log.nc, log.settings)


def event(number: int, consultation: str = "c1", *, event_id: UUID | None = None) -> Event:
    return Event(consultation, event_id or new_event_id(), number, b'{"event_type":"T","payload":%d}' % number)


async def append(log: Log, *events: Event) -> list[int]:
    return [(await log.publisher.append(one)).sequence for one in events]


async def paused(log: Log, partition: int, *, seconds: float) -> None:
    """Let the broker deliver nothing to the partition's persister for so long, or go on at once (0)."""
    until = datetime.now(UTC) + timedelta(seconds=seconds) if seconds else datetime(1, 1, 1, tzinfo=UTC)
    (consumer,) = [
        name
        for name in await log.api.consumer_names(STREAM)
        if (parse_cursor_name(name) or ())[:2] == ("main", partition)
    ]
    await log.api.request(f"CONSUMER.PAUSE.{STREAM}.{consumer}", {"pause_until": until.isoformat()})

    async def known_to_its_leader() -> bool:  # who answers the request is another node
        info = await log.api.consumer_info(STREAM, consumer)
        return info is not None and bool(seconds) == info.get("paused", False)

    await eventually(known_to_its_leader)


async def reaches(position: Callable[[], Awaitable[int]], wanted: int) -> bool:
    return await position() >= wanted


async def read(reader: JetStreamReader, consultation: str, after: int, limit: int) -> list[SequencedEvent]:
    return (await reader.page(consultation, after, limit)).events


async def in_pages(reader: JetStreamReader, consultation: str = "c1", *, limit: int = 7) -> list[SequencedEvent]:
    """Read all, page by page."""
    found: list[SequencedEvent] = []
    page = Page([], 0, more=True)
    while page.more:
        page = await reader.page(consultation, page.reached, limit)
        assert len(page.events) <= limit
        found += page.events
    return found


async def backwards(reader: JetStreamReader, consultation: str = "c1", *, limit: int = 7) -> list[SequencedEvent]:
    """Read all, page by page, from the end."""
    found: list[SequencedEvent] = []
    page = Page([], 2**63 - 1, more=True)
    while page.more:
        page = await reader.page_before(consultation, page.reached, limit)
        assert len(page.events) <= limit
        found = page.events + found
    return found


def sequences(events: list[SequencedEvent]) -> list[int]:
    return [one.sequence for one in events]


async def test_what_is_persisted_is_read_page_by_page(log: Log, reader: JetStreamReader, tmp_path: Path) -> None:
    """Byte for byte, in order, with times and ids; and each is found by its id."""
    events = [event(number) for number in range(1, 31)]
    with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        positions = await append(log, *events)
        await persisted(tmp_path / "data", {"c1": [one.event_id for one in events]})
        with open_corpus(tmp_path / "data") as corpus:
            times = [one.written_ns for one in corpus["c1"]]
        expected = [SequencedEvent(s, e, t) for s, e, t in zip(positions, events, times, strict=True)]
        assert expected == await in_pages(reader)
        assert expected == await backwards(reader)
        assert expected[2:5] == (await reader.page_before("c1", positions[5], 3)).events
        assert expected[5:8] == await read(reader, "c1", positions[4], 3)
        assert [] == await read(reader, "c1", positions[-1], 3)
        assert [] == await read(reader, "never", 0, 3)
        wanted = events[3]
        assert expected[3] == await reader.locate("c1", wanted.event_id)
        stored = {wanted.event_id: Stored(positions[3], digest_of(wanted.body), times[3])}
        assert stored == await reader.find("c1", [wanted.event_id, new_event_id()])
        assert {} == await reader.find("c2", [wanted.event_id])
        assert await reader.locate("c1", new_event_id()) is None
        assert await reader.locate("c2", wanted.event_id) is None
        snapshot = await reader.snapshot("c1")
        assert all(snapshot.may_hold(one.event_id) for one in events)
        assert not snapshot.may_hold(new_event_id())


async def test_a_client_reads_its_own_writes_while_they_are_persisted_and_trimmed(
    log: Log, reader: JetStreamReader, tmp_path: Path
) -> None:
    """Each acknowledged event is on the next page, wherever it is; the stream is trimmed as fast as can be."""
    with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        partition = partition_of("c1", PARTITIONS)
        trimmed = 0

        async def committed() -> int:
            samples = await persister.samples()
            return int(samples.get(f'fi_persister_committed_sequence{{partition="{partition:02d}"}}', 0))

        async def trim() -> None:
            nonlocal trimmed
            while True:
                if reached := await committed():
                    trimmed += await log.api.purge(STREAM, reached + 1)

        trimming = asyncio.create_task(trim())
        known: set[bool] = set()
        after = 0
        written: list[int] = []
        read: list[int] = []
        for number in range(150):
            if number == WAITS:  # otherwise which one is faster is chance
                await paused(log, partition, seconds=60)
            written += await append(log, *(event(number * 3 + part) for part in range(3)))
            if number == COMMITTED:
                await eventually(partial(reaches, committed, written[-1]))
            page = await reader.page("c1", after, 100)
            if number == WAITS:
                await paused(log, partition, seconds=0)
            known |= {one.written_ns is not None for one in page.events}
            read += sequences(page.events)
            after = page.reached
            assert written == read
            one = await reader.locate("c1", page.events[-1].event.event_id)
            assert one is not None
            assert written[-1] == one.sequence
        trimming.cancel()
        assert written == sequences(await in_pages(reader, limit=100))
    assert {True, False} == known
    assert trimmed > 100


async def test_what_waits_is_read_without_a_persister_and_after_trim_it_is_refused(
    log: Log, reader: JetStreamReader
) -> None:
    """The stream has all of it as long as nothing after the requested position was trimmed."""
    events = [event(number) for number in range(1, 21)]
    positions = await append(log, *events)
    expected = [SequencedEvent(s, e) for s, e in zip(positions, events, strict=True)]
    assert expected == await in_pages(reader)
    assert expected == await backwards(reader)
    assert expected[7] == await reader.locate("c1", events[7].event_id)
    assert await reader.locate("c1", new_event_id()) is None
    started = time.monotonic()
    with pytest.raises(CorpusAwayError, match="no persister has it open"):
        await reader.find("c1", [events[0].event_id])
    with pytest.raises(CorpusAwayError):
        await reader.consultations("", "", 10)
    assert time.monotonic() - started < 2

    await log.api.purge(STREAM, positions[10])
    assert expected[10:] == await read(reader, "c1", positions[9], 100)
    with pytest.raises(CorpusAwayError):
        await read(reader, "c1", positions[8], 100)
    with pytest.raises(CorpusAwayError):
        await backwards(reader)
    with pytest.raises(CorpusAwayError):
        await reader.locate("c1", new_event_id())
    assert expected[12] == await reader.locate("c1", events[12].event_id)


async def test_an_event_that_the_stream_holds_twice_is_read_once(fresh_log: Cluster, tmp_path: Path) -> None:
    """A retry after the broker's window: with and without a persister, on one page and on several."""
    async with provisioned(fresh_log, duplicate_window=0.1) as log:
        reader = JetStreamReader(log.nc, log.settings)
        events = [event(number) for number in range(1, 6)]
        positions = await append(log, *events)

        async def stored_again() -> bool:
            return not (await log.publisher.append(events[1])).duplicate

        await eventually(stored_again)
        reused = Event("c1", events[2].event_id, 9, b'{"event_type":"another"}')
        await eventually(lambda: _is_new(log, reused))
        positions += await append(log, event(6))
        for limit in (1, 2, 100):
            assert positions == sequences(await in_pages(reader, limit=limit))
        with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
            await persister.ready()

            async def all_persisted() -> bool:
                found = await in_pages(reader)
                return len(found) == 6 and all(one.written_ns is not None for one in found)

            await eventually(all_persisted)
            assert positions == sequences(await in_pages(reader, limit=1))
            await eventually(lambda: _told(log))
            with open_corpus(tmp_path / "data") as corpus:
                (kept,) = corpus.conflicts()
                assert [(reused.event_id, reused.body)] == [(one.event_id, one.raw) for one in kept]
            samples = await persister.samples()
            assert 1 == sum(value for name, value in samples.items() if "fi_persister_reused_keys_total" in name)
            await persister.ready()
            await eventually(lambda: _is_new(log, events[3]))
            assert positions == sequences(await in_pages(reader))


async def _told(log: Log) -> bool:
    """Whether fi-dead has the one pointer to a conflict."""
    return ["1"] == [letter.get("Fi-Listed") for letter in await log.dead()]


async def _is_new(log: Log, one: Event) -> bool:
    return not (await log.publisher.append(one)).duplicate


async def test_a_replica_that_lags_hides_no_acknowledged_event(
    log: Log, reader: JetStreamReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any replica answers a direct get; the leader says how far it must go, and has the rest."""
    positions = await append(log, *(event(number) for number in range(1, 11)))
    whole = StreamReading._batch

    async def lagging(self: StreamReading, subject: str, start: int) -> list[Msg]:
        batch = await whole(self, subject, start)
        return [message for message in batch if int((message.headers or {})["Nats-Sequence"]) < positions[7]]

    async def nothing(*_: object, **__: object) -> None:
        return None

    monkeypatch.setattr(StreamReading, "_batch", lagging)
    assert positions == sequences(await in_pages(reader))
    monkeypatch.setattr(JetStreamApi, "get_message", nothing)
    found = await reader.at(positions[9])
    assert found is not None
    assert positions[9] == found.sequence
    assert await reader.at(positions[9] + 1) is None


async def test_large_and_many_events_of_the_stream_come_in_bounded_pages(log: Log, reader: JetStreamReader) -> None:
    """A page is held in memory; the largest event fits all the same."""
    large = b'{"event_type":"' + b"x" * 400_000 + b'"}'
    events = [Event("c1", new_event_id(), 1, large) for _ in range(6)]
    positions = await append(log, *events)
    page = await reader.page("c1", 0, 100)
    assert (positions[:2], True) == (sequences(page.events), page.more)
    assert positions == sequences(await in_pages(reader))
    page = await reader.page_before("c1", positions[-1] + 1, 100)
    assert (positions[-2:], True) == (sequences(page.events), page.more)
    assert positions == sequences(await backwards(reader))
    positions = await append(log, *(event(number, "c2") for number in range(600)))
    assert positions == sequences(await in_pages(reader, "c2", limit=500))


async def test_what_is_no_event_is_passed_over(log: Log, reader: JetStreamReader) -> None:
    """The persister sets it aside; also when it is all that there is."""
    await log.nc.request("fi.events.c1", b"garbage", timeout=10)
    assert [] == await read(reader, "c1", 0, 10)
    (positions,) = await append(log, event(1))
    assert [positions] == sequences(await read(reader, "c1", 0, 10))
    assert await reader.at(positions - 1) is None
    found = await reader.at(positions)
    assert found is not None
    assert ("c1", None) == (found.event.consultation, found.written_ns)


async def test_consultations_of_all_partitions_are_listed_in_order(
    log: Log, reader: JetStreamReader, tmp_path: Path
) -> None:
    """Page by page, by prefix; and it is refused when a partition cannot be asked, rather than left out."""
    names = [*(f"visit-{number:03d}" for number in range(40)), "zebra"]
    with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        await append(log, *(event(1, name) for name in names))

        async def all_listed() -> bool:
            return names == [one.consultation for one in (await reader.consultations("", "", 100))[0]]

        async def listed(after: str) -> tuple[list[str], bool]:
            found, more = await reader.consultations("visit-", after, 15)
            return [one.consultation for one in found], more

        await eventually(all_listed)
        assert (names[:15], True) == await listed("")
        assert (names[15:30], True) == await listed(names[14])
        assert (names[30:40], False) == await listed(names[29])
        await append(log, *(event(number, "visit-007") for number in range(2, 5)), event(2, "visit-030"))

        async def active() -> list[tuple[str, int]]:
            found, place = await reader.active_consultations("visit-", NEWEST, 2)
            assert place is not None
            assert (found[-1].last_received_ns, found[-1].consultation) == place
            older, _ = await reader.active_consultations("visit-", place, 100)
            assert set(names[:40]) == {one.consultation for one in [*found, *older]}
            return [(one.consultation, one.events) for one in found]

        await eventually(lambda: _is(active, [("visit-007", 4), ("visit-030", 2)]))
        assert 0 == await persister.end()
    with pytest.raises(CorpusAwayError):
        await reader.consultations("", "", 100)


async def _is(read: Callable[[], Awaitable[object]], wanted: object) -> bool:
    return await read() == wanted


@pytest.fixture
async def two_persisters(log: Log, tmp_path: Path) -> AsyncIterator[tuple[Persister, Persister]]:
    with (
        Persister(tmp_path / "a", log.cluster, tmp_path / "data") as first,
        Persister(tmp_path / "b", log.cluster, tmp_path / "data") as second,
    ):
        await first.ready()
        await second.ready()
        yield first, second


async def test_another_process_answers_when_the_owner_dies(
    log: Log, reader: JetStreamReader, two_persisters: tuple[Persister, Persister]
) -> None:
    """Those of one volume take over; meanwhile readers get an error or the truth, and never a gap."""
    names = [f"c{number}" for number in range(12)]
    positions = {name: await append(log, *(event(number, name) for number in range(5))) for name in names}

    async def complete() -> bool:
        for name in names:
            try:
                found = await in_pages(reader, name, limit=2)
            except CorpusAwayError:
                return False
            assert positions[name] == sequences(found)
            if not all(one.written_ns is not None for one in found):
                return False
        return True

    await eventually(complete)
    two_persisters[0].process.kill()
    for name in names:
        positions[name] += await append(log, event(9, name))
    await eventually(complete)


async def test_reading_goes_on_when_a_node_dies(log: Log, reader: JetStreamReader, tmp_path: Path) -> None:
    """An election is an error that a reader may repeat; what it then reads is whole."""
    with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        positions = await append(log, *(event(number) for number in range(20)))
        leader = await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)
        log.cluster.kill(leader)

        async def whole() -> bool:
            try:
                found = await in_pages(reader)
            except (LogUnavailableError, CorpusAwayError):
                return False
            assert positions == sequences(found)
            return True

        await eventually(whole)
        positions += await append(log, event(20))
        await eventually(whole)
