"""The follower on a real three-node cluster: in order, without gaps or repeats, whatever happens to the consumer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from services.cli.cluster import Cluster
from services.eventlog.errors import LogMismatchError, PlacementError
from services.eventlog.jetstream import continuity
from services.eventlog.jetstream.budget import Budget, Held
from services.eventlog.jetstream.connection import Connection
from services.eventlog.jetstream.follower import JetStreamFollower
from services.eventlog.jetstream.names import STREAM, consumer_name, subject_of
from services.eventlog.jetstream.placement import Placements
from services.eventlog.jetstream.provision import provision
from services.eventlog.protocol import Delivery
from services.eventlog.settings import LogSettings
from tests.support.cluster import delete_streams
from tests.support.persisters import Log as ProvisionedLog
from tests.support.persisters import provisioned
from tests.support.polling import eventually
from tests.support.raw_nats import message, publish_raw

#: one partition, so that stream sequences are the follower's sequences
PARTITIONS = 1


class Log(ProvisionedLog):
    """A provisioned log with the one partition's consumer, and what the tests do with it."""

    @property
    def consumer(self) -> str:
        return consumer_name(self.settings.store, 0)

    def follower(
        self, on_repair: Callable[[str], None] = lambda _: None, max_events: int = 64, budget: Budget | None = None
    ) -> JetStreamFollower:
        budget = budget or Budget(max_events, 0)
        return JetStreamFollower(self.nc, self.consumer, 0, self.identity, budget=budget, on_repair=on_repair)


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    async with provisioned(fresh_log, partitions=PARTITIONS) as made:
        await Placements(made.nc, made.settings).claim(0, "volume", 1)
        yield Log(**vars(made))


async def take(follower: JetStreamFollower, count: int, *, acknowledge: bool = True) -> list[Delivery]:
    """Read *count* deliveries in whatever batches they come."""
    taken: list[Delivery] = []
    async with asyncio.timeout(40):
        while len(taken) < count:
            batch = await follower.batch(max_events=count - len(taken), max_bytes=2**20)
            taken += batch
            if acknowledge:
                await follower.acknowledge(batch[-1])
    return taken


def sequences(deliveries: list[Delivery]) -> list[int]:
    return [delivery.sequence for delivery in deliveries]


async def test_everything_behind_the_position_comes_in_order(log: Log) -> None:
    """More events than the buffer holds, so that several pulls follow each other."""
    await log.publish(300)
    follower = log.follower()
    await follower.start(100)
    assert list(range(101, 301)) == sequences(await take(follower, 200))
    await follower.close()


async def test_the_buffer_holds_no_more_than_it_may(log: Log) -> None:
    """Also on three nodes, where a pull ends long before its messages come; the bound is a process's memory."""
    await log.publish(200)
    follower = log.follower(max_events=8)
    await follower.start(0)
    assert [1] == sequences(await take(follower, 1))

    async def everything_sent_has_come() -> bool:
        assert len(follower._buffer) <= 8
        info = await log.api.consumer_info(STREAM, log.consumer)
        return info is not None and bool(info["delivered"]["consumer_seq"] == 1 + len(follower._buffer))

    await eventually(everything_sent_has_come)
    assert list(range(2, 201)) == sequences(await take(follower, 199))
    await follower.close()


