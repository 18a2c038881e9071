"""Volumes on a real cluster: shared evenly, and never a second history of a partition."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from functools import partial
from pathlib import Path

import pytest

from fiq.errors import TransientError
from services.log.jetstream.placement import BucketPlacements, read_stores
from services.log.jetstream.stream import BUCKET, BUCKET_STREAM, STREAM, provision
from services.log.settings import LogSettings
from services.persister.volume import Volume, VolumeContext, claim_partitions
from tests.support.cluster import delete_streams
from tests.support.commands import done
from tests.support.persisters import PARTITIONS, Contents, Log, Persister, corpus_of, joined, persisted
from tests.support.polling import eventually
from tests.support.torture import LONG

#: how often processes are started together, or killed
ROUNDS = 20 if LONG else PARTITIONS + 1


async def claim(log: Log, folder: Path, settings: LogSettings) -> set[int]:
    """Let a new volume in *folder* claim its share, as a coordinator does: again while the broker does not answer."""
    volume = await asyncio.to_thread(Volume.open, folder, settings.store)
    while True:
        with contextlib.suppress(TransientError):
            context = VolumeContext(volume, 2, settings, log.identity)
            found = await claim_partitions(context, BucketPlacements(log.nc, settings))
            assert {} == found.blocked
            return set(found.placed)


async def test_two_volumes_that_claim_at_the_same_moment_share_evenly(log: Log, tmp_path: Path) -> None:
    """The broker lets one win each partition, every time."""
    for number in range(20 if LONG else 5):
        await log.api.request(f"STREAM.PURGE.{BUCKET_STREAM}")
        folders = (tmp_path / f"{number}-a", tmp_path / f"{number}-b")
        one, two = await asyncio.gather(*(claim(log, folder, log.settings) for folder in folders))
        assert (2, 2) == (len(one), len(two))
        assert set(range(PARTITIONS)) == one | two


@pytest.mark.timeout(400)
async def test_two_volumes_whose_processes_start_at_the_same_moment_share_the_events(log: Log, tmp_path: Path) -> None:
    """Every event is in one of them, and none in both."""
    events = await log.publish(60)
    for number in range(ROUNDS):
        await log.api.request(f"STREAM.PURGE.{BUCKET_STREAM}")
        folder = tmp_path / str(number)
        data = [folder / "one", folder / "two"]
        with (
            Persister(folder / "a", log.cluster, data[0], FI_VOLUMES="2") as one,
            Persister(folder / "b", log.cluster, data[1], FI_VOLUMES="2") as two,
        ):
            await asyncio.gather(one.ready(), two.ready())
            assert [2, 2] == [len(list(place.glob("[0-9][0-9].h5"))) for place in data]
            await persisted_in(data, events)
            assert [0, 0] == list(await asyncio.gather(one.end(), two.end()))
        for name in await log.api.consumer_names(STREAM):  # or the brokers keep up those of all rounds
            await log.api.request(f"CONSUMER.DELETE.{STREAM}.{name}")


async def persisted_in(data: list[Path], events: Contents) -> None:
    """Wait until the volumes together hold exactly *events*."""
    await eventually(lambda: joined(map(corpus_of, data)) == events)


async def test_a_second_volume_gets_nothing_and_says_so(log: Log, tmp_path: Path) -> None:
    """A persister that was started with another FI_DATA_DIR must not begin the history again."""
    with Persister(tmp_path / "a", log.cluster, tmp_path / "one") as one:
        await one.ready()
        events = await log.publish(20)
        await persisted(tmp_path / "one", events)
        assert 0 == await one.end()
    with Persister(tmp_path / "b", log.cluster, tmp_path / "two") as two:
        await two.not_ready("all 4 are on others; FI_VOLUMES is 1")
        assert 0 == await two.end()
    assert {} == corpus_of(tmp_path / "two")


async def test_a_deleted_partition_file_stops_its_partition_until_it_is_back(log: Log, tmp_path: Path) -> None:
    """Also one that vanishes under a running process. Nothing is skipped, the others go on."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        events = [await log.publish(40)]
        await persisted(data, *events)
        for name in ("00.h5", "00.h5.wal"):
            (data / name).rename(tmp_path / name)
        reason = await persister.not_ready("deleted or replaced while it was written")
        assert "partition 00 is stopped" in reason
        events.append(await log.publish(40))
        assert 0 == await persister.end()
    with Persister(tmp_path / "b", log.cluster, data) as persister:
        await persister.not_ready("00.h5 is gone: put it back")
        assert not (data / "00.h5").exists()
        assert 0 == await persister.end()
    for name in ("00.h5", "00.h5.wal"):
        (tmp_path / name).rename(data / name)
    with Persister(tmp_path / "c", log.cluster, data) as persister:
        await persister.ready()
        await persisted(data, *events)


