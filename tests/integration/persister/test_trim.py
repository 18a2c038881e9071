"""Trimming on a real cluster: only what every store has committed, and nobody who sleeps is in the way."""

from __future__ import annotations

import contextlib
from pathlib import Path

import nats.micro
import orjson

from services.cli.cluster import Cluster
from services.contract.event import Event
from services.contract.ids import new_event_id
from services.eventlog.errors import LogUnavailableError
from services.eventlog.jetstream.names import PERSISTER_SERVICE, consumer_name
from services.eventlog.jetstream.placement import Placements
from services.eventlog.jetstream.processes import show_committed
from services.eventlog.jetstream.trim import Trimmer
from services.eventlog.partitions import partition_of
from tests.support.persisters import PARTITIONS, Contents, Log, Persister, persisted, provisioned
from tests.support.polling import eventually


async def _empty(log: Log) -> bool:
    return bool((await log.state())["messages"] == 0)


async def test_committed_events_go_when_they_are_old_enough_also_past_idle_partitions(log: Log, tmp_path: Path) -> None:
    """One consultation, so that the other partitions have nothing to acknowledge; what comes later is all there."""
    with Persister(tmp_path, log.cluster, tmp_path / "data", FI_RETENTION="0") as persister:
        await persister.ready()
        first = await log.publish(30, consultations=1)
        await persisted(tmp_path / "data", first)
        await eventually(lambda: _empty(log))
        second = await log.publish(30)
        await persisted(tmp_path / "data", first, second)
        assert 0 == await persister.end()
    with Persister(tmp_path / "again", log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        third = await log.publish(10)
        await persisted(tmp_path / "data", first, second, third)


async def test_young_events_go_when_the_stream_is_fuller_than_seventy_percent(
    fresh_log: Cluster, tmp_path: Path
) -> None:
    """Clients would get 503 otherwise, with everything safe in HDF5."""
    async with provisioned(fresh_log, max_bytes=2**20) as log:
        body = b'{"event_type":"T","payload":"%b"}' % (b"x" * 8000)
        with Persister(tmp_path, fresh_log, tmp_path / "data", FI_STREAM_MAX_BYTES="1MiB") as persister:
            await persister.ready()
            for number in range(100):
                await log.publisher.append(Event(f"c{number % 7}", new_event_id(), 1, body))

            async def trimmed() -> bool:
                return bool((await log.state())["bytes"] < 0.6 * 2**20)

            await eventually(trimmed)
            persister.wait_for("STREAM_TRIMMED")


async def test_a_store_that_is_behind_holds_it_back(log: Log, tmp_path: Path) -> None:
    """It has nothing but the stream to get the events from."""
    main, second = tmp_path / "main", tmp_path / "second"
    with Persister(tmp_path / "s1", log.cluster, second, FI_STORE="second") as behind:
        await behind.ready()
        assert 0 == await behind.end()
    with Persister(tmp_path / "m", log.cluster, main, FI_RETENTION="0") as persister:
        await persister.ready()
        events = await log.publish(40)
        await persisted(main, events)

        async def acknowledged() -> bool:
            infos = await log.api.list_consumers("fi-events")
            floors = [i["ack_floor"]["stream_seq"] for i in infos if i["name"].startswith("fi-workers-main-")]
            return bool(min(floors) == 40)

        await eventually(acknowledged)
        trimmed = await Trimmer(log.nc, partitions=PARTITIONS, retention=0).trim()
        assert (0, 0) == (trimmed.committed, trimmed.purged)
        assert 40 == (await log.state())["messages"]
        with Persister(tmp_path / "s2", log.cluster, second, FI_STORE="second") as behind:
            await behind.ready()
            await persisted(second, events)
            await eventually(lambda: _empty(log))


async def test_a_purge_that_moves_the_floors_lets_nothing_be_trimmed_past_a_file(log: Log) -> None:
    """The floor of a consumer that has caught up jumps to the stream's end; the file would be refused at a restart."""
    events = await log.publish(12)
    last = {
        p: max(n for n, name in enumerate(_in_turn(events), 1) if partition_of(name, PARTITIONS) == p)
        for p in range(PARTITIONS)
    }
    for partition, sequence in last.items():  # as if each file had come there, and no further
        await Placements(log.nc, log.settings).claim(partition, "volume", 1)
        await _caught_up(log, consumer_name("main", partition), sequence)
    metadata = {"store": "main", "volume": "volume", "committed": show_committed(last)}
    service = await nats.micro.add_service(log.nc, name=PERSISTER_SERVICE, version="0.0.0", metadata=metadata)
    lowest = min(last.values())
    await _floors_moved_by_purges(log, lowest)
    trimmer = Trimmer(log.nc, partitions=PARTITIONS, retention=0)

    assert lowest == (await trimmer.trim()).committed

    assert lowest + 1 == (await log.state())["first_seq"]
    await service.stop()
    assert 0 == (await trimmer.trim()).committed


def _in_turn(events: Contents) -> list[str]:
    """Return the consultation of each event, in the order in which they were published: one after the other."""
    return [name for name, _ in sorted(events.items(), key=lambda item: int(item[0][1:]))]


async def _caught_up(log: Log, consumer: str, sequence: int) -> None:
    """Put *consumer* behind *sequence*, and ask it for more, as a follower does: it looks through all that is there."""

    async def reset() -> bool:
        with contextlib.suppress(LogUnavailableError):  # it has no leader yet
            await log.api.reset_consumer("fi-events", consumer, sequence + 1)
            return True
        return False

    await eventually(reset)
    pull = orjson.dumps({"batch": 1, "expires": 30 * 10**9})
    inbox = log.nc.new_inbox()
    await log.nc.subscribe(inbox)  # the server looks for nothing that nobody would hear
    await log.nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.fi-events.{consumer}", pull, reply=inbox)

    async def looking() -> bool:
        info = await log.api.consumer_info("fi-events", consumer)
        return info is not None and bool(info["num_waiting"] == 1)

    await eventually(looking)


async def _floors_moved_by_purges(log: Log, lowest: int) -> None:
    """Delete one event after the other, none of them behind *lowest*, until no floor is where it was put."""
    victims = iter(range(2, lowest + 1))

    async def moved() -> bool:
        await log.api.purge("fi-events", next(victims, lowest))
        return bool(min(i["ack_floor"]["stream_seq"] for i in await log.api.list_consumers("fi-events")) > lowest)

    await eventually(moved)
