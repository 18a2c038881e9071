"""The partitions of one process: shared, handed over, given up, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.log.errors import PlacementError
from services.log.protocol import Position
from services.log.settings import LogSettings
from services.log.status import PartitionProgress, Placement
from services.persister.metrics import PersisterMetrics
from services.persister.partition import RunnerState
from services.persister.service import Coordinator
from services.persister.volume import Volume, VolumeContext
from tests.support.persister import LOG
from tests.support.placements import MemoryPlacements, placed
from tests.support.polling import eventually


class FakeRunner:
    """Starts at once; stops when its gate opens."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.state, self.reason = RunnerState.FOLLOWING, ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.stopping = self.stopped = False
        self.disk_wait = 0.0
        self.committed: int | None = 7
        self.waiting = 3
        self.conflicts = 2
        self.in_doubt = False
        self.failed: list[Exception] = []
        self.released_at: Position | None = None
        self.idle_at: int | None = None
        self.advanced = 0
        self.disk = asyncio.Event()
        self.disk.set()

    async def maintain(self) -> None:
        await self.disk.wait()

    def start(self) -> None:
        pass

    async def stop(self) -> None:
        self.stopping = True
        await self.gate.wait()
        self.stopped = True
        self.released_at, self.committed = self.verified, None

    @property
    def verified(self) -> Position | None:
        return None if self.committed is None or self.in_doubt else Position(self.committed, f"c/{self.committed}")

    def fail(self, error: Exception) -> None:
        self.failed.append(error)

    async def advance(self) -> None:
        self.advanced += 1


class Rig:
    """A coordinator among fakes, on a real volume."""

    def __init__(self, folder: Path, placements: MemoryPlacements) -> None:
        self.alive = ["us"]
        self.left = False
        self.look = threading.Event()
        self.look.set()
        self.runners: dict[int, FakeRunner] = {}
        self.changes: list[list[int]] = []
        self.volume = Volume.open(folder, "main")
        self.metrics = PersisterMetrics()
        workers = SimpleNamespace(name="us", alive=self._alive, leave=self._leave)
        self.coordinator = Coordinator(
            VolumeContext(self.volume, 1, LogSettings(partitions=4), LOG),
            workers=cast("Any", workers),
            placements=placements,
            make_runner=cast("Any", self._make),
            metrics=self.metrics,
        )
        self.coordinator.on_change = lambda: self.changes.append(self.coordinator.partitions)

    def _alive(self) -> list[str]:
        assert self.look.wait(5)
        return self.alive

    def _leave(self) -> None:
        self.left = True

    def _make(self, placement: Placement) -> FakeRunner:
        made = self.runners[placement.partition] = FakeRunner(placement)
        return made


async def begun(rig: Rig) -> asyncio.Task[None]:
    """Begin as a process does, and wait until it runs all four partitions."""
    work = asyncio.create_task(rig.coordinator.run())
    await eventually(lambda: len(rig.runners) == 4)
    return work


async def ended(work: asyncio.Task[None], rig: Rig) -> None:
    """End as a process does."""
    work.cancel()
    await asyncio.wait({work})
    await rig.coordinator.stop()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.persister.service.SHARE_SECONDS", 0.01)
    monkeypatch.setattr("services.persister.service.CLAIM_SECONDS", 0.01)
    monkeypatch.setattr("services.persister.service.CLAIMED_SECONDS", 0.01)
    monkeypatch.setattr("services.persister.service.MAINTAIN_SECONDS", 1000)


async def test_a_process_that_is_alone_runs_everything(tmp_path: Path) -> None:
    """And says so."""
    rig = Rig(tmp_path, MemoryPlacements())
    assert rig.coordinator.problems() == ["partitions have not been placed yet"]
    work = asyncio.create_task(rig.coordinator.run())
    await eventually(lambda: rig.changes == [[0, 1, 2, 3]])
    assert [] == rig.coordinator.problems()
    await ended(work, rig)
    assert all(runner.stopped for runner in rig.runners.values())
    assert rig.left


async def test_partitions_that_were_placed_and_not_yet_shared_are_not_ready(tmp_path: Path) -> None:
    """No process runs them yet."""
    rig = Rig(tmp_path, MemoryPlacements())
    rig.look.clear()
    work = asyncio.create_task(rig.coordinator.run())
    await eventually(lambda: rig.coordinator.problems() != ["partitions have not been placed yet"])
    assert [f"partition 0{p} is placed here and was not assigned" for p in range(4)] == [
        problem.partition(" to a")[0] for problem in rig.coordinator.problems()
    ]
    rig.look.set()
    await eventually(lambda: rig.coordinator.problems() == [])
    await ended(work, rig)


async def test_a_newcomer_gets_its_share(tmp_path: Path) -> None:
    """Half of the partitions, each released first."""
    rig = Rig(tmp_path, MemoryPlacements())
    work = asyncio.create_task(rig.coordinator.run())
    await eventually(lambda: rig.changes == [[0, 1, 2, 3]])
    rig.alive = ["other", "us"]
    await eventually(lambda: len(rig.coordinator.partitions) == 2)
    assert 2 == sum(runner.stopped for runner in rig.runners.values())
    await ended(work, rig)


