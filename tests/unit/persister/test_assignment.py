"""Which partitions a volume takes, and which files it opens: never a second history of a partition."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.corpus import EventStore, IdentityMismatchError, JournalError, StoreOptions, open_corpus
from services.eventlog.errors import LogMismatchError, PlacementError
from services.eventlog.jetstream.placement import Placement
from services.eventlog.settings import LogSettings
from services.persister.assignment import Deployment, open_store, place
from services.persister.volume import Volume
from tests.support.persister import LOG, event
from tests.support.placements import MemoryPlacements

OTHER = "11111111-2222-4333-8444-555555555555"


def deployment(folder: Path, *, partitions: int = 4, volumes: int = 1, created: str = LOG.created) -> Deployment:
    settings = LogSettings(partitions=partitions)
    return Deployment(Volume.open(folder, "main"), volumes, settings, dataclasses.replace(LOG, created=created))


def fill(where: Deployment, partition: int, *, epoch: int = 1) -> Path:
    """Make the partition's file."""
    path = where.volume.file(partition)
    EventStore.create(path, where.expected(partition, epoch)).close()
    return path


# -- opening ----------------------------------------------------------------------------------------------------------


def test_a_claimed_partition_gets_its_file(tmp_path: Path) -> None:
    """The marker tells "not there yet" from "gone"; it goes when the file is there, and corpus.h5 links it."""
    here = deployment(tmp_path)
    here.volume.mark_claim(2, 1)
    store = open_store(here, Placement(2, here.volume.uuid, 1), StoreOptions())
    assert here.expected(2, 1) == store.identity
    assert not here.volume.claim_marked(2)
    store.close()
    assert (tmp_path / "corpus.h5").exists()


def test_a_placed_partition_whose_file_is_gone_stops(tmp_path: Path) -> None:
    """An empty file in its place would begin at sequence 1, and split the history over two."""
    here = deployment(tmp_path)
    with pytest.raises(PlacementError, match=r"02\.h5 is gone: put it back"):
        open_store(here, Placement(2, here.volume.uuid, 1), StoreOptions())
    assert not here.volume.file(2).exists()


def test_a_file_without_its_journal_stops(tmp_path: Path) -> None:
    """The newest commits were in it."""
    here = deployment(tmp_path)
    path = fill(here, 2)
    path.with_name("02.h5.wal").unlink()
    with pytest.raises(JournalError):
        open_store(here, Placement(2, here.volume.uuid, 1), StoreOptions())


@pytest.mark.parametrize(("field", "value"), [("volume", OTHER), ("epoch", 7), ("partition", 3), ("store", "second")])
def test_another_ones_file_stops(tmp_path: Path, field: str, value: object) -> None:
    """Whoever copied it here, it is not written."""
    here = deployment(tmp_path)
    found = dataclasses.replace(here.expected(2, 1), **{field: value})  # type: ignore[arg-type]
    EventStore.create(here.volume.file(2), found).close()
    with pytest.raises(IdentityMismatchError, match=field):
        open_store(here, Placement(2, here.volume.uuid, 1), StoreOptions())


def test_a_claim_of_before_the_partition_was_placed_anew_makes_no_file(tmp_path: Path) -> None:
    """The process was killed before it made the file, and the volume was given up since: its successor has the file."""
    here = deployment(tmp_path)
    here.volume.mark_claim(2, 1)
    with pytest.raises(IdentityMismatchError, match=r"02\.claim: epoch is 1 .* but 2 is expected"):
        open_store(here, Placement(2, here.volume.uuid, 2), StoreOptions())
    assert not here.volume.file(2).exists()


def test_a_claim_of_an_earlier_release_is_of_the_first_epoch(tmp_path: Path) -> None:
    """Its markers say no epoch; there was no other one."""
    here = deployment(tmp_path)
    (tmp_path / "02.claim").write_text(f"{here.volume.uuid}\n")
    open_store(here, Placement(2, here.volume.uuid, 1), StoreOptions()).close()


