"""The follower on a real three-node cluster: in order, without gaps or repeats, whatever happens to its cursors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from services.cli.embedded.processes import Cluster
from services.log.errors import LogMismatchError
from services.log.jetstream import follower as module
from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.follower import Budget, Held
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.stream import STREAM, cursor_config, provision, subject_of
from services.log.partitions import partition_of
from services.log.protocol import Position
from services.log.settings import LogSettings
from tests.support.cluster import delete_streams
from tests.support.following import Sink, until
from tests.support.persisters import Log, provisioned
from tests.support.polling import eventually, eventually_sync
from tests.support.raw_nats import message, publish_raw

#: a frozen node is noticed after three seconds, and an election may follow, seconds
FROZEN_SECONDS = 10.0


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    """One partition, so that stream sequences are the follower's sequences."""
    async with provisioned(fresh_log, partitions=1) as made:
        yield made


def sink(log: Log, **options: object) -> Sink:
    return Sink(log.nc, log.identity, **options)  # type: ignore[arg-type]  # checked by the tests that pass some


# -- in order ---------------------------------------------------------------------------------------------------------


async def test_everything_after_the_position_comes_in_order(log: Log) -> None:
    """More events than the buffer holds, so that several pulls follow each other."""
    await log.publish(300)
    async with sink(log).following(100) as reader:
        assert list(range(101, 301)) == await reader.take(200)


async def test_the_buffer_holds_no_more_than_it_may(log: Log) -> None:
    """A pull ends before its messages come; the bound is a process's memory."""
    await log.publish(200)
    async with sink(log, max_events=8).following() as reader:
        assert [1] == await reader.take(1)

        async def everything_sent_has_come() -> bool:
            assert reader.follower.ready <= 8
            info = await reader.cursor()
            return bool(info["delivered"]["consumer_seq"] == 1 + reader.follower.ready)

        await eventually(everything_sent_has_come)
        assert list(range(2, 201)) == await reader.take(199)


