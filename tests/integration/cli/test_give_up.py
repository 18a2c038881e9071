"""`fiq give-up`: a volume is lost and there is no backup of it, on a real cluster."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from fiq.corpus import verify_corpus
from services.cli.embedded.processes import Cluster
from services.log.jetstream.placement import BucketPlacements
from services.log.jetstream.stream import STREAM
from services.persister.volume import Volume
from tests.support.commands import done, kill, refused
from tests.support.persisters import PARTITIONS, Contents, Log, Persister, persisted, provisioned


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    """Three nodes with fresh streams."""
    async with provisioned(fresh_log) as made:
        yield made


async def lost(log: Log, folder: Path) -> tuple[str, Contents]:
    """Return the UUID of a volume whose disk was lost, and what it held; all of it was acknowledged."""
    data = folder / "lost"
    with Persister(folder / "first", log.cluster, data) as persister:
        await persister.ready()
        events = await log.publish(40)
        await persisted(data, events)
        assert 0 == await persister.end()
    volume = Volume.open(data, "main").uuid
    shutil.rmtree(data)
    return volume, events


async def keys(log: Log) -> list[tuple[int, int, int]]:
    """Return what the partitions' keys say: epoch, where the file begins, and what is committed."""
    places = (await BucketPlacements(log.nc, log.settings).read()).partitions
    return [(place.epoch, place.begins, place.committed) for place in places.values()]


async def test_the_stream_brings_everything_that_was_not_trimmed(log: Log, tmp_path: Path) -> None:
    """The volume keeps its name and its partitions; what comes afterwards is written as ever."""
    volume, before = await lost(log, tmp_path)
    data = tmp_path / "data"
    assert "begins anew and loses nothing" in await done(log, "give-up", volume, "--to", data, "--yes")
    assert [(2, 1, 0)] * PARTITIONS == await keys(log)  # so that what it fetches is not trimmed
    with Persister(tmp_path / "again", log.cluster, data) as persister:
        await persister.ready()
        after = await log.publish(20)
        await persisted(data, before, after)
        assert 0 == await persister.end()
    assert volume == Volume.open(data, "main").uuid
    assert verify_corpus(data).clean


async def test_what_was_trimmed_is_told_and_given_up_only_when_asked_to(log: Log, tmp_path: Path) -> None:
    """Without --yes nothing changes. With it, partitions that no persister could serve are served again."""
    volume, _ = await lost(log, tmp_path)
    data = tmp_path / "data"
    kept = await log.publish(10)
    await log.api.purge(STREAM, 41)
    before = await keys(log)
    told = await refused(log, "give-up", volume, "--to", data)
    assert PARTITIONS == told.count("loses its events of sequences 1 to 40; the stream has 41 to 50")
    assert "--yes gives these sequences up for good" in told
    assert (False, before) == (data.exists(), await keys(log))

    await done(log, "give-up", volume, "--to", data, "--yes")
    assert [(2, 41, 40)] * PARTITIONS == await keys(log)
    with Persister(tmp_path / "again", log.cluster, data) as persister:
        await persister.ready()
        await persisted(data, kept)
        assert 0 == await persister.end()


async def test_another_store_that_has_a_copy_is_named(log: Log, tmp_path: Path) -> None:
    """What is missing may be read there."""
    second = tmp_path / "second"
    with Persister(tmp_path / "other", log.cluster, second, FI_STORE="second") as other:
        await other.ready()
        volume, _ = await lost(log, tmp_path)
        assert "store second has copies of its own" in await refused(log, "give-up", volume, "--to", tmp_path / "data")
        assert 0 == await other.end()


async def test_a_volume_that_lives_is_not_given_up(log: Log, tmp_path: Path) -> None:
    """Two directories with one name would fight for its partitions; --yes does not help."""
    data, other = tmp_path / "data", tmp_path / "other"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        volume = Volume.open(data, "main").uuid
        reason = await refused(log, "give-up", volume, "--to", other, "--yes")
        assert f"pid {persister.process.pid}" in reason
        await kill(persister)
    assert "is not empty" in await refused(log, "give-up", volume, "--to", data, "--yes")
    assert not other.exists()


async def test_a_volume_that_has_nothing_is_a_mistake(log: Log, tmp_path: Path) -> None:
    """Those that have something are named."""
    volume, _ = await lost(log, tmp_path)
    reason = await refused(log, "give-up", uuid4(), "--to", tmp_path / "data", "--yes")
    assert f"volumes with partitions: {volume}" in reason