def test_a_stale_marker_beside_a_file_is_removed(tmp_path: Path) -> None:
    """The process was killed between the two; the file may get lost later, and must be missed then."""
    here = deployment(tmp_path)
    here.volume.mark_claim(2, 1)
    fill(here, 2)
    open_store(here, Placement(2, here.volume.uuid, 1), StoreOptions()).close()
    here.volume.file(2).unlink()
    with pytest.raises(PlacementError):
        open_store(here, Placement(2, here.volume.uuid, 1), StoreOptions())


@pytest.mark.parametrize("_round", range(5))
def test_one_of_two_threads_that_open_a_fresh_claim_gets_it(tmp_path: Path, _round: int) -> None:
    """Two processes of a volume may see the claim at the same moment; the other one waits for the lock."""
    here = deployment(tmp_path)
    here.volume.mark_claim(2, 1)
    placement = Placement(2, here.volume.uuid, 1)

    def attempt(_: int) -> EventStore | str:
        try:
            return open_store(here, placement, StoreOptions())
        except Exception as error:  # noqa: BLE001 - which one it is is the question
            return type(error).__name__

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(attempt, range(2)))
    assert {"EventStore": 1, "CorpusLockedError": 1} == Counter(
        one if isinstance(one, str) else type(one).__name__ for one in outcomes
    )
    for one in outcomes:
        if isinstance(one, EventStore):
            one.close()


_OPEN = """
import sys, time
from pathlib import Path
from services.corpus import CorpusLockedError, StoreOptions
from services.eventlog.jetstream.placement import Placement
from services.persister.assignment import open_store
import importlib.util
spec = importlib.util.spec_from_file_location('helpers', sys.argv[3])
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
deployment = helpers.deployment
here = deployment(Path(sys.argv[1]))
while time.time() < float(sys.argv[2]):
    pass
while True:
    try:
        store = open_store(here, Placement(2, here.volume.uuid, 1), StoreOptions())
    except CorpusLockedError:
        continue
    store.commit(store.committed + 1)
    store.close()
    break
"""


def test_processes_that_open_a_fresh_claim_take_turns(tmp_path: Path) -> None:
    """None fails, none begins the file anew."""
    here = deployment(tmp_path)
    here.volume.mark_claim(2, 1)
    command = [sys.executable, "-c", _OPEN, str(tmp_path), str(time.time() + 2), __file__]
    root = Path(__file__).parents[3]
    processes = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=30)
        assert (0, b"") == (process.returncode, errors)
    store = EventStore.open(here.volume.file(2), expected=here.expected(2, 1))
    assert store.committed == 3
    store.close()


# -- placing ----------------------------------------------------------------------------------------------------------


async def test_a_single_volume_takes_everything(tmp_path: Path) -> None:
    """Each claim is marked until its file exists."""
    here = deployment(tmp_path)
    placed = await place(here, MemoryPlacements())
    assert ([0, 1, 2, 3], {}) == (sorted(placed.here), placed.refused)
    assert all(here.volume.claim_marked(partition) for partition in range(4))


async def test_a_volume_takes_no_more_than_its_quota(tmp_path: Path) -> None:
    """The share rounded up; also when it is the only one there."""
    log = MemoryPlacements()
    here = deployment(tmp_path, partitions=5, volumes=2)
    assert 3 == len((await place(here, log)).here)
    assert 3 == len((await place(here, log)).here)


async def test_two_volumes_at_the_same_moment_share_evenly(tmp_path: Path) -> None:
    """A race that is lost leaves no marker: it would hide the loss of a file later."""
    log = MemoryPlacements()
    one = deployment(tmp_path / "one", volumes=2)
    two = deployment(tmp_path / "two", volumes=2)
    first, second = await asyncio.gather(place(one, log), place(two, log))
    assert (2, 2) == (len(first.here), len(second.here))
    assert {0, 1, 2, 3} == first.here.keys() | second.here.keys()
    for where, got in ((one, first), (two, second)):
        assert set(got.here) == {p for p in range(4) if where.volume.claim_marked(p)}