async def test_a_busy_follower_takes_what_idle_ones_of_its_process_leave(log: Log) -> None:
    """An equal part of it would keep the batches of the one small; those that are idle keep their minimum."""
    budget = Budget(256, 2**24)
    shares = [budget.join(lambda: Held(16, 0, busy=False), largest=2**10) for _ in range(3)]
    await log.publish(600)
    async with sink(log, budget=budget).following() as reader:
        taken = await reader.take(1)
        await eventually(lambda: reader.follower.ready > 256 // 4)
        while len(taken) < 600:
            taken += await reader.take(min(100, 600 - len(taken)))
            assert reader.follower._held().events <= 256 - 3 * 16
        assert list(range(1, 601)) == taken
    assert 256 - 3 * 16 > shares[0].room().all_events


async def test_an_idle_follower_gets_a_new_event_at_once(log: Log) -> None:
    """A pull is open all the time, so nothing waits for a poll."""
    async with sink(log).following() as reader:
        waiting = asyncio.create_task(reader.take(1, timeout=2))
        await log.publish(1)
        await waiting
        delivery = reader.taken[0]
        expected = (1, "c0", b'{"event_type":"T","payload":0}')
        assert expected == (delivery.sequence, delivery.consultation, delivery.body)


async def test_what_waits_is_known_from_the_start(log: Log) -> None:
    """Operators and ingest's back-pressure read it, and it falls with each acknowledgement."""
    await log.publish(30)
    async with sink(log, max_events=8).following(10) as reader:
        assert 20 == reader.follower.waiting
        await reader.take(15)
        assert 5 == reader.follower.waiting
        await reader.take(5)
        assert 0 == reader.follower.waiting


async def test_an_acknowledgement_moves_the_cursors_floor(log: Log) -> None:
    """`nats consumer report fi-events` shows what waits, also when the process has ended."""
    await log.publish(10)
    reader = sink(log)
    async with reader.following():
        await reader.take(10, acknowledge=False)
        await reader.follower.acknowledge(reader.taken[6], {})
        floor = until(lambda info: info["ack_floor"]["stream_seq"] == 7 and info["num_ack_pending"] == 3, reader)
        await eventually(floor)
    await log.publish(5)
    # the broker may have sent some to the pull of the process that has ended: they are pending all the same
    await eventually(until(lambda info: info["num_pending"] + info["num_ack_pending"] == 3 + 5, reader))


async def test_going_back_delivers_again_from_there(log: Log) -> None:
    """A corpus restored from an older backup heals by itself while the stream still holds the events."""
    await log.publish(20)
    async with sink(log).following() as reader:
        await reader.take(20)
        await reader.follower.start(Position(5))
        assert list(range(6, 21)) == await reader.take(15)


async def test_a_message_without_headers_or_with_a_strange_subject_comes_like_any_other(log: Log) -> None:
    """Whether it is poison is not the follower's to say."""
    await log.nc.publish(subject_of("no-headers"), b"\xff\xfe")
    await log.nc.publish(subject_of("c?2"), b"x", headers={"Nats-Msg-Id": "m"})
    await log.nc.flush()
    async with sink(log).following() as reader:
        await reader.take(2)
        assert [("no-headers", None), ("c?2", {"Nats-Msg-Id": "m"})] == [
            (delivery.consultation, delivery.headers) for delivery in reader.taken
        ]


async def test_a_subject_that_the_routes_do_not_carry_is_read_otherwise(log: Log) -> None:
    """A carriage return: a cursor on another node cannot send it to the node that we are connected to."""
    await log.publish(3)
    leader = await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)  # a route would cut the subject
    await publish_raw(log.cluster.urls[leader], [message(b"a\rb")])
    await eventually(lambda: _last_is(log, 4))
    await log.publish(3)
    connection = await _connected(log, leader)
    async with Sink(connection, log.identity).following() as reader:
        taken = await reader.take(7)
        assert list(range(1, 8)) == taken
        # a line that is read in two pieces loses the carriage return
        assert ("ab", b"garbage") == (reader.taken[3].consultation.replace("\r", ""), reader.taken[3].body)
        await eventually(until(lambda info: info["ack_floor"]["stream_seq"] == 7, reader))
    await connection.close()


# -- repairs ----------------------------------------------------------------------------------------------------------


async def test_a_foreign_pull_that_steals_messages_is_seen_as_a_gap_and_repaired(log: Log) -> None:
    """An operator runs `nats consumer next` on our cursor: we still receive what that took."""
    await log.publish(100)
    async with sink(log, max_events=8).following() as reader:
        first = await reader.take(5)
        (cursor,) = await reader.cursors()
        thief = await log.nc.subscribe("thief")
        await log.nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{cursor}", b'{"batch":20,"no_wait":true}', "thief")
        await thief.next_msg(timeout=5)
        assert list(range(1, 101)) == first + await reader.take(95)
        assert "gap" in reader.repairs


async def test_a_repair_begins_at_what_is_committed_and_skips_what_was_handed_out(log: Log) -> None:
    """Handed out is not committed: the sink may fail and ask for it again."""
    await log.publish(50)
    async with sink(log).following() as reader:
        await reader.take(30, acknowledge=False)
        await reader.follower.acknowledge(reader.taken[9], {})
        await _delete_cursors(log, reader)
        await eventually(lambda: _cursors_are(reader, ["fi-workers-main-00-2"]))
        assert list(range(31, 51)) == await reader.take(20, acknowledge=False)
        info = await reader.cursor()
        assert 11 == info["config"]["opt_start_seq"]


async def test_a_deleted_cursor_is_made_anew(log: Log) -> None:
    """An operator may delete it: the position is in the corpus, so that is harmless."""
    await log.publish(5)
    async with sink(log).following() as reader:
        await reader.take(5)
        await _delete_cursors(log, reader)
        await eventually(lambda: _cursors_are(reader, ["fi-workers-main-00-2"]))
        await log.publish(5)
        assert list(range(6, 11)) == await reader.take(5)