async def test_a_stop_in_the_middle_of_a_handover_ends(tmp_path: Path) -> None:
    """SIGTERM may come at any time; it waits for the partitions that are being handed over."""
    rig = Rig(tmp_path, MemoryPlacements())
    work = await begun(rig)
    for runner in rig.runners.values():
        runner.gate.clear()
    rig.alive = ["other", "us"]
    await eventually(lambda: any(runner.stopping for runner in rig.runners.values()))
    work.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait({work})
    for runner in rig.runners.values():
        runner.gate.set()
    async with asyncio.timeout(5):
        await rig.coordinator.stop()
    assert all(runner.stopped for runner in rig.runners.values())


async def test_a_partition_that_is_placed_again_meanwhile_starts_again(tmp_path: Path) -> None:
    """Its runner was made for the earlier placement; the new one opens the file, which is the right one or not."""
    placements = MemoryPlacements()
    rig = Rig(tmp_path, placements)
    work = await begun(rig)
    before = dict(rig.runners)
    placements.placed[2] = placed(2, rig.volume.uuid, 2)
    await eventually(lambda: rig.runners[2].placement.epoch == 2)
    assert before[2].stopped
    assert [before[p] for p in (0, 1, 3)] == [rig.runners[p] for p in (0, 1, 3)]
    assert not any(before[p].stopping for p in (0, 1, 3))
    await ended(work, rig)


async def test_a_volume_without_partitions_is_not_ready(tmp_path: Path) -> None:
    """It would look healthy and never do anything."""
    other = "11111111-2222-4333-8444-555555555555"
    rig = Rig(tmp_path, MemoryPlacements(*(placed(p, other) for p in range(4))))
    work = asyncio.create_task(rig.coordinator.run())
    await eventually(lambda: any("all 4 are on others" in problem for problem in rig.coordinator.problems()))
    await ended(work, rig)


async def test_a_stream_created_anew_is_shown_and_not_claimed(tmp_path: Path) -> None:
    """What runs stays, so that each partition can say why it stopped."""
    placements = MemoryPlacements()
    rig = Rig(tmp_path, placements)
    work = await begun(rig)
    placements.placed.clear()
    placements.created = "2026-12-01T00:00:00Z"
    await eventually(lambda: any("created anew" in problem for problem in rig.coordinator.problems()))
    assert [0, 1, 2, 3] == rig.coordinator.partitions
    await ended(work, rig)


async def test_a_data_directory_that_takes_no_file_is_shown_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk must not end the process."""
    full = True
    note = Volume.note_formed

    def noting(volume: Volume, stream_created: str) -> None:
        if full:
            raise OSError(28, "No space left on device")
        note(volume, stream_created)

    monkeypatch.setattr(Volume, "note_formed", noting)
    rig = Rig(tmp_path, MemoryPlacements())
    work = asyncio.create_task(rig.coordinator.run())
    await eventually(lambda: any("No space left on device" in problem for problem in rig.coordinator.problems()))
    full = False
    await eventually(lambda: rig.changes == [[0, 1, 2, 3]])
    assert [] == rig.coordinator.problems()
    await ended(work, rig)


async def test_the_disks_room_is_shown_also_while_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator wants to see a full disk before anything else; one that cannot be measured ends nothing."""
    monkeypatch.setattr("services.persister.service.MAINTAIN_SECONDS", 0.01)
    free = iter([10, None, 9])

    def room(_: Volume) -> tuple[int, int]:
        found = next(free, 9)
        if found is None:
            raise OSError(5, "Input/output error")
        return found, 100

    monkeypatch.setattr(Volume, "room", room)
    rig = Rig(tmp_path, MemoryPlacements())
    rig.alive = ["other"]
    work = asyncio.create_task(rig.coordinator.run())

    def shown(name: str) -> float | None:
        return rig.metrics.registry.get_sample_value(name, {"volume": rig.volume.uuid})

    await eventually(lambda: shown("fi_volume_free_bytes") == 9)
    assert 100 == shown("fi_volume_size_bytes")
    await ended(work, rig)


async def test_a_disk_that_hangs_is_shown(tmp_path: Path) -> None:
    """What other partitions have reached is still reported."""
    rig = Rig(tmp_path, MemoryPlacements())
    work = await begun(rig)
    rig.runners[2].disk.clear()
    rig.runners[2].disk_wait = 11.0
    assert ["partition 02 has waited for its file for 11 s: does the disk respond?"] == rig.coordinator.problems()
    assert PartitionProgress(7, 3) == rig.coordinator.progress()[1]
    rig.runners[2].disk.set()
    await ended(work, rig)