async def test_another_volumes_partitions_are_left_alone(tmp_path: Path) -> None:
    """A second volume with the same data directory settings gets nothing, and creates nothing."""
    log = MemoryPlacements(*(Placement(p, OTHER, 1) for p in range(4)))
    here = deployment(tmp_path)
    here.volume.mark_claim(1, 1)  # of a claim that the other one won
    placed = await place(here, log)
    assert ({}, {}) == (placed.here, placed.refused)
    assert not here.volume.claim_marked(1)
    assert not any(here.volume.file(partition).exists() for partition in range(4))


async def test_a_file_of_a_partition_that_another_volume_has_is_shown(tmp_path: Path) -> None:
    """It was moved here by mistake, or the volumes were mixed up."""
    log = MemoryPlacements(*(Placement(p, OTHER, 1) for p in range(4)))
    here = deployment(tmp_path)
    fill(here, 3)
    placed = await place(here, log)
    assert {} == placed.here
    assert [3] == list(placed.refused)
    assert "another volume has the partition" in placed.refused[3]


async def test_an_unplaced_partition_whose_file_is_here_is_claimed_with_the_files_epoch(tmp_path: Path) -> None:
    """Somebody deleted its consumer; the file knows where it was, and it comes first in the quota."""
    here = deployment(tmp_path, partitions=8, volumes=8)
    fill(here, 5, epoch=3)
    placed = await place(here, MemoryPlacements())
    assert {5: Placement(5, here.volume.uuid, 3)} == placed.here
    open_store(here, placed.here[5], StoreOptions()).close()


@pytest.mark.parametrize("made", [True, False])
async def test_a_stale_copy_of_a_volume_claims_nothing(tmp_path: Path, made: bool) -> None:
    """Its twin has the same name, so the broker would let both of them win."""
    here = deployment(tmp_path)
    if made:
        fill(here, 0)
    else:
        here.volume.mark_claim(0, 1)
    log = MemoryPlacements(Placement(0, here.volume.uuid, 2))
    placed = await place(here, log)
    assert {1, 2, 3} == placed.refused.keys()
    assert "partition 00 is of epoch 1 here and was placed anew as epoch 2" in placed.refused[1]
    assert [0] == list(log.placed)
    assert not any(here.volume.claim_marked(partition) for partition in (1, 2, 3))


async def test_a_file_of_another_stream_is_not_claimed(tmp_path: Path) -> None:
    """The stream was created anew: its sequences mean something else."""
    old = deployment(tmp_path, created="2026-01-01T00:00:00Z")
    fill(old, 2)
    placed = await place(deployment(tmp_path), MemoryPlacements())
    assert [0, 1, 3] == sorted(placed.here)
    assert "stream was deleted and created anew" in placed.refused[2]


async def test_a_stream_that_was_created_anew_is_not_claimed_on(tmp_path: Path) -> None:
    """The claims would bind the new stream to a volume whose files belong to the old one."""
    log = MemoryPlacements()
    log.recreated = True
    here = deployment(tmp_path)
    with pytest.raises(LogMismatchError):
        await place(here, log)
    assert {} == log.placed
    assert not any(here.volume.claim_marked(partition) for partition in range(4))


async def test_a_damaged_file_is_shown_and_the_others_are_claimed(tmp_path: Path) -> None:
    """One bad file must not keep the volume's other partitions from running."""
    here = deployment(tmp_path)
    fill(here, 2).write_bytes(b"no HDF5")
    placed = await place(here, MemoryPlacements())
    assert ([0, 1, 3], [2]) == (sorted(placed.here), list(placed.refused))


async def test_a_volume_that_was_copied_keeps_its_placement(tmp_path: Path) -> None:
    """Moved to another disk, with its identity: it is the same volume."""
    here = deployment(tmp_path / "old")
    log = MemoryPlacements()
    placed = await place(here, log)
    for placement in placed.here.values():
        store = open_store(here, placement, StoreOptions())
        made = event(1)
        assert not store.held(made.consultation, [made.event_id.bytes])
        store.commit(9)
        store.close()
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = deployment(tmp_path / "new")
    again = await place(moved, log)
    assert placed.here == again.here
    for placement in again.here.values():
        open_store(moved, placement, StoreOptions()).close()
    with open_corpus(tmp_path / "new") as corpus:
        assert [9, 9, 9, 9] == [info.committed for info in corpus.partitions]