async def test_only_the_newest_cursor_of_a_partition_stays(log: Log) -> None:
    """Also those of owners that were killed; cursors of other partitions and stores are none of ours."""
    foreign = [("main", 1, 7), ("copy", 0, 9)]
    for store, partition, generation in foreign:
        await log.api.create_consumer(STREAM, cursor_config(store, partition, generation, 1))
    for generation in (3, 4):
        await log.api.create_consumer(STREAM, cursor_config("main", 0, generation, 1))
    async with sink(log).following() as reader:
        await eventually(lambda: _cursors_are(reader, ["fi-workers-main-00-5"]))
    names = await log.api.consumer_names(STREAM)
    assert ["fi-workers-copy-00-9", "fi-workers-main-00-5", "fi-workers-main-01-7"] == sorted(names)


async def test_a_cursor_has_one_replica_in_memory_and_goes_after_a_day_without_use(log: Log) -> None:
    """A replicated one would write each delivery through raft."""
    async with sink(log).following() as reader:
        info = await reader.cursor()
    config = info["config"]
    expected = (1, True, "all", "fi.events.0.*", 24 * 3600 * 10**9)
    found = (config["num_replicas"], config["mem_storage"], config["ack_policy"], config["filter_subject"])
    assert expected == (*found, config["inactive_threshold"])


async def test_a_new_connection_looks_at_the_log_again(log: Log) -> None:
    """All nodes may have been set back while it was away."""
    await log.publish(5)
    settings = LogSettings(servers=tuple(log.cluster.urls))
    connection = await connect(settings, name="test", on_closed=lambda _: None)
    async with Sink(connection, log.identity).following() as reader:
        await reader.take(5)
        before = await reader.cursors()
        connection._transport.close()  # type: ignore[union-attr]  # it is connected
        await eventually(lambda: connection.stats["reconnects"] == 1)
        await eventually(lambda: bool(reader.repairs))
        await log.publish(5)
        assert list(range(6, 11)) == await reader.take(5)
        assert before != await reader.cursors()
    await close(connection)


# -- nodes that die, freeze and thaw ----------------------------------------------------------------------------------


async def test_a_cursor_whose_node_is_killed_is_made_elsewhere(log: Log) -> None:
    """In the middle of the flow: nothing is lost or repeated."""
    async with sink(log).following() as reader:
        reading = asyncio.create_task(reader.take(600))
        await log.publish(200)
        victim = log.cluster.names.index((await reader.cursor())["cluster"]["leader"])
        log.cluster.kill(victim)
        await log.publish(200)
        log.cluster.start_node(victim)
        await log.publish(200)
        # an append that was retried after a time-out is in the stream once only: message ids see to that
        assert list(range(1, 601)) == await reading


@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_an_idle_partition_is_followed_again_soon(
    log: Log, how: str, record_property: Callable[[str, object], None]
) -> None:
    """Its cursor's node leads nothing, so no election comes before."""
    await log.publish(10)
    async with _on_the_leader(log) as (through, leader), sink(through).following() as reader:
        await reader.take(10)
        victim = await _node_of_cursor(log, reader, other_than=leader)
        before = len(reader.repairs)
        (log.cluster.kill if how == "kill" else log.cluster.pause)(victim)
        started = time.monotonic()
        await through.publish(10)
        assert list(range(11, 21)) == await reader.take(10)
        took = time.monotonic() - started
        assert took <= FROZEN_SECONDS, reader.repairs[before:]
        record_property("followed again after s", round(took, 2))


