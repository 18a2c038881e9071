"""The publisher on a real cluster: every acknowledged message is stored once, and no call outlives its deadline."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from fiq.event import Event
from services.cli.embedded.processes import Cluster
from services.log.errors import (
    DuplicateInFlightError,
    LogFullError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from services.log.jetstream import publisher as publishing
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import close, connect
from services.log.jetstream.publisher import FEW_IN_FLIGHT, Publisher
from services.log.jetstream.stream import DEAD_STREAM, STREAM, dead_subject
from services.log.protocol import Appended
from services.log.settings import LogSettings
from tests.support.appending import Log, new_event, open_log
from tests.support.lossy import lossy
from tests.support.polling import eventually


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    async with open_log(fresh_log) as opened:
        yield opened


async def test_a_new_event_gets_the_next_position(log: Log) -> None:
    """And is stored byte for byte, with its headers, under its partition."""
    event = new_event()

    first, second = await log.publisher.append(event), await log.publisher.append(new_event())

    assert (first, second) == (Appended(1, duplicate=False), Appended(2, duplicate=False))
    stored = await JetStreamApi(log.nc).get_message(STREAM, 1)
    assert stored is not None
    assert (stored["subject"], stored["data"]) == ("fi.events.9.c1", event.body)
    assert stored["headers"] == event.headers()


async def test_a_retry_gets_the_first_ones_position(log: Log) -> None:
    """The broker knows the message id."""
    event = new_event()
    await log.publisher.append(event)
    await log.publisher.append(new_event())

    assert await log.publisher.append(event) == Appended(1, duplicate=True)


async def test_writers_of_the_same_id_at_once_learn_the_same_position(log: Log) -> None:
    """While one is being stored the broker tells the others to wait; they do, inside their deadline."""
    events = [new_event(f"c{number}") for number in range(20)]

    outcomes = await asyncio.gather(*(log.publisher.append(event) for event in events for _ in range(5)))

    positions = [{outcome.sequence for outcome in outcomes[start : start + 5]} for start in range(0, 100, 5)]
    assert all(len(same) == 1 for same in positions)
    assert set.union(*positions) == set(range(1, 21))


async def test_a_dead_letter_goes_to_its_own_stream(log: Log) -> None:
    """The same publisher, the same duplicate window."""
    headers = {"Nats-Msg-Id": "fi-events/1/7"}

    first = await log.publisher.publish(dead_subject(3), b"?", headers)
    again = await log.publisher.publish(dead_subject(3), b"?", headers)

    assert (first, again) == (Appended(1, duplicate=False), Appended(1, duplicate=True))
    stored = await JetStreamApi(log.nc).get_message(DEAD_STREAM, 1)
    assert stored is not None
    assert stored["subject"] == "fi.dead.3"


async def test_a_full_stream_is_told_at_once_and_drops_nothing(fresh_log: Cluster) -> None:
    """Exactly what was acknowledged is stored; after a purge events are taken again."""
    async with open_log(fresh_log, max_bytes=2**20) as log:
        # given
        for _ in range(16):
            await log.publisher.append(new_event(body=b"x" * 64_000))

        # when
        started = time.monotonic()
        with pytest.raises(LogFullError):
            await log.publisher.append(new_event(body=b"x" * 64_000))

        # then
        assert time.monotonic() - started < 10  # half of the deadline
        assert len(await log.message_ids()) == 16
        await JetStreamApi(log.nc).purge(STREAM, 10)
        assert (await log.publisher.append(new_event(body=b"x" * 64_000))).sequence == 17


async def test_without_a_majority_the_deadline_holds_and_nothing_is_lost(fresh_log: Cluster) -> None:
    """The outcome is open, so the same event is sent again when the nodes are back: one copy."""
    async with open_log(fresh_log, deadline=2) as log:
        # given
        event = new_event()
        leader = await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM)
        others = [index for index in range(3) if index != leader]
        for index in others:
            fresh_log.kill(index)

        # when
        started = time.monotonic()
        with pytest.raises(LogUnavailableError, match="within 2 s"):
            await log.publisher.append(event)

        # then
        assert 1.9 < time.monotonic() - started < 12  # the nodes stay away
        for index in others:
            fresh_log.start_node(index)
        await eventually(lambda: _succeeds(log.publisher, event))
        assert await log.message_ids() == {event.message_id: 1}


async def test_the_leaders_death_under_200_writers_stores_every_acknowledged_event_once(fresh_log: Cluster) -> None:
    """Retries with the same id, inside each call and by the caller, while a new leader is elected."""
    async with open_log(fresh_log, deadline=3) as log:
        # given
        stop = asyncio.Event()
        acknowledged: list[str] = []

        async def write(number: int) -> None:
            while not stop.is_set():
                event = new_event(f"c{number}")
                while not await _succeeds(log.publisher, event):
                    pass
                acknowledged.append(event.message_id)
                await asyncio.sleep(0.2)

        writers = [asyncio.create_task(write(number)) for number in range(200)]
        await eventually(lambda: len(acknowledged) > 400)

        # when
        leader = await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM)
        fresh_log.kill(leader)
        before = len(acknowledged)
        await eventually(lambda: len(acknowledged) > before + 600)
        stop.set()
        await asyncio.gather(*writers)

        # then
        assert len(set(acknowledged)) == len(acknowledged)
        assert await log.message_ids() == Counter(acknowledged)
        assert log.publisher.retries > 0
        assert log.publisher.in_flight == 0


async def test_the_loss_of_the_clients_own_node_is_bridged(log: Log) -> None:
    """The client learned of the other nodes from its own one, and goes on with them within the deadline."""
    # given
    leader = await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)
    own = (leader + 1) % 3
    nc = await connect(LogSettings(servers=(log.cluster.urls[own],)), name="test", on_closed=pytest.fail)
    publisher = Publisher(nc, deadline=20, max_in_flight=10)
    await publisher.start()
    await publisher.append(new_event())

    # when
    log.cluster.kill(own)
    outcome = await publisher.append(new_event())

    # then
    assert outcome.sequence == 2
    await close(nc)


async def test_one_more_than_the_limit_in_flight_fails_at_once(fresh_log: Cluster) -> None:
    """Nothing queues; a slot is free again when its call ends."""
    async with open_log(fresh_log, max_in_flight=2) as log:
        outcomes = await asyncio.gather(*(log.publisher.append(new_event()) for _ in range(3)), return_exceptions=True)

        assert [type(outcome) for outcome in outcomes] == [Appended, Appended, TooManyInFlightError]
        assert log.publisher.in_flight == 0
        assert (await log.publisher.append(new_event())).sequence == 3


async def test_a_cancelled_call_leaves_nothing_behind(log: Log) -> None:
    """A client that hung up frees its slot; the late answer does no harm."""
    calls = [asyncio.create_task(log.publisher.append(new_event())) for _ in range(50)]
    await asyncio.sleep(0)
    assert log.publisher.in_flight == 50

    for call in calls:
        call.cancel()
    await asyncio.wait(calls)

    assert all(call.cancelled() for call in calls)
    assert log.publisher.in_flight == 0
    assert not (await log.publisher.append(new_event())).duplicate


async def test_a_message_that_the_server_would_not_take_is_refused_here(log: Log) -> None:
    """The server would end the connection that all requests of this process share."""
    body = b"x" * (log.nc.max_payload - 50)

    with pytest.raises(LogRefusedError, match="exceeds the server's limit"):
        await log.publisher.append(new_event(body=body))

    assert (await log.publisher.append(new_event())).sequence == 1


async def test_what_gathers_while_others_are_in_flight_goes_as_one_batch(log: Log) -> None:
    """A few go as they come; the others cost the cluster one agreement together."""
    events = [new_event(f"c{number}") for number in range(60)]

    appended = await asyncio.gather(*(log.publisher.append(event) for event in events))

    assert sorted(one.sequence for one in appended) == list(range(1, 61))
    assert not any(one.duplicate for one in appended)
    api = JetStreamApi(log.nc)
    batches: Counter[str] = Counter()
    for event, one in zip(events, appended, strict=True):
        stored = await api.get_message(STREAM, one.sequence)
        assert stored is not None
        assert stored["headers"]["Nats-Msg-Id"] == event.message_id
        batches[stored["headers"].get("Nats-Batch-Id", "")] += 1
    assert batches.pop("") == FEW_IN_FLIGHT
    assert [60 - FEW_IN_FLIGHT] == list(batches.values())


async def test_a_known_event_among_those_that_gathered_costs_the_others_one_more_try(log: Log) -> None:
    """The broker refuses their batch as a whole; each of them is stored once all the same, and at once."""
    known = [new_event(f"k{number}") for number in range(3)]
    for event in known:
        await log.publisher.append(event)
    before = log.publisher.retries
    fresh = [new_event(f"c{number}") for number in range(40)]

    appended = await asyncio.gather(*(log.publisher.append(event) for event in [*fresh[:20], *known, *fresh[20:]]))

    assert [one.sequence for one in appended[20:23]] == [1, 2, 3]
    assert all(one.duplicate for one in appended[20:23])
    assert not any(one.duplicate for one in [*appended[:20], *appended[23:]])
    assert await log.message_ids() == Counter(event.message_id for event in [*known, *fresh])
    assert log.publisher.retries - before <= 2


async def test_the_same_event_twice_among_those_that_gathered_is_stored_once(log: Log) -> None:
    """A client that does not wait for the answer before it tries again."""
    event = new_event()
    others = [new_event(f"c{number}") for number in range(20)]

    appended = await asyncio.gather(*(log.publisher.append(one) for one in [*others, event, event]))

    assert appended[-1].sequence == appended[-2].sequence
    assert await log.message_ids() == Counter(one.message_id for one in [*others, event])


async def test_what_gathers_does_not_wait_for_an_answer_that_got_lost(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tries again, and others wait for it once at most, not each time."""
    monkeypatch.setattr(publishing, "GATHER_SECONDS", 1.0)  # so long that a busy machine makes no difference
    first, lost = new_event(), asyncio.Event()
    rounds, loop = 20, asyncio.get_running_loop()
    losing = True

    def loses(message: bytes) -> bool:
        found = losing and b'"stream":"fi-events"' in message and re.search(rb'"seq":1\b', message) is not None
        if found:
            lost.set()
        return found

    async with lossy(log.cluster.urls[0], loses) as url:
        nc = await connect(LogSettings(servers=(url,)), name="lossy", on_closed=pytest.fail)
        publisher = Publisher(nc, deadline=60, max_in_flight=500)
        await publisher.start()
        slow = asyncio.create_task(publisher.append(first))
        await lost.wait()

        # when
        began = loop.time()
        for _ in range(rounds):
            await asyncio.gather(*(publisher.append(new_event(f"c{number}")) for number in range(10)))

        # then
        assert loop.time() - began < rounds / 2
        assert not slow.done()
        losing = False
        assert await slow == Appended(1, duplicate=True)
        await publisher.close()
        await close(nc)