async def test_a_file_in_another_volume_is_refused_there_and_missed_at_home(log: Log, tmp_path: Path) -> None:
    """Both operators see it; nothing is written to the file."""
    data = [tmp_path / "one", tmp_path / "two"]

    def both(name: str) -> tuple[Persister, Persister]:
        first, second = (
            Persister(tmp_path / f"{name}{index}", log.cluster, folder, FI_VOLUMES="2")
            for index, folder in enumerate(data)
        )
        return first, second

    one, two = both("first")
    with one, two:
        await one.ready()
        await two.ready()
        await log.publish(40)
        await eventually(lambda: sum(map(len, joined(map(corpus_of, data)).values())) == 40)
        await asyncio.gather(one.end(), two.end())
    moved = sorted(data[0].glob("[0-9][0-9].h5"))[0]
    before = moved.read_bytes()
    for path in (moved, moved.with_name(moved.name + ".wal")):
        shutil.move(path, data[1] / path.name)
    one, two = both("second")
    with one, two:
        await one.not_ready(f"{moved.name} is gone: put it back")
        await two.not_ready(f"partition {moved.stem}: its file is in this volume, but another volume has")
        await asyncio.gather(one.end(), two.end())
    assert before == (data[1] / moved.name).read_bytes()


async def test_a_stream_created_anew_stops_everything_and_gets_no_claims(log: Log, tmp_path: Path) -> None:
    """While running and at the next start: its sequences begin at 1 again, and a new data directory must be free to
    claim it."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        events = await log.publish(40)
        await persisted(data, events)
        await delete_streams(log.cluster)
        await provision(log.nc, log.settings)
        await log.publish(5)
        for partition in range(PARTITIONS):
            await persister.not_ready(f"partition 0{partition} is stopped: stream fi-events was created at")
        assert {} == await read_stores(log.nc)
        assert 0 == await persister.end()
    with Persister(tmp_path / "b", log.cluster, data) as persister:
        await persister.not_ready("the stream was deleted and created anew")
        assert {} == await read_stores(log.nc)
        assert 0 == await persister.end()
    assert events == corpus_of(data)
    with Persister(tmp_path / "c", log.cluster, tmp_path / "new") as persister:
        await persister.ready()
        await eventually(lambda: sum(map(len, corpus_of(tmp_path / "new").values())) == 5)


async def test_a_deleted_key_stops_its_partition_on_every_volume_until_it_is_placed(log: Log, tmp_path: Path) -> None:
    """The other volume must not begin again with an empty file; the owner releases it. Nothing is lost."""
    data = [tmp_path / "one", tmp_path / "two"]
    with (
        Persister(tmp_path / "a", log.cluster, data[0], FI_VOLUMES="2") as one,
        Persister(tmp_path / "b", log.cluster, data[1], FI_VOLUMES="2") as two,
    ):
        await asyncio.gather(one.ready(), two.ready())
        before = await log.publish(40)
        await persisted_in(data, before)
        files = [sorted(folder.glob("[0-9][0-9].h5")) for folder in data]
        lost = files[0][0].stem
        await (await log.nc.jetstream().key_value(BUCKET)).delete(f"main.{lost}")
        for persister in (one, two):
            await persister.not_ready(f"partition {lost}: key main.{lost} of bucket fi-partitions is gone")
        after = await log.publish(40)
        assert files == [sorted(folder.glob("[0-9][0-9].h5")) for folder in data]
        assert "there is nothing to place" not in await done(log, "place", "--corpus", data[1])
        await one.not_ready("run `fiq place`")

        told = await done(log, "place", "--corpus", data[0])
        assert f"partition {lost} is placed on volume" in told
        await asyncio.gather(one.ready(), two.ready())
        await persisted_in(data, joined((before, after)))
        assert "there is nothing to place" in await done(log, "place", "--corpus", data[1])
        assert [0, 0] == list(await asyncio.gather(one.end(), two.end()))


async def test_a_lost_bucket_is_no_fresh_start(log: Log, tmp_path: Path) -> None:
    """Neither for the volumes that were there nor, once they are placed again, for anybody else."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        events = await log.publish(40)
        await persisted(data, events)
        await log.api.request("STREAM.DELETE.KV_fi-partitions")
        await provision(log.nc, log.settings)
        await persister.not_ready("key main.03 of bucket fi-partitions is gone")
        assert PARTITIONS == (await done(log, "place", "--corpus", data, "--stores", "main")).count(
            "is placed on volume"
        )
        await persister.ready()
        await eventually(lambda: formed(log))
        later = await log.publish(40)
        await persisted(data, events, later)
        assert 0 == await persister.end()