async def test_a_partition_is_followed_again_when_the_node_that_leads_everything_freezes(
    log: Log, record_property: Callable[[str, object], None]
) -> None:
    """An election of the stream's leader and one of the meta leader come before, as for every client."""
    await log.publish(10)
    async with _on_the_leader(log) as (_, leader):
        pass
    other = await _connected(log, (leader + 1) % 3)
    async with Sink(other, log.identity).following() as reader:
        await reader.take(10)
        await _node_of_cursor(log, reader, other_than=(leader + 1) % 3)
        log.cluster.pause(leader)
        started = time.monotonic()
        elected = asyncio.create_task(asyncio.to_thread(_wait_other_leaders, log.cluster, leader))
        publisher = Publisher(other, deadline=30, max_in_flight=100)
        await publisher.start()
        await replace(log, nc=other, publisher=publisher).publish(10)
        assert list(range(11, 21)) == await reader.take(10)
        took = time.monotonic() - started
        beyond = took - (await elected - started)
        record_property("followed again after s, of that beyond the election", (round(took, 2), round(beyond, 2)))
        assert beyond <= FROZEN_SECONDS
        await publisher.close()
    await close(other)


async def test_a_frozen_node_that_thaws_brings_nothing_twice(log: Log) -> None:
    """Its old cursor answers for a moment as if nothing had happened."""
    async with _on_the_leader(log) as (through, leader), sink(through).following() as reader:
        await through.publish(50)
        taken = await reader.take(50)
        for _ in range(2):
            victim = await _node_of_cursor(log, reader, other_than=leader)
            log.cluster.pause(victim)
            await through.publish(100)
            taken += await reader.take(60)
            log.cluster.resume(victim)
            await through.publish(50)
            taken += await reader.take(90)
        assert list(range(1, 351)) == taken
        await eventually(lambda: _one_cursor(reader), 60)


# -- idle partitions --------------------------------------------------------------------------------------------------


async def test_an_idle_partition_reaches_the_end_of_the_stream(fresh_log: Cluster) -> None:
    """Trim would stop at its last event for ever; a restart must find it after whatever was trimmed."""
    async with provisioned(fresh_log, partitions=2) as log:
        own, other = _consultations(2)
        async with Sink(log.nc, log.identity).following() as reader:
            await log.publish(3, consultations=own)
            await reader.take(3)
            await log.publish(5, consultations=other)

            async def reached() -> Position:
                position = await reader.follower.empty_up_to()
                assert 8 == position.sequence
                return position

            position = await eventually(reached)
            found = await log.api.get_message(STREAM, 8)
            assert found is not None
            assert found["headers"]["Nats-Msg-Id"] == position.message_id
            reader.follower.advance(position)
            assert position == await reader.follower.empty_up_to()
            await log.publish(1, consultations=own)
            assert [9] == await reader.take(1)
            assert ["fi-workers-main-00-1"] == await reader.cursors()
            await reader.follower.start(position)  # it is the same log
            assert [9] == await reader.take(1)


async def test_what_is_in_hand_is_before_any_position_that_is_reached(fresh_log: Cluster) -> None:
    """It is not committed yet."""
    async with provisioned(fresh_log, partitions=2) as log:
        own, other = _consultations(2)
        async with Sink(log.nc, log.identity).following() as reader:
            await log.publish(3, consultations=own)
            await reader.take(3, acknowledge=False)
            await log.publish(5, consultations=other)
            await eventually(lambda: reader.follower._empty_to == 8)
            assert Position(0) == await reader.follower.empty_up_to()