# -- progress ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report progress whenever there is some."""
    monkeypatch.setattr("services.persister.service.PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr("services.persister.service.REPORT_SECONDS", 0.01)


@pytest.mark.usefixtures("at_once")
async def test_progress_is_reported_when_it_changed_and_only_of_followed_partitions(tmp_path: Path) -> None:
    """A log that was set back must not lower what another one's trim goes by."""
    log = MemoryPlacements()
    rig = Rig(tmp_path, log)
    work = asyncio.create_task(rig.coordinator.run())
    await eventually(lambda: [7] * 4 == [one.committed for one in log.placed.values()])
    assert dict.fromkeys(range(4), PartitionProgress(7, 3)) == rig.coordinator.progress()
    revisions = [one.revision for one in log.placed.values()]
    rig.runners[2].committed = None
    rig.runners[3].committed = 9
    await eventually(lambda: log.placed[3].committed == 9)
    assert revisions[:3] == [log.placed[p].revision for p in range(3)]
    assert [0, 1, 3] == sorted(rig.coordinator.progress())
    await ended(work, rig)


@pytest.mark.usefixtures("at_once")
async def test_nothing_is_reported_while_a_follower_is_in_doubt(tmp_path: Path) -> None:
    """The log may have been set back, and trim would go by what another one's file has; at the end, too."""
    log = MemoryPlacements()
    rig = Rig(tmp_path, log)
    work = asyncio.create_task(rig.coordinator.run())
    await eventually(lambda: [(7, "c/7")] * 4 == [(one.committed, one.message_id) for one in log.placed.values()])
    rig.runners[2].in_doubt = True
    for runner in rig.runners.values():
        runner.committed = 9
    await eventually(lambda: 9 == log.placed[3].committed)
    await ended(work, rig)
    assert [9, 9, 7, 9] == [log.placed[p].committed for p in range(4)]


@pytest.mark.usefixtures("at_once")
async def test_a_partition_whose_progress_is_refused_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the bucket was set back: its record reads as before, so nothing else would stop it."""
    log = MemoryPlacements()
    rig = Rig(tmp_path, log)
    work = asyncio.create_task(rig.coordinator.run())
    await eventually(lambda: 7 == (log.placed[2].committed if 2 in log.placed else 0))

    async def refuse(*_: object, **__: object) -> Placement:
        raise PlacementError("the bucket was set back")

    monkeypatch.setattr(log, "progress", refuse)
    rig.runners[2].committed = 9
    await eventually(lambda: rig.runners[2].failed)
    assert not rig.runners[1].failed
    await ended(work, rig)


async def test_progress_is_reported_every_few_seconds_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But at once where the record is ahead of the file: nothing that it lacks may be trimmed."""
    monkeypatch.setattr("services.persister.service.PROGRESS_SECONDS", 0.01)
    log = MemoryPlacements()
    rig = Rig(tmp_path, log)
    work = await begun(rig)
    await eventually(lambda: log.placed[0].committed == 7)
    rig.runners[0].committed = 8
    rig.runners[1].committed = 6
    await eventually(lambda: log.placed[1].committed == 6)
    assert 7 == log.placed[0].committed
    await ended(work, rig)
    assert 8 == log.placed[0].committed  # an orderly stop reports the last of it


@pytest.mark.usefixtures("at_once")
async def test_a_process_learns_that_its_partition_was_placed_again_when_it_reports_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the fence: its runner stops at once, before the records are read again."""
    monkeypatch.setattr("services.persister.service.CLAIMED_SECONDS", 1000)
    log = MemoryPlacements()
    rig = Rig(tmp_path, log)
    work = await begun(rig)
    await eventually(lambda: log.placed[2].committed == 7)
    before = rig.runners[2]
    log.placed[2] = placed(2, rig.volume.uuid, 2, committed=5)
    before.committed = 8
    await eventually(lambda: before.stopped)
    assert 8 != log.placed[2].committed
    await ended(work, rig)


async def test_records_are_read_again_after_a_change_and_after_a_reconnect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.persister.service.CLAIMED_SECONDS", 1000)
    log = MemoryPlacements()
    rig = Rig(tmp_path, log)
    work = await begun(rig)
    log.placed[2] = placed(2, rig.volume.uuid, 2)
    log.on_change()
    await eventually(lambda: rig.runners[2].placement.epoch == 2)
    log.placed[1] = placed(1, rig.volume.uuid, 2)
    log.reconnects += 1
    await eventually(lambda: rig.runners[1].placement.epoch == 2)
    await ended(work, rig)


async def test_a_partition_whose_key_is_deleted_is_released_and_shown(tmp_path: Path) -> None:
    log = MemoryPlacements()
    rig = Rig(tmp_path, log)
    work = await begun(rig)
    del log.placed[3]
    log.deleted.add(3)
    await eventually(lambda: [0, 1, 2] == rig.coordinator.partitions)
    (problem,) = rig.coordinator.problems()
    assert problem.startswith("partition 03: key main.03 of bucket fi-partitions is gone")
    await ended(work, rig)


async def test_idle_partitions_follow_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or trim would stop at their last events; a partition at work needs no help, and an idle one little."""
    monkeypatch.setattr("services.persister.service.MAINTAIN_SECONDS", 0.01)
    rig = Rig(tmp_path, MemoryPlacements())
    work = await begun(rig)
    rig.runners[1].idle_at = 7
    await eventually(lambda: rig.runners[1].advanced)
    assert [0, 1, 0, 0] == [runner.advanced for runner in rig.runners.values()]
    await ended(work, rig)
