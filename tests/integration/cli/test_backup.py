"""`fiq backup` of a volume at work, and `fiq restore` after its loss, on a real cluster."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fiq.corpus import open_corpus, verify_corpus
from services.cli.embedded.processes import Cluster
from services.log.jetstream.placement import BucketPlacements
from services.log.jetstream.stream import BUCKET, STREAM, placement_key, provision
from services.log.status import Placement
from services.persister.volume import Volume
from tests.support.cluster import delete_streams
from tests.support.commands import done, kill, killed_in, refused
from tests.support.persisters import PARTITIONS, Contents, Log, Persister, joined, persisted, provisioned


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    """Three nodes with fresh streams."""
    async with provisioned(fresh_log) as made:
        yield made


async def test_a_deleted_volume_comes_back_with_every_event_once_and_in_order(log: Log, tmp_path: Path) -> None:
    """The backup was made while two persisters wrote; what it lacks, the stream brings."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    published: list[Contents] = [await log.publish(200)]
    with (
        Persister(tmp_path / "a", log.cluster, data) as one,
        Persister(tmp_path / "b", log.cluster, data) as two,
    ):
        await asyncio.gather(one.ready(), two.ready())
        stop = asyncio.Event()

        async def write() -> None:
            while not stop.is_set():
                published.append(await log.publish(50))

        writing = asyncio.create_task(write())
        try:
            await done(log, "backup", saved, "--corpus", data)
        finally:
            stop.set()
            await writing
        published.append(await log.publish(100))
        await persisted(data, *published)
        await kill(one, two)
    with open_corpus(saved) as copy:
        assert 0 < sum(info.events for info in copy.partitions) < sum(map(len, joined(published).values()))
    shutil.rmtree(data)
    published.append(await log.publish(100))

    assert "restored as of" in await done(log, "restore", saved, "--to", data)
    with Persister(tmp_path / "c", log.cluster, data) as again:
        await again.ready()
        await persisted(data, *published)
        assert 0 == await again.end()
    assert verify_corpus(data).clean


async def lost_after_backup(log: Log, data: Path, saved: Path, count: int) -> Contents:
    """Persist *count* events in *data*, back them up, kill the persister and lose its disk; return the events."""
    with Persister(data.parent / "a", log.cluster, data) as persister:
        await persister.ready()
        events = await log.publish(count)
        await persisted(data, events)
        await done(log, "backup", saved, "--corpus", data)
        await kill(persister)
    shutil.rmtree(data)
    return events


async def test_the_manifest_has_the_placement_and_the_streams_identity(log: Log, tmp_path: Path) -> None:
    """What `nats kv get` shows of each partition, to be read when the cluster is gone."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        await done(log, "backup", saved, "--corpus", data)
        assert 0 == await persister.end()
    manifest = json.loads((saved / "manifest.json").read_text())
    places = (await BucketPlacements(log.nc, log.settings).read()).partitions
    assert [{"partition": p, "volume": place.volume, "epoch": 1} for p, place in sorted(places.items())] == manifest[
        "placement"
    ]
    assert log.identity.created == manifest["stream_created"]


async def test_a_restore_keeps_the_stream_from_being_trimmed_before_persisters_start(log: Log, tmp_path: Path) -> None:
    """The keys of a lost volume said more than its backup holds; a trim goes by them. `fiq restore` fences first."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        before = await log.publish(40)
        await persisted(data, before)
        await done(log, "backup", saved, "--corpus", data)
        await persisted(data, before, await log.publish(40))
        assert 0 == await persister.end()  # which puts the last progress
    with open_corpus(saved) as copy:
        committed = {info.identity.partition: info.committed for info in copy.partitions}
    shutil.rmtree(data)
    assert 80 == max((await committed_in(log)).values())
    await done(log, "restore", saved, "--to", data)
    assert committed == await committed_in(log)


async def committed_in(log: Log) -> dict[int, int]:
    """Return what the keys say is committed."""
    places = (await BucketPlacements(log.nc, log.settings).read()).partitions
    return {partition: place.committed for partition, place in places.items()}


async def test_a_restore_shuts_the_old_directory_out_before_its_long_copy(log: Log, tmp_path: Path) -> None:
    """Interrupted in the copy, it has done that already, and can be run again."""
    data, saved, new = tmp_path / "data", tmp_path / "saved", tmp_path / "new"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        events = await log.publish(40)
        await persisted(data, events)
        await done(log, "backup", saved, "--corpus", data)
        assert 0 == await persister.end()
    step = "services.cli.backup.restore._copy_file"
    code = await asyncio.to_thread(killed_in, step, "restore", saved, "--to", new, "--server", log.cluster.url, after=2)
    assert -signal.SIGKILL == code
    with Persister(tmp_path / "b", log.cluster, data) as old:
        await old.not_ready("epoch is 1 in the file but 2 is expected")
        assert 0 == await old.end()
    shutil.rmtree(new)
    await done(log, "restore", saved, "--to", new)
    with Persister(tmp_path / "c", log.cluster, new) as successor:
        await successor.ready()
        later = await log.publish(10)
        await persisted(new, events, later)
        assert 0 == await successor.end()