async def test_closing_lets_what_has_gathered_end(log: Log) -> None:
    """Also what waits for another group, and what is not in flight at that very moment."""
    events = [new_event(f"c{number}") for number in range(600)]
    async with open_log(log.cluster, max_in_flight=1000) as other:
        appending = [asyncio.create_task(other.publisher.append(event)) for event in events]
        batch = asyncio.create_task(other.publisher.append_batch([events[0], new_event("b1"), new_event("b1")]))
        await asyncio.sleep(0)

        await other.publisher.close(grace=30)

        stored = await asyncio.gather(*appending, batch)
        assert len(events) + 1 == len(stored)
        with pytest.raises(LogUnavailableError, match="not open"):
            await other.publisher.append(new_event())


async def test_copies_of_an_event_do_not_hold_up_the_others(log: Log) -> None:
    """A batch takes each id once; the copies go alone, and no later batch is refused because of them."""
    filler, same = [new_event(f"f{number}") for number in range(FEW_IN_FLIGHT)], new_event()
    others = [new_event(f"c{number}") for number in range(20)]

    outcomes = await asyncio.gather(*(log.publisher.append(event) for event in [*filler, *[same] * 20, *others]))

    assert 1 == len({one.sequence for one in outcomes[len(filler) : -len(others)]})
    assert await log.message_ids() == Counter(event.message_id for event in [*filler, same, *others])
    stored = await JetStreamApi(log.nc).get_message(STREAM, outcomes[-1].sequence)
    assert stored is not None
    assert str(len(others) + 1) == stored["headers"]["Nats-Batch-Sequence"]


async def _succeeds(publisher: Publisher, event: Event) -> bool:
    try:
        await publisher.append(event)
    except (LogUnavailableError, DuplicateInFlightError):
        # the second one when an earlier call's copy waits in the leader for its majority
        return False
    return True
