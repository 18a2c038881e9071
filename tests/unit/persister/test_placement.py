"""Which partitions a volume takes, and which files it opens: never a second history of a partition."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from pathlib import Path

import pytest

from fiq.corpus import EventStore, IdentityMismatchError, JournalError, StoreOptions, open_corpus
from services.log.errors import LogMismatchError, PlacementError
from services.log.settings import LogSettings
from services.log.status import Placement
from services.persister.volume import Volume, VolumeContext, claim_partitions, open_store
from tests.support.persister import LOG, event
from tests.support.placements import MemoryPlacements, placed

OTHER = "11111111-2222-4333-8444-555555555555"


def context(folder: Path, *, partitions: int = 4, volumes: int = 1, created: str = LOG.created) -> VolumeContext:
    settings = LogSettings(partitions=partitions)
    return VolumeContext(Volume.open(folder, "main"), volumes, settings, dataclasses.replace(LOG, created=created))


def fill(where: VolumeContext, partition: int, *, epoch: int = 1, committed: int = 0) -> Path:
    """Make the partition's file."""
    path = where.volume.file(partition)
    with EventStore.create(path, where.expected(partition, epoch)) as store:
        if committed:
            store.commit(committed)
    return path


# -- opening ----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_opened_is_linked(tmp_path: Path) -> None:
    """corpus.h5 opens all of them."""
    here = context(tmp_path)
    fill(here, 2)
    open_store(here, placed(2, here.volume.uuid), StoreOptions()).close()
    assert (tmp_path / "corpus.h5").exists()


def test_a_placed_partition_whose_file_is_gone_stops(tmp_path: Path) -> None:
    """An empty file in its place would begin at sequence 1, and split the history over two."""
    here = context(tmp_path)
    with pytest.raises(PlacementError, match=r"02\.h5 is gone: put it back"):
        open_store(here, placed(2, here.volume.uuid), StoreOptions())
    assert not here.volume.file(2).exists()


def test_a_file_without_its_journal_stops(tmp_path: Path) -> None:
    """The newest commits were in it."""
    here = context(tmp_path)
    path = fill(here, 2)
    path.with_name("02.h5.wal").unlink()
    with pytest.raises(JournalError):
        open_store(here, placed(2, here.volume.uuid), StoreOptions())


@pytest.mark.parametrize(("field", "value"), [("volume", OTHER), ("epoch", 7), ("partition", 3), ("store", "second")])
def test_another_ones_file_stops(tmp_path: Path, field: str, value: object) -> None:
    """It is not written, however it got here."""
    here = context(tmp_path)
    found = dataclasses.replace(here.expected(2, 1), **{field: value})  # type: ignore[arg-type]
    EventStore.create(here.volume.file(2), found).close()
    with pytest.raises(IdentityMismatchError, match=field):
        open_store(here, placed(2, here.volume.uuid), StoreOptions())


# -- placing ----------------------------------------------------------------------------------------------------------


def files(here: VolumeContext) -> list[int]:
    """Return the partitions that have a file."""
    return [p for p in range(here.log.partitions) if here.volume.file(p).exists()]


async def test_a_single_volume_takes_everything(tmp_path: Path) -> None:
    """Each has its file, and the store is formed."""
    here, log = context(tmp_path), MemoryPlacements()
    got = await claim_partitions(here, log)
    assert ([0, 1, 2, 3], {}) == (sorted(got.placed), got.blocked)
    assert [0, 1, 2, 3] == files(here)
    assert (True, (here.volume.uuid,)) == (log.formed, log.volumes)
    assert LOG.created == here.volume.formed_in()