async def test_no_event_is_passed_over_while_leaders_change(fresh_log: Cluster) -> None:
    """A position is moved as often as it can be, while events come in and the stream's leader steps down again and
    again: with two answers of two nodes this lost events."""
    async with provisioned(fresh_log, partitions=2) as log:
        own, other = _consultations(2)
        published: list[str] = []
        moved = 0

        async def publish() -> None:
            seen = 0
            while not unsettling.done():
                await log.publish(20, consultations=other)
                if moved > seen:  # a cursor that delivers all the time has no time to say how far it looked
                    seen = moved
                    for name, ids in (await log.publish(3, consultations=own[:1])).items():
                        published.extend(f"{name}/{event_id}" for event_id in ids)

        async def unsettle() -> None:
            for number in range(6):
                await log.api.request(f"STREAM.LEADER.STEPDOWN.{STREAM}")
                await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)
                await eventually(lambda wanted=number: moved > wanted)  # type: ignore[misc]

        async def advance() -> None:
            nonlocal moved
            while True:
                before = reader.follower._committed.sequence
                position = await reader.follower.empty_up_to()
                if position.sequence > before:
                    reader.follower.advance(position)
                    moved += 1
                await asyncio.sleep(0.001)

        async def drain() -> None:
            while True:
                await reader.take(1)

        async with Sink(log.nc, log.identity).following() as reader:
            unsettling = asyncio.create_task(unsettle())
            others = [asyncio.create_task(work()) for work in (advance, drain)]
            await publish()
            await unsettling
            await eventually(lambda: len(reader.taken) >= len(published))
            for task in others:
                task.cancel()
        assert published == [(delivery.headers or {})["Nats-Msg-Id"] for delivery in reader.taken]


# -- the same log? ----------------------------------------------------------------------------------------------------


async def test_a_recreated_stream_is_refused(log: Log) -> None:
    """It starts at sequence 1 again; the position of the old one means nothing in it."""
    await log.publish(3)
    await delete_streams(log.cluster)
    await provision(log.nc, log.settings)
    with pytest.raises(LogMismatchError, match="was created at"):
        await sink(log).follower.start(Position(3))


async def test_a_stream_recreated_while_following_stops_the_follower(log: Log) -> None:
    """The follower waits for events; the error must come to it by itself."""
    await log.publish(3)
    async with sink(log).following() as reader:
        await reader.take(3)
        await delete_streams(log.cluster)
        await provision(log.nc, log.settings)
        with pytest.raises(LogMismatchError):
            await reader.take(1)


async def test_another_message_at_the_position_is_refused(log: Log) -> None:
    """The stream was set back and has grown since: what came after it would be skipped."""
    await log.publish(10)
    with pytest.raises(LogMismatchError, match=r"was set back .* has grown since.*A log that was set back"):
        await sink(log).follower.start(Position(5, "c1/another"))


async def test_the_same_message_at_the_position_is_accepted(log: Log) -> None:
    """Also when it is another partition's, as that of an idle one may be."""
    await log.publish(10)
    found = await log.api.get_message(STREAM, 5)
    assert found is not None
    async with sink(log).following(Position(5, found["headers"]["Nats-Msg-Id"])) as reader:
        assert [6, 7, 8, 9, 10] == await reader.take(5)


async def test_a_position_whose_message_is_gone_cannot_be_compared(log: Log) -> None:
    """It was trimmed, or deleted by an operator, and the rest is there."""
    await log.publish(10)
    await log.api.purge(STREAM, 6)
    await log.api.request(f"STREAM.MSG.DELETE.{STREAM}", {"seq": 8})
    for after in (5, 8):
        async with sink(log).following(Position(after, "c1/gone")) as reader:
            assert [9, 10] == (await reader.take(4 if after == 5 else 2))[-2:]


