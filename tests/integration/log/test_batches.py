"""Atomic batches on a real cluster: at once or not at all, each event once, positions in the order of the events."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial

import pytest

from fiq.event import Event
from services.cli.embedded.processes import Cluster
from services.log.errors import DuplicateInFlightError, LogFullError, LogRefusedError, LogUnavailableError
from services.log.jetstream.publisher import MAX_BATCH, MAX_BATCHES_UNDER_WAY, MAX_SINGLES, Publisher
from services.log.jetstream.reader import JetStreamReader
from services.log.jetstream.stream import STREAM
from services.log.protocol import Appended
from services.log.settings import LogSettings
from tests.support.appending import Log, new_event, open_log
from tests.support.polling import eventually


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    async with open_log(fresh_log) as opened:
        yield opened


def _events(number: int, size: int = 0) -> list[Event]:
    body = b'{"event_type":"A","payload":"' + b"x" * size + b'"}'
    return [new_event(f"c{index % 7}", body) for index in range(number)]


def _new(first: int, last: int) -> list[Appended]:
    return [Appended(sequence, duplicate=False) for sequence in range(first, last + 1)]


async def test_a_batch_gets_consecutive_positions_whatever_others_publish(log: Log) -> None:
    """The acknowledgement names the last one only; each event is read back at the position that follows from it."""
    # given
    reader = JetStreamReader(log.nc, LogSettings())
    batches = [_events(100), _events(200), _events(300)]
    others = _events(200)

    # when
    outcomes, singles = await asyncio.gather(
        asyncio.gather(*(log.publisher.append_batch(events) for events in batches)),
        asyncio.gather(*(log.publisher.append(event) for event in others)),
    )

    # then
    assert len({single.sequence for single in singles}) == 200
    for events, outcome in zip(batches, outcomes, strict=True):
        assert outcome == _new(outcome[0].sequence, outcome[0].sequence + len(events) - 1)
        for event, appended in list(zip(events, outcome, strict=True))[::17]:
            stored = await eventually(partial(reader.at, appended.sequence))  # a replica may lag
            assert stored is not None
            assert (event, appended.sequence) == (stored.event, stored.sequence)


async def test_the_largest_batch_is_stored_at_once(log: Log) -> None:
    """1,000 events: the broker's limit. One more is the caller's mistake."""
    assert await log.publisher.append_batch(_events(MAX_BATCH)) == _new(1, MAX_BATCH)
    with pytest.raises(ValueError, match="1 to 1000"):
        await log.publisher.append_batch(_events(MAX_BATCH + 1))


async def test_a_batch_larger_than_the_buffer_of_the_connection_is_sent_piece_by_piece(log: Log) -> None:
    """Single events meanwhile find room: the connection is never congested by a batch."""
    batch = asyncio.create_task(log.publisher.append_batch(_events(200, size=100_000)))
    singles = [await log.publisher.append(new_event()) for _ in range(20)]

    assert [outcome.duplicate for outcome in await batch] == [False] * 200
    assert log.publisher.retries == 0
    assert len(singles) == 20


async def test_a_batch_with_known_events_stores_the_new_ones_and_says_which_are_known(log: Log) -> None:
    """In the order of the events, with the first positions of those that were there."""
    # given
    events = _events(20)
    await log.publisher.append_batch(events[5:8])

    # when
    outcome = await log.publisher.append_batch(events)

    # then
    assert outcome[5:8] == [Appended(sequence, duplicate=True) for sequence in (1, 2, 3)]
    fresh = outcome[:5] + outcome[8:]
    assert sorted(one.sequence for one in fresh) == list(range(4, 21))
    assert not any(one.duplicate for one in fresh)
    assert await log.message_ids() == Counter(event.message_id for event in events)


async def test_the_events_of_a_consultation_are_never_on_their_way_at_the_same_time(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An election between two would store the later one first; consultations do not wait for each other."""
    # given
    events = _events(70)
    await log.publisher.append_batch(events[35:36])
    under_way: Counter[str] = Counter()
    most: Counter[str] = Counter()
    together = 0
    publish = Publisher._append_by

    async def watched(self: Publisher, event: Event, end: float) -> Appended:
        nonlocal together
        name = event.consultation
        under_way[name] += 1
        most[name] = max(most[name], under_way[name])
        together = max(together, under_way.total())
        try:
            return await publish(self, event, end)
        finally:
            under_way[name] -= 1

    monkeypatch.setattr(log.publisher, "_append_by", partial(watched, log.publisher))

    # when
    outcome = await log.publisher.append_batch(events)

    # then
    assert [1] * 7 == list(most.values())
    assert together == 7
    for consultation in most:
        stands = [
            one.sequence
            for event, one in zip(events, outcome, strict=True)
            if event.consultation == consultation and not one.duplicate
        ]
        assert sorted(stands) == stands