async def test_a_restore_places_what_has_lost_its_key(log: Log, tmp_path: Path) -> None:
    """Key and disk are both gone: the backup says where the partition was."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    events = await lost_after_backup(log, data, saved, 40)
    await (await log.nc.jetstream().key_value(BUCKET)).delete(placement_key("main", 2))
    assert "partition 02 had no key in the bucket" in await done(log, "restore", saved, "--to", data)
    with Persister(tmp_path / "b", log.cluster, data) as persister:
        await persister.ready()
        later = await log.publish(10)
        await persisted(data, events, later)
        assert 0 == await persister.end()


async def test_a_restore_is_refused_while_a_persister_of_the_volume_runs(log: Log, tmp_path: Path) -> None:
    """Even in another directory, or when its own was deleted under it: the cluster knows it. --force does not help."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        await done(log, "backup", saved, "--corpus", data)
        for options in ((), ("--force",)):
            reason = await refused(log, "restore", saved, "--to", tmp_path / "other", *options)
            assert f"pid {persister.process.pid}" in reason
        assert not (tmp_path / "other").exists()
        assert "a persister runs in" in await refused(log, "restore", saved, "--to", data, "--offline")
        assert 0 == await persister.end()


async def test_a_trimmed_stream_is_told_with_what_is_lost_and_force_goes_on_behind_it(log: Log, tmp_path: Path) -> None:
    """The partitions would refuse to go on; with --force the gap is named, given up, and the rest follows."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        before = await log.publish(40)
        await persisted(data, before)
        await done(log, "backup", saved, "--corpus", data)
        lost = await log.publish(40)
        await persisted(data, before, lost)
        await kill(persister)
    shutil.rmtree(data)
    await log.api.purge(STREAM, 81)
    reason = await refused(log, "restore", saved, "--to", data)
    assert "the stream now begins at sequence 81" in reason
    assert "With --force these sequences are given up for good" in reason
    assert not data.exists()

    told = await done(log, "restore", saved, "--to", data, "--force")
    assert PARTITIONS == told.count("given up: partition")
    after = await log.publish(40)
    with Persister(tmp_path / "b", log.cluster, data) as persister:
        await persister.ready()
        await persisted(data, before, after)
        assert 0 == await persister.end()


async def test_a_stream_made_anew_is_told_with_what_to_do(log: Log, tmp_path: Path) -> None:
    """Its sequences mean other events; --force restores the files nevertheless, and persisters refuse them."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    events = await lost_after_backup(log, data, saved, 20)
    await delete_streams(log.cluster)
    assert "has no stream fi-events" in await refused(log, "restore", saved, "--to", data)
    await provision(log.nc, log.settings)
    reason = await refused(log, "restore", saved, "--to", data)
    assert "it was deleted and created again" in reason
    assert "start a new data directory" in reason
    assert "restored although" in await done(log, "restore", saved, "--to", data, "--force")
    with Persister(tmp_path / "b", log.cluster, data) as persister:
        await persister.not_ready("the stream was deleted and created anew")
        assert 0 == await persister.end()
    await persisted(data, events)


async def test_a_partition_that_was_placed_after_the_backup_begins_anew(log: Log, tmp_path: Path) -> None:
    """Everything of it is in the stream still, so nothing is missing."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    with Persister(tmp_path / "a", log.cluster, data, FI_VOLUMES="2") as persister:
        await persister.ready()
        events = [await log.publish(40)]
        await done(log, "backup", saved, "--corpus", data)
        assert 0 == await persister.end()
    with Persister(tmp_path / "b", log.cluster, data) as persister:  # FI_VOLUMES=1: it takes the others, too
        await persister.ready()
        await persisted(data, *events)
        await kill(persister)
    shutil.rmtree(data)
    assert "begins anew" in await done(log, "restore", saved, "--to", data)
    with Persister(tmp_path / "c", log.cluster, data) as persister:
        await persister.ready()
        await persisted(data, *events)
        assert 0 == await persister.end()


async def test_a_volume_that_lacks_a_partition_is_not_called_backed_up(log: Log, tmp_path: Path) -> None:
    """Offline saves what is there; the files' own word has to do then."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        assert 0 == await persister.end()
    for name in ("02.h5", "02.h5.wal"):
        (data / name).unlink()
    assert "partition 02 is placed on this volume but" in await refused(log, "backup", tmp_path / "s", "--corpus", data)
    await done(log, "backup", tmp_path / "s", "--corpus", data, "--offline")
    assert 3 == len(json.loads((tmp_path / "s" / "manifest.json").read_text())["contents"])


async def test_a_stale_backup_of_another_placement_is_refused(log: Log, tmp_path: Path) -> None:
    """The partitions were given to another volume since: two histories must not meet."""
    data, saved = tmp_path / "data", tmp_path / "saved"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        await done(log, "backup", saved, "--corpus", data)
        await kill(persister)
    shutil.rmtree(data)
    other = await asyncio.to_thread(Volume.open, tmp_path / "other", "main")
    bucket, placements = await log.nc.jetstream().key_value(BUCKET), BucketPlacements(log.nc, log.settings)
    for partition in range(PARTITIONS):
        await bucket.delete(placement_key("main", partition))
        await placements.place(Placement(partition, other.uuid, 1, committed=0, begins=1, revision=0))
    reason = await refused(log, "restore", saved, "--to", data)
    assert f"is now on volume {other.uuid}" in reason
    assert not data.exists()