async def test_the_file_is_there_before_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a placed partition without a file has lost it, whenever a process was killed."""
    here, log = context(tmp_path), MemoryPlacements()
    seen: list[bool] = []
    claim = log.claim

    async def looking(partition: int, volume: str, epoch: int, *, begins: int) -> Placement:
        seen.append(here.volume.file(partition).exists())
        return await claim(partition, volume, epoch, begins=begins)

    monkeypatch.setattr(log, "claim", looking)
    await claim_partitions(here, log)
    assert [True] * 4 == seen


async def test_a_volume_takes_no_more_than_its_quota(tmp_path: Path) -> None:
    """The share rounded up; also when it is the only one there."""
    log = MemoryPlacements()
    here = context(tmp_path, partitions=5, volumes=2)
    assert 3 == len((await claim_partitions(here, log)).placed)
    assert 3 == len((await claim_partitions(here, log)).placed)
    assert 3 == len(files(here))
    assert not log.formed


async def test_two_volumes_at_the_same_moment_share_evenly(tmp_path: Path) -> None:
    """A race that is lost leaves no file, and the one that completes the store notes so; the other one learns of it."""
    log = MemoryPlacements()
    one = context(tmp_path / "one", volumes=2)
    two = context(tmp_path / "two", volumes=2)
    first, second = await asyncio.gather(claim_partitions(one, log), claim_partitions(two, log))
    assert (2, 2) == (len(first.placed), len(second.placed))
    assert {0, 1, 2, 3} == first.placed.keys() | second.placed.keys()
    for where, got in ((one, first), (two, second)):
        assert set(got.placed) == set(files(where))
    await asyncio.gather(claim_partitions(one, log), claim_partitions(two, log))
    assert {one.volume.uuid, two.volume.uuid} == set(log.volumes)
    assert [LOG.created] * 2 == [where.volume.formed_in() for where in (one, two)]


async def test_a_store_that_begins_late_says_where(tmp_path: Path) -> None:
    """What was trimmed before is only in other stores; file and key agree."""
    here, log = context(tmp_path), MemoryPlacements()
    log.first = 501
    got = await claim_partitions(here, log)
    store = open_store(here, got.placed[1], StoreOptions())
    assert (501, 500) == (store.begins, store.committed)
    assert (501, 500) == (got.placed[1].begins, got.placed[1].committed)
    store.close()


async def test_another_volumes_partitions_are_left_alone(tmp_path: Path) -> None:
    """A second volume with the same data directory settings gets nothing, and keeps nothing."""
    log = MemoryPlacements(*(placed(p, OTHER) for p in range(4)))
    here = context(tmp_path)
    fill(here, 1)  # of a claim that the other one won while this process was killed
    got = await claim_partitions(here, log)
    assert ({}, {}) == (got.placed, got.blocked)
    assert [] == files(here)


async def test_a_file_of_a_partition_that_another_volume_has_is_shown(tmp_path: Path) -> None:
    """It was moved here by mistake, or the volumes were mixed up; what was committed is never removed."""
    log = MemoryPlacements(*(placed(p, OTHER) for p in range(4)))
    here = context(tmp_path)
    fill(here, 3, committed=9)
    got = await claim_partitions(here, log)
    assert {} == got.placed
    assert [3] == list(got.blocked)
    assert "another volume has the partition" in got.blocked[3]
    assert [3] == files(here)


async def test_a_file_of_a_claim_without_an_outcome_comes_first(tmp_path: Path) -> None:
    """The process was killed before it knew; the file is claimed, unless the stream was trimmed past its beginning."""
    here, log = context(tmp_path, partitions=8, volumes=8), MemoryPlacements()
    fill(here, 5)
    log.first = 7
    got = await claim_partitions(here, log)
    assert [5] == list(got.placed)
    assert 7 == got.placed[5].begins
    store = open_store(here, got.placed[5], StoreOptions())
    assert 7 == store.begins
    store.close()


async def test_a_file_with_commits_and_without_a_key_is_not_claimed(tmp_path: Path) -> None:
    """It was placed before and its key was deleted; only an operator knows whether this is the newest file."""
    here = context(tmp_path)
    fill(here, 2, committed=9)
    got = await claim_partitions(here, MemoryPlacements())
    assert [0, 1, 3] == sorted(got.placed)
    assert "02.h5 holds commits, but key main.02 of bucket fi-partitions is gone: run `fiq place`" in got.blocked[2]


@pytest.mark.parametrize("deleted", [True, False])
async def test_a_partition_of_a_formed_store_without_a_key_is_not_claimed(tmp_path: Path, deleted: bool) -> None:
    """With two volumes the other one made an empty file once, and wrote everything twice."""
    log = MemoryPlacements()
    one, two = (context(tmp_path / name, volumes=2) for name in ("one", "two"))
    await asyncio.gather(claim_partitions(one, log), claim_partitions(two, log))
    await asyncio.gather(claim_partitions(one, log), claim_partitions(two, log))
    gone = min(log.placed)
    del log.placed[gone]
    if deleted:
        log.deleted.add(gone)
    before = files(one), files(two)

    for where in (one, two, context(tmp_path / "new", volumes=1)):
        got = await claim_partitions(where, log)
        assert [gone] == list(got.blocked)
        assert f"key main.0{gone} of bucket fi-partitions is gone" in got.blocked[gone]
        assert "run `fiq place` on the data directory that has the newest" in got.blocked[gone]
    assert before == (files(one), files(two))
    assert 3 == len(log.placed)


async def test_a_deleted_key_is_an_error_before_the_store_is_formed_too(tmp_path: Path) -> None:
    here, log = context(tmp_path), MemoryPlacements()
    log.deleted = {2}
    got = await claim_partitions(here, log)
    assert ([0, 1, 3], [2]) == (sorted(got.placed), list(got.blocked))


async def test_a_lost_bucket_is_no_fresh_start(tmp_path: Path) -> None:
    """The volume remembers that its store was formed."""
    here, log = context(tmp_path), MemoryPlacements()
    await claim_partitions(here, log)
    log.placed.clear()
    log.formed = False
    got = await claim_partitions(here, log)
    assert ({}, [0, 1, 2, 3]) == (got.placed, sorted(got.blocked))
    assert {} == log.placed


async def test_a_store_whose_partitions_were_placed_by_an_operator_is_formed_again(tmp_path: Path) -> None:
    """As after a lost bucket: `fiq place` on every volume, and it goes on."""
    here, log = context(tmp_path), MemoryPlacements()
    before = await claim_partitions(here, log)
    log.formed = False
    assert before.placed == (await claim_partitions(here, log)).placed
    assert log.formed


async def test_an_outdated_copy_of_a_volume_claims_nothing(tmp_path: Path) -> None:
    """The current one has the same UUID, so the log would let both of them win."""
    here = context(tmp_path)
    fill(here, 0)
    log = MemoryPlacements(placed(0, here.volume.uuid, 2))
    got = await claim_partitions(here, log)
    assert {1, 2, 3} == got.blocked.keys()
    assert "partition 00 has epoch 1 here and was placed again as epoch 2" in got.blocked[1]
    assert [0] == list(log.placed)
    assert [0] == files(here)


async def test_a_file_of_another_stream_is_not_claimed(tmp_path: Path) -> None:
    """The stream was created anew: its sequences mean something else."""
    old = context(tmp_path, created="2026-01-01T00:00:00Z")
    fill(old, 2)
    got = await claim_partitions(context(tmp_path), MemoryPlacements())
    assert [0, 1, 3] == sorted(got.placed)
    assert "stream was deleted and created anew" in got.blocked[2]


async def test_a_directory_of_an_earlier_stream_claims_nothing(tmp_path: Path) -> None:
    """It was formed with that one: its history ends there."""
    here, log = context(tmp_path), MemoryPlacements()
    here.volume.note_formed("2026-01-01T00:00:00Z")
    got = await claim_partitions(here, log)
    assert "this directory belongs to the one created at 2026-01-01T00:00:00Z" in got.blocked[0]
    assert ({}, {}) == (got.placed, log.placed)


async def test_a_stream_that_was_created_anew_is_not_claimed_on(tmp_path: Path) -> None:
    """The claims would bind the new stream to a volume whose files belong to the old one."""
    log = MemoryPlacements()
    log.created = "2026-12-01T00:00:00Z"
    here = context(tmp_path)
    with pytest.raises(LogMismatchError, match="deleted or created anew"):
        await claim_partitions(here, log)
    assert ({}, []) == (log.placed, files(here))


async def test_a_damaged_file_is_shown_and_the_others_are_claimed(tmp_path: Path) -> None:
    """One bad file must not keep the volume's other partitions from running."""
    here = context(tmp_path)
    fill(here, 2).write_bytes(b"no HDF5")
    got = await claim_partitions(here, MemoryPlacements())
    assert ([0, 1, 3], [2]) == (sorted(got.placed), list(got.blocked))


async def test_a_volume_that_was_copied_keeps_its_placement(tmp_path: Path) -> None:
    """Moved to another disk, with its identity: it is the same volume."""
    here = context(tmp_path / "old")
    log = MemoryPlacements()
    got = await claim_partitions(here, log)
    for placement in got.placed.values():
        store = open_store(here, placement, StoreOptions())
        made = event(1)
        assert not store.held(made.consultation, [made.event_id.bytes])
        store.commit(9)
        store.close()
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = context(tmp_path / "new")
    again = await claim_partitions(moved, log)
    assert got.placed == again.placed
    for placement in again.placed.values():
        open_store(moved, placement, StoreOptions()).close()
    with open_corpus(tmp_path / "new") as corpus:
        assert [9, 9, 9, 9] == [info.committed for info in corpus.partitions]