async def formed(log: Log) -> bool:
    """Whether the store is."""
    return (await BucketPlacements(log.nc, log.settings).read()).formed


async def test_a_file_is_made_before_its_claim_whenever_a_process_is_killed(log: Log, tmp_path: Path) -> None:
    """Killed again and again while it claims: in the end each partition is placed once, with its file."""
    data = tmp_path / "data"
    for number in range(ROUNDS):
        with Persister(tmp_path / f"k{number}", log.cluster, data) as persister:
            await persister.port()
            await eventually(partial(made, data, number % (PARTITIONS + 1)))
            persister.process.kill()
            await asyncio.to_thread(persister.process.wait)
        for partition in (await BucketPlacements(log.nc, log.settings).read()).partitions:
            assert (data / f"{partition:02d}.h5").exists()
    with Persister(tmp_path / "last", log.cluster, data) as persister:
        await persister.ready()
        events = await log.publish(40)
        await persisted(data, events)
        assert 0 == await persister.end()


def made(data: Path, files: int) -> bool:
    """Whether there are so many partition files."""
    return len(list(data.glob("[0-9][0-9].h5"))) >= files


async def test_a_store_that_begins_after_a_trim_says_where(log: Log, tmp_path: Path) -> None:
    """It is no full copy, and says so in its files, its keys and to `fiq verify`."""
    await log.publish(40)
    await log.api.purge(STREAM, 31)
    second = tmp_path / "second"
    with Persister(tmp_path / "b", log.cluster, second, FI_STORE="second") as persister:
        await persister.ready()
        await eventually(lambda: sum(map(len, corpus_of(second).values())) == 10)
        assert 0 == await persister.end()
    told = await done(log, "verify", second)
    assert "00.h5, 01.h5, 02.h5, 03.h5 begins at sequence 31: earlier events are only in other stores" in told
    places = (await read_stores(log.nc))["second"].partitions
    assert [31] * PARTITIONS == [place.begins for place in places.values()]


async def test_a_store_is_seeded_with_a_backup_of_another_one(log: Log, tmp_path: Path) -> None:
    """It has what was trimmed, and goes on from there by itself: a full copy, with the same chains."""
    data, saved, second = tmp_path / "data", tmp_path / "saved", tmp_path / "second"
    with Persister(tmp_path / "a", log.cluster, data) as first:
        await first.ready()
        before = await log.publish(40)
        await persisted(data, before)
        await done(log, "backup", saved, "--corpus", data)
        await eventually(lambda: caught_up(log, 40))
        await log.api.purge(STREAM, 21)
        await done(log, "restore", saved, "--to", second, "--as-store", "second")
        with Persister(tmp_path / "b", log.cluster, second, FI_STORE="second") as other:
            await other.ready()
            after = await log.publish(40)
            await persisted(data, before, after)
            await persisted(second, before, after)
            assert [0, 0] == list(await asyncio.gather(first.end(), other.end()))
    assert "clean" in await done(log, "verify", second)
    stores = await read_stores(log.nc)
    assert {True} == {store.formed for store in stores.values()}
    assert {1} == {place.begins for place in stores["second"].partitions.values()}
    assert stores["main"].volumes != stores["second"].volumes


async def caught_up(log: Log, sequence: int) -> bool:
    """Whether every partition's key has reached *sequence*."""
    places = (await BucketPlacements(log.nc, log.settings).read()).partitions
    return all(place.committed >= sequence for place in places.values())
