"""Trimming on a real cluster: only what every store has committed, and nobody who sleeps is in the way."""

from __future__ import annotations

from pathlib import Path

from services.cli.cluster import Cluster
from services.contract.event import Event
from services.contract.ids import new_event_id
from services.eventlog.jetstream.trim import Trimmer
from tests.support.persisters import PARTITIONS, Log, Persister, persisted, provisioned
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


async def test_a_purge_that_moves_the_floors_lets_nothing_be_trimmed_past_a_file(log: Log, tmp_path: Path) -> None:
    """The floor of a consumer that has caught up jumps to the stream's end; the file would be refused at a restart."""
    data = tmp_path / "data"
    with Persister(tmp_path, log.cluster, data) as persister:
        await persister.ready()
        first = await log.publish(4, consultations=1)
        await persisted(data, first)
        await eventually(lambda: _advanced(persister, 4))  # next in half a minute
        second = await log.publish(PARTITIONS * 3)
        await persisted(data, first, second)
        reached = await _committed(persister)
        assert min(reached.values()) < 4 + 3 * PARTITIONS
        await log.api.purge("fi-events", 3)
        await eventually(lambda: _floors_above(log, min(reached.values())))

        trimmed = await Trimmer(log.nc, partitions=PARTITIONS, retention=0).trim()

        assert trimmed.committed <= min((await _committed(persister)).values())
        assert 0 == await persister.end()
    with Persister(tmp_path / "again", log.cluster, data) as persister:
        await persister.ready()
        third = await log.publish(5)
        await persisted(data, first, second, third)


async def _floors_above(log: Log, sequence: float) -> bool:
    infos = await log.api.list_consumers("fi-events")
    return min(info["ack_floor"]["stream_seq"] for info in infos) > sequence


async def _committed(persister: Persister) -> dict[str, float]:
    """Return what each partition's file has reached."""
    samples = await persister.samples()
    return {name: value for name, value in samples.items() if name.startswith("fi_persister_committed_sequence{")}


async def _advanced(persister: Persister, sequence: int) -> bool:
    committed = await _committed(persister)
    return len(committed) == PARTITIONS and min(committed.values()) == sequence