async def test_a_position_beyond_the_stream_is_refused(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker would make a cursor there and deliver nothing until the stream gets there."""
    monkeypatch.setattr(module, "LAG_SECONDS", 0.5)
    await log.publish(3)
    with pytest.raises(LogMismatchError, match=r"ends at sequence 3, .* after 3 are only in HDF5.*A log that was set"):
        await sink(log).follower.start(Position(4))


async def test_a_leader_that_lags_behind_the_file_is_waited_for(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of all nodes it says a smaller last sequence until it has applied what it has."""
    monkeypatch.setattr(module, "MISMATCH_SECONDS", 0.5)
    await log.publish(3)
    reader = sink(log)
    starting = asyncio.create_task(reader.follower.start(Position(4)))
    done, _ = await asyncio.wait({starting}, timeout=1.5)
    assert not done, "it gave up, or followed a log that ends before its position"
    await log.publish(2)
    await starting
    async with reader.following(4):
        assert [5] == await reader.take(1)


async def test_a_position_before_trimmed_events_is_refused(log: Log) -> None:
    """The partition file is an older copy, and what it lacks is no longer in the stream."""
    await log.publish(10)
    assert 7 == await log.api.purge(STREAM, 8)
    for trimmable in (None, 7):
        with pytest.raises(LogMismatchError, match="old copy"):
            await sink(log, trimmable=trimmable).follower.start(Position(5))


async def test_events_of_others_may_be_trimmed_beyond_the_position(log: Log) -> None:
    """A partition that was away had nothing trimmed, as its placement says what it has committed."""
    await log.publish(10)
    await log.api.purge(STREAM, 8)
    async with sink(log, trimmable=5).following(5) as reader:
        assert [8, 9, 10] == await reader.take(3)


async def test_a_new_store_may_begin_after_trimmed_events(log: Log) -> None:
    """It never had them, and nothing says that it should."""
    await log.publish(10)
    await log.api.purge(STREAM, 8)
    async with sink(log).following() as reader:
        assert [8, 9, 10] == await reader.take(3)


# -- helpers ----------------------------------------------------------------------------------------------------------


def _consultations(partitions: int) -> list[list[str]]:
    names = [f"c{number}" for number in range(12)]
    return [[name for name in names if partition_of(name, partitions) == p] for p in range(partitions)]


async def _delete_cursors(log: Log, reader: Sink) -> None:
    for name in await reader.cursors():
        await log.api.delete_consumer(STREAM, name)


async def _cursors_are(reader: Sink, names: list[str]) -> bool:
    return await reader.cursors() == names


async def _one_cursor(reader: Sink) -> bool:
    return len(await reader.cursors()) == 1


@asynccontextmanager
async def _on_the_leader(log: Log) -> AsyncIterator[tuple[Log, int]]:
    """Have the meta leader's node lead the stream, too; yield the log through that node, and the node."""

    async def check() -> list[int]:
        meta = log.cluster.meta_leader()
        if meta is not None and log.cluster.stream_leader(STREAM) == meta:
            return [meta]
        await log.api.request(f"STREAM.LEADER.STEPDOWN.{STREAM}")
        await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)
        return []

    (leader,) = await eventually(check)
    connection = await _connected(log, leader)
    publisher = Publisher(connection, deadline=20, max_in_flight=100)
    await publisher.start()
    yield replace(log, nc=connection, publisher=publisher), leader
    await publisher.close()
    await close(connection)


def _wait_other_leaders(cluster: Cluster, frozen: int) -> float:
    """Wait until another node leads the stream, and another one the metadata; return when that was."""
    eventually_sync(lambda: cluster.meta_leader() not in {None, frozen}, 40, 0.2)
    eventually_sync(lambda: cluster.stream_leader(STREAM) not in {None, frozen}, 40, 0.2)
    return time.monotonic()


async def _connected(log: Log, node: int) -> Connection:
    connection = Connection(LogSettings(), lambda _: None)
    await connection.connect(log.cluster.urls[node], allow_reconnect=False)
    return connection


async def _node_of_cursor(log: Log, reader: Sink, *, other_than: int) -> int:
    """Have the cursor made anew until it is on another node than *other_than*, and return that."""

    async def check() -> list[int]:
        node = log.cluster.names.index((await reader.cursor())["cluster"]["leader"])
        if node != other_than:
            return [node]
        repairs = len(reader.repairs)
        await _delete_cursors(log, reader)
        await eventually(lambda: len(reader.repairs) > repairs and reader.follower._pulls.promised)
        return []

    return (await eventually(check))[0]


async def _last_is(log: Log, sequence: int) -> bool:
    info = await log.api.stream_info(STREAM)
    return info is not None and bool(info["state"]["last_seq"] == sequence)
