"""Trimming on a real cluster: only what every store has committed; a store without processes does not hold it up."""

from __future__ import annotations

import signal
from pathlib import Path

from fiq.event import Event, new_event_id
from services.cli.embedded.processes import Cluster
from services.log.jetstream.log import Trimmer
from services.log.jetstream.placement import read_stores
from tests.support.persisters import Log, Persister, corpus_of, joined, persisted, provisioned
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
                return bool((await log.state())["bytes"] < 0.7 * 2**20)

            await eventually(trimmed, 60)
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

        async def told() -> bool:
            keys = (await read_stores(log.nc))["main"].partitions
            return all(one.committed >= 40 for one in keys.values())

        await eventually(told, 60)
        trimmed = await Trimmer(log.nc, retention=0).trim()
        assert (0, 0) == (trimmed.committed, trimmed.purged)
        assert 40 == (await log.state())["messages"]
        with Persister(tmp_path / "s2", log.cluster, second, FI_STORE="second") as behind:
            await behind.ready()
            await persisted(second, events)
            await eventually(lambda: _empty(log), 60)


async def test_a_volume_that_is_away_holds_back_its_own_events_only_and_gets_them_all(
    fresh_log: Cluster, tmp_path: Path
) -> None:
    """The stream is full of what others have committed; those go, and the one that comes back lacks nothing (G6)."""
    async with provisioned(fresh_log, max_bytes=2**20) as log:
        room = {"FI_STREAM_MAX_BYTES": "1MiB", "FI_VOLUMES": "2"}
        here, there = (tmp_path / name for name in ("here", "there"))
        with (
            Persister(tmp_path / "p1", fresh_log, here, **room) as stays,
            Persister(tmp_path / "p2", fresh_log, there, **room) as leaves,
        ):
            await stays.ready()
            await leaves.ready()
            first = await log.publish(24)
            await eventually(lambda: joined([corpus_of(here), corpus_of(there)]) == first)
            leaves.process.send_signal(signal.SIGKILL)
            leaves.process.wait()
            gone = {name for name in first if name in corpus_of(there)}
            second = await log.publish(12 * 12, size=6000)  # as large as the whole stream, half of it is for the other

            async def has_room() -> bool:
                return bool((await log.state())["bytes"] < 0.65 * 2**20)

            await eventually(has_room, 60)
        assert gone
        with Persister(tmp_path / "p3", fresh_log, there, **room) as back:
            await back.ready()
            await eventually(lambda: joined([corpus_of(here), corpus_of(there)]) == joined([first, second]), 60)