async def test_a_retry_waits_for_no_known_event_and_stores_the_new_ones_at_once(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many round trips as events would not end within the deadline. The persisters need not be there."""
    # given
    events = [new_event() for _ in range(200)]
    known = events[::2]
    reader = JetStreamReader(log.nc, LogSettings())
    publisher = Publisher(log.nc, deadline=20, max_in_flight=500, known=reader.known)
    await publisher.start()
    first = await publisher.append_batch(known)
    singly: list[Event] = []
    under_way = together = 0
    publish = publisher._append_by

    async def watched(event: Event, end: float) -> Appended:
        nonlocal under_way, together
        singly.append(event)
        under_way += 1
        together = max(together, under_way)
        try:
            return await publish(event, end)
        finally:
            under_way -= 1

    monkeypatch.setattr(publisher, "_append_by", watched)

    # when
    outcome = await publisher.append_batch(events)
    await publisher.close()

    # then
    assert (known, MAX_SINGLES) == (singly, together)
    assert [Appended(one.sequence, duplicate=True) for one in first] == outcome[::2]
    assert _new(101, 200) == outcome[1::2]


async def test_behind_an_event_that_fails_its_consultation_waits_for_the_retry(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come into the stream later, and then they would stand before it. Others are stored all the same."""
    # given
    events = _events(28)
    await log.publisher.append_batch(events[:2])
    publish = Publisher._append_by

    async def failing(event: Event, end: float) -> Appended:
        if event is events[7]:
            raise LogUnavailableError("an election")
        return await publish(log.publisher, event, end)

    monkeypatch.setattr(log.publisher, "_append_by", failing)

    # when
    with pytest.raises(LogUnavailableError, match="an election"):
        await log.publisher.append_batch(events)

    # then
    stored = [event.message_id for event in events if event.consultation != "c0" or event is events[0]]
    assert await log.message_ids() == Counter(stored)
    monkeypatch.undo()
    outcome = await log.publisher.append_batch(events)
    of_it = [one.sequence for event, one in zip(events, outcome, strict=True) if event.consultation == "c0"]
    assert sorted(of_it) == of_it


async def test_a_batch_that_is_sent_again_gets_the_first_positions(log: Log) -> None:
    """The retry of a client whose connection broke."""
    events = _events(50)
    await log.publisher.append_batch(events)

    assert await log.publisher.append_batch(events) == [Appended(at, duplicate=True) for at in range(1, 51)]


async def test_a_single_event_is_a_batch_too(log: Log) -> None:
    """Published as any event."""
    (event,) = _events(1)

    assert await log.publisher.append_batch([event]) == _new(1, 1)
    assert await log.publisher.append_batch([event]) == [Appended(1, duplicate=True)]


async def test_the_same_batch_from_several_writers_at_once_is_stored_once(log: Log) -> None:
    """The broker tells all but one to wait; they learn its positions in the end."""
    events = _events(100)

    outcomes = await asyncio.gather(*(log.publisher.append_batch(events) for _ in range(4)))

    assert {tuple(one.sequence for one in outcome) for outcome in outcomes} == {tuple(range(1, 101))}
    assert await log.message_ids() == Counter(event.message_id for event in events)


async def test_more_batches_than_the_broker_takes_wait_for_their_turn(log: Log) -> None:
    """None of them fails, though the broker takes 50 at once."""
    batches = [_events(5) for _ in range(60 + MAX_BATCHES_UNDER_WAY)]

    outcomes = await asyncio.gather(*(log.publisher.append_batch(events) for events in batches))

    assert sorted(one.sequence for outcome in outcomes for one in outcome) == list(range(1, 5 * len(batches) + 1))


async def test_a_batch_that_a_full_stream_has_no_room_for_leaves_nothing(fresh_log: Cluster) -> None:
    """Told at once; a smaller one still fits."""
    async with open_log(fresh_log, max_bytes=2**20) as log:
        with pytest.raises(LogFullError):
            await log.publisher.append_batch(_events(30, size=60_000))

        assert await log.message_ids() == Counter()
        assert await log.publisher.append_batch(_events(10, size=60_000)) == _new(1, 10)


async def test_a_message_too_large_for_the_server_is_refused_before_anything_is_sent(log: Log) -> None:
    """The server would end the connection that all requests of this process share."""
    events = [*_events(3), new_event(body=b"x" * (log.nc.max_payload - 50))]

    with pytest.raises(LogRefusedError, match="exceeds the server's limit"):
        await log.publisher.append_batch(events)

    assert await log.publisher.append_batch(_events(2)) == _new(1, 2)


async def test_without_a_majority_the_deadline_holds_and_the_retry_stores_each_event_once(fresh_log: Cluster) -> None:
    """The outcome is open until the nodes are back; the same batch again makes it one copy of each."""
    async with open_log(fresh_log, deadline=2) as log:
        # given
        events = _events(30)
        leader = await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM)
        others = [index for index in range(3) if index != leader]
        for index in others:
            fresh_log.kill(index)

        # when
        with pytest.raises(LogUnavailableError, match="within 2 s"):
            await log.publisher.append_batch(events)

        # then
        for index in others:
            fresh_log.start_node(index)
        await eventually(lambda: _succeeds(log, events))
        assert await log.message_ids() == Counter(event.message_id for event in events)


async def test_the_leaders_death_under_batches_stores_every_event_once(fresh_log: Cluster) -> None:
    """Batches that lose their beginning, their acknowledgement or their leader: none is torn, none repeated."""
    async with open_log(fresh_log, deadline=3) as log:
        # given
        stop = asyncio.Event()
        acknowledged: list[str] = []

        async def write() -> None:
            while not stop.is_set():
                events = _events(50)
                while not await _succeeds(log, events):
                    pass
                acknowledged.extend(event.message_id for event in events)

        writers = [asyncio.create_task(write()) for _ in range(6)]
        await eventually(lambda: len(acknowledged) > 1_000)

        # when
        leader = await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM)
        fresh_log.kill(leader)
        before = len(acknowledged)
        await eventually(lambda: len(acknowledged) > before + 1_000)
        stop.set()
        await asyncio.gather(*writers)

        # then
        assert await log.message_ids() == Counter(acknowledged)


async def _succeeds(log: Log, events: list[Event]) -> bool:
    try:
        await log.publisher.append_batch(events)
    except (LogUnavailableError, DuplicateInFlightError):
        return False
    return True