async def test_a_busy_follower_takes_what_idle_ones_of_its_process_leave(log: Log) -> None:
    """An equal part of it would keep the batches of the one small; those that are idle keep their minimum."""
    budget = Budget(256, 2**24)
    shares = [budget.join(lambda: Held(16, 0, busy=False), largest=2**10) for _ in range(3)]
    await log.publish(600)
    follower = log.follower(budget=budget)
    await follower.start(0)
    taken = await take(follower, 1)
    await eventually(lambda: len(follower._buffer) > 256 // 4)
    while len(taken) < 600:
        batch = await follower.batch(max_events=8192, max_bytes=2**24)
        taken += batch
        assert len(batch) <= follower._held().events <= 256 - 3 * 16
    assert list(range(1, 601)) == sequences(taken)
    await follower.close()
    assert 256 - 3 * 16 > shares[0].room().all_events


async def test_an_idle_follower_gets_a_new_event_at_once(log: Log) -> None:
    """A pull is open all the time, so nothing waits for a poll."""
    follower = log.follower()
    await follower.start(0)
    waiting = asyncio.create_task(take(follower, 1))
    await log.publish(1)
    async with asyncio.timeout(2):
        delivery = (await waiting)[0]
    expected = (1, "c0", b'{"event_type":"T","payload":0}')
    assert expected == (delivery.sequence, delivery.consultation, delivery.body)
    await follower.close()


async def test_an_acknowledgement_moves_the_consumers_floor(log: Log) -> None:
    """Operators and trim see in the consumer what the sink has committed."""
    await log.publish(10)
    follower = log.follower()
    await follower.start(0)
    taken = await take(follower, 10, acknowledge=False)
    await follower.acknowledge(taken[6])

    async def floor() -> bool:
        info = await log.api.consumer_info(STREAM, log.consumer)
        return info is not None and info["ack_floor"]["stream_seq"] == 7 and info["num_ack_pending"] == 3

    await eventually(floor)
    await follower.close()


async def test_a_foreign_pull_that_steals_messages_is_seen_as_a_gap_and_repaired(log: Log) -> None:
    """Somebody runs `nats consumer next` on our consumer: what he took is delivered to us all the same."""
    repairs: list[str] = []
    await log.publish(100)
    follower = log.follower(repairs.append, max_events=8)
    await follower.start(0)
    first = await take(follower, 5)
    thief = await log.nc.subscribe("thief")
    await log.nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{log.consumer}", b'{"batch":20,"no_wait":true}', "thief")
    await thief.next_msg(timeout=5)
    assert list(range(1, 101)) == sequences(first + await take(follower, 95))
    assert "gap" in repairs
    await follower.close()


async def test_a_repair_skips_what_was_handed_out_and_never_moves_the_floor_beyond_what_is_committed(log: Log) -> None:
    """Handed out is not committed: the floor is what trim may delete."""
    await log.publish(50)
    follower = log.follower()
    await follower.start(0)
    first = await take(follower, 30, acknowledge=False)
    await follower.acknowledge(first[9])
    await log.api.reset_consumer(STREAM, log.consumer, 1)  # somebody resets our consumer: sequences repeat
    assert list(range(31, 51)) == sequences(await take(follower, 20, acknowledge=False))
    info = await log.api.consumer_info(STREAM, log.consumer)
    assert info is not None
    assert info["ack_floor"]["stream_seq"] <= 10
    await follower.close()


async def test_going_back_delivers_again_from_there(log: Log) -> None:
    """A corpus restored from an older backup heals by itself while the stream still holds the events."""
    await log.publish(20)
    follower = log.follower()
    await follower.start(0)
    await take(follower, 20)
    await follower.start(5)
    assert list(range(6, 21)) == sequences(await take(follower, 15))
    await follower.close()


async def test_nothing_is_lost_or_repeated_when_the_consumers_leader_is_killed(log: Log) -> None:
    """kill -9 of the node that leads stream or consumer, in the middle of the flow."""
    follower = log.follower()
    await follower.start(0)
    reading = asyncio.create_task(take(follower, 600))
    await log.publish(200)
    info = await log.api.consumer_info(STREAM, log.consumer)
    assert info is not None
    victim = log.cluster.names.index(info["cluster"]["leader"])
    log.cluster.kill(victim)
    await log.publish(200)
    log.cluster.start_node(victim)
    await log.publish(200)
    taken = sequences(await reading)
    # an append that was retried after a time-out may stand in the stream once only: message ids see to that
    assert list(range(1, 601)) == taken
    await follower.close()


async def test_a_recreated_stream_is_refused(log: Log) -> None:
    """It starts at sequence 1 again; the position of the old one means nothing in it."""
    await log.publish(3)
    await delete_streams(log.cluster)
    await provision(log.nc, log.settings)
    await Placements(log.nc, log.settings).claim(0, "volume", 1)
    with pytest.raises(LogMismatchError, match="was created at"):
        await log.follower().start(3)


async def test_a_stream_recreated_while_following_stops_the_follower(log: Log) -> None:
    """The follower waits for events; the error must come to it by itself."""
    await log.publish(3)
    follower = log.follower()
    await follower.start(0)
    await take(follower, 3)
    waiting = asyncio.create_task(take(follower, 1))
    await delete_streams(log.cluster)
    await provision(log.nc, log.settings)
    with pytest.raises((LogMismatchError, PlacementError)):
        await waiting
    await follower.close()


async def test_a_position_beyond_the_stream_is_refused(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker would accept the reset and deliver nothing until it gets there."""
    monkeypatch.setattr(continuity, "LAG_SECONDS", 0.5)
    await log.publish(3)
    with pytest.raises(LogMismatchError, match=r"ends at 3: .*begin a new corpus for it in another directory"):
        await log.follower().start(4)


async def test_a_leader_that_lags_behind_the_file_is_waited_for(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of all nodes it says a smaller last sequence until it has applied what it has."""
    monkeypatch.setattr(continuity, "PATIENCE_SECONDS", 0.5)
    await log.publish(3)
    follower = log.follower()
    starting = asyncio.create_task(follower.start(4))
    done, _ = await asyncio.wait({starting}, timeout=1.5)
    assert not done, "it gave up, or followed a log that ends before its position"
    await log.publish(2)
    await starting
    assert [5] == sequences(await take(follower, 1))
    await follower.close()


async def test_a_position_before_trimmed_events_is_refused(log: Log) -> None:
    """The partition file is an older copy, and what it lacks is no longer in the stream."""
    await log.publish(10)
    assert 7 == await log.api.purge(STREAM, 8)
    with pytest.raises(LogMismatchError, match="old copy"):
        await log.follower().start(5)


async def test_an_idle_partition_moves_the_floor_without_events(log: Log) -> None:
    """Trim would stop at its last event for ever; a restart must find it behind whatever was trimmed."""
    await log.publish(10)
    follower = log.follower()
    await follower.start(0)
    await take(follower, 10, acknowledge=False)
    waiting = asyncio.create_task(take(follower, 1))
    follower.advance(10)
    await eventually(lambda: _floor_is(log, 10))
    await log.publish(1)
    assert [11] == sequences(await waiting)
    await follower.close()


async def test_a_new_store_may_begin_after_trimmed_events(log: Log) -> None:
    """It never had them, and nothing says that it should."""
    await log.publish(10)
    await log.api.purge(STREAM, 8)
    follower = log.follower()
    await follower.start(0)
    assert [8, 9, 10] == sequences(await take(follower, 3))
    await follower.close()


async def test_a_deleted_consumer_stops_the_follower(log: Log) -> None:
    """Silence would leave the partition standing for ever."""
    follower = log.follower()
    await follower.start(0)
    waiting = asyncio.create_task(take(follower, 1))
    await log.api.request(f"CONSUMER.DELETE.{STREAM}.{log.consumer}")
    with pytest.raises(PlacementError, match="is gone"):
        await waiting
    await follower.close()


async def test_a_message_without_headers_or_with_a_strange_subject_comes_like_any_other(log: Log) -> None:
    """Whether it is poison is not the follower's to say."""
    await log.nc.publish(subject_of("no-headers"), b"\xff\xfe")
    await log.nc.publish(subject_of("c?2"), b"x", headers={"Nats-Msg-Id": "m"})
    await log.nc.flush()
    follower = log.follower()
    await follower.start(0)
    taken = await take(follower, 2)
    assert [("no-headers", None), ("c?2", {"Nats-Msg-Id": "m"})] == [(d.consultation, d.headers) for d in taken]
    await follower.close()


async def test_a_subject_that_the_routes_do_not_carry_is_read_otherwise(log: Log) -> None:
    """A carriage return: the node that leads the consumer cannot send it to the node that we are connected to."""
    info = await log.api.consumer_info(STREAM, log.consumer)
    assert info is not None
    elsewhere = next(i for i, name in enumerate(log.cluster.names) if name != info["cluster"]["leader"])
    connection = Connection(LogSettings(), lambda _: None)
    await connection.connect(log.cluster.urls[elsewhere], allow_reconnect=False)
    await log.publish(3)
    leader = await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)  # a route would cut the subject
    await publish_raw(log.cluster.urls[leader], [message(b"a\rb")])
    await eventually(lambda: _last_is(log, 4))
    await log.publish(3)
    follower = JetStreamFollower(connection, log.consumer, 0, log.identity, budget=Budget(64, 0))
    await follower.start(0)
    taken = await take(follower, 7)
    assert list(range(1, 8)) == sequences(taken)
    assert ("a\rb", b"garbage") == (taken[3].consultation, taken[3].body)
    await eventually(lambda: _floor_is(log, 7))
    await follower.close()
    await connection.close()


async def _last_is(log: Log, sequence: int) -> bool:
    info = await log.api.stream_info(STREAM)
    return info is not None and bool(info["state"]["last_seq"] == sequence)


async def _floor_is(log: Log, sequence: int) -> bool:
    info = await log.api.consumer_info(STREAM, log.consumer)
    return info is not None and bool(info["ack_floor"]["stream_seq"] == sequence)
