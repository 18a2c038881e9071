"""`fiq place` on a real cluster: it takes no file for the newest that may lack events, and forgets no store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from fiq.corpus import EventStore, Identity
from services.cli.embedded.processes import Cluster
from services.log.errors import PlacementError
from services.log.jetstream.log import Trimmer
from services.log.jetstream.placement import BucketPlacements
from services.log.jetstream.stream import BUCKET, BUCKET_STREAM, STREAM, placement_key, provision
from services.log.status import Placement
from services.persister.volume import Volume
from tests.support.commands import done, refused
from tests.support.persisters import PARTITIONS, Log, provisioned


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    """Three nodes with fresh streams."""
    async with provisioned(fresh_log) as made:
        yield made


def files(log: Log, data: Path, *, committed: int, store: str = "main") -> str:
    """Make the volume of a store that has every partition up to *committed*, and return its UUID."""
    volume = Volume.open(data, store)
    for partition in range(PARTITIONS):
        identity = Identity(store, volume.uuid, 1, partition, PARTITIONS, STREAM, log.identity.created)
        with EventStore.create(volume.file(partition), identity) as made:
            made.commit(committed)
    return volume.uuid


async def reached(log: Log, volume: str, *committed: int, store: str = "main") -> None:
    """Put what the partitions of a volume have reached, one after the other."""
    placements = BucketPlacements(log.nc, replace(log.settings, store=store))
    for partition in range(PARTITIONS):
        placed = await placements.claim(partition, volume, 1, begins=1)
        for at in committed:
            placed = await placements.progress(placed, at)


async def deleted(log: Log, *, store: str = "main") -> None:
    """Delete all keys of the partitions of a store."""
    bucket = await log.nc.jetstream().key_value(BUCKET)
    for partition in range(PARTITIONS):
        await bucket.delete(placement_key(store, partition))


async def keys(log: Log, *, store: str = "main") -> list[Placement]:
    """Return the keys of the partitions of a store."""
    return list((await BucketPlacements(log.nc, replace(log.settings, store=store)).read()).partitions.values())


async def test_a_file_that_the_stream_does_not_reach_back_to_is_refused(log: Log, tmp_path: Path) -> None:
    """An old copy was put in the place of a lost disk: it would be followed as if nothing were missing."""
    await log.publish(100)
    volume = files(log, tmp_path / "data", committed=20)
    await log.api.purge(STREAM, 51)
    reason = await refused(log, "place", "--corpus", tmp_path / "data")
    assert "00.h5 ends at sequence 20, but stream fi-events begins at 51" in reason
    assert [] == await keys(log)
    assert PARTITIONS == (await done(log, "place", "--corpus", tmp_path / "data", "--force")).count(
        "is placed on volume"
    )
    assert [(volume, 20)] * PARTITIONS == [(key.volume, key.committed) for key in await keys(log)]


async def test_a_file_that_is_behind_the_history_of_its_key_is_refused(log: Log, tmp_path: Path) -> None:
    """What a later copy had, trim may have deleted in the middle of the stream."""
    await log.publish(100)
    await reached(log, files(log, tmp_path / "data", committed=20), 15, 70)
    await deleted(log)
    assert "fi-partitions main.00` shows that the partition had reached 70" in await refused(
        log, "place", "--corpus", tmp_path / "data"
    )
    assert [] == await keys(log)


async def test_without_any_history_holes_in_the_stream_are_suspicious(log: Log, tmp_path: Path) -> None:
    """The bucket was lost: it is unknown how much trim deleted around a partition that was stopped."""
    await log.publish(100)
    files(log, tmp_path / "data", committed=20)
    await log.api.request(f"STREAM.MSG.DELETE.{STREAM}", {"seq": 50})
    assert "trim has deleted 1 event in the middle" in await refused(log, "place", "--corpus", tmp_path / "data")
    assert [] == await keys(log)


async def test_after_a_lost_bucket_nothing_is_trimmed_before_all_stores_were_placed(log: Log, tmp_path: Path) -> None:
    """The second store has 30 of 100 events when the keys of both get lost; the first one is placed at once."""
    await log.publish(100)
    first, second = tmp_path / "first", tmp_path / "second"
    files(log, first, committed=100)
    files(log, second, committed=30, store="second")
    await log.api.request(f"STREAM.DELETE.{BUCKET_STREAM}")
    await provision(log.nc, log.settings)
    trimmer = Trimmer(log.nc, retention=0)
    with pytest.raises(PlacementError, match="may lack stores that had keys"):
        await trimmer.trim()
    assert "Name all stores" in await refused(log, "place", "--corpus", first)
    assert "--stores names all stores, that of this directory too: main" in await refused(
        log, "place", "--corpus", first, "--stores", "second"
    )
    await done(log, "place", "--corpus", first, "--stores", "main,second")
    assert 0 == (await trimmer.trim()).purged
    await done(log, "place", "--corpus", second)
    assert 30 == (await trimmer.trim()).purged
    assert 31 == (await log.state())["first_seq"]


async def test_a_bucket_that_is_as_old_as_the_stream_lacks_no_store(log: Log, tmp_path: Path) -> None:
    """So a single lost key needs no names."""
    await log.publish(4)
    await reached(log, files(log, tmp_path / "data", committed=4), 4)
    await deleted(log)
    assert PARTITIONS == (await done(log, "place", "--corpus", tmp_path / "data")).count("is placed on volume")
    assert 4 == (await Trimmer(log.nc, retention=0).trim()).purged
