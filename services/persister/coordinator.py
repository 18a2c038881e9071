"""Keeps the right partitions running in this process, and reports to the log how far they are.

Three loops run at the same time:

- *assign*: claim partitions for the volume and divide them among its processes; start and release runners accordingly.
  The records are read when the log says that they changed, after a reconnect, and every few seconds.
- *report*: write the progress of each partition to its record. This is also the fence: a record that has changed under
  this process shows that the partition was placed again, and it is released.
- *maintain*: checkpoints, gauges, and the position of idle partitions; all of this may wait for a slow disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from fiq.errors import PermanentError, TransientError
from services.core.logs import get_logger
from services.log.errors import LogMismatchError, LogUnavailableError, PlacementError
from services.log.partitions import partition_name
from services.log.protocol import Placements, Position
from services.log.status import PartitionProgress, Placement
from services.persister.errors import VolumeError
from services.persister.metrics import PersisterMetrics
from services.persister.partition import PartitionRunner, RunnerState
from services.persister.placement import Assignment, VolumeContext, Workers, claim_partitions, owners
from services.persister.volume import backed_up_at, verified

#: how often the partitions are divided among the volume's processes, seconds
SHARE_SECONDS = 0.5
#: how often the records are read while the volume has not got its quota, seconds
CLAIM_SECONDS = 2.0
#: how often they are read once it has, seconds
CLAIMED_SECONDS = 30.0
#: how often files are maintained, seconds
MAINTAIN_SECONDS = 2.0
#: how often it is checked whether there is progress to report, seconds
PROGRESS_SECONDS = 1.0
#: how often the progress of one partition is reported at most, seconds
REPORT_SECONDS = 5.0
#: how long an orderly stop waits for the last reports, seconds
LAST_REPORT_SECONDS = 2.0
#: how often the committed sequence of an idle partition follows the stream, seconds
ADVANCE_SECONDS = 10.0
#: the disk must have this much more than its reserve before rounds go on, percent
RESERVE_MARGIN = 0.5
#: a partition whose file does not answer for this long is not ready, seconds
HUNG_SECONDS = 10.0


@dataclass(slots=True)
class _Running:
    """A partition that this process runs.

    Attributes:
        runner: runs it.
        record: its record as this process last read or wrote it.
        report_at: when its progress is reported next, on :func:`time.monotonic`.
        advance_at: when it follows the stream next, if it is idle.
    """

    runner: PartitionRunner
    record: Placement
    report_at: float = 0.0
    advance_at: float = 0.0


class Coordinator:
    """The partitions of one process.

    Args:
        context: what the volume's processes have in common.
        workers: the live processes of the volume.
        placements: reads, claims and updates the records.
        make_runner: makes the runner of a partition.
        metrics: of this process.
        reserve: percent of the volume's file system that must stay free; 0: nothing.
        hold: called with True when less is free, and with False when there is room again.

    Attributes:
        on_change: called when :attr:`partitions` has changed.
        facts: what the process says of its volume, renewed every few seconds: ``verified`` and ``conflicts``.
    """

    def __init__(
        self,
        context: VolumeContext,
        *,
        workers: Workers,
        placements: Placements,
        make_runner: Callable[[Placement], PartitionRunner],
        metrics: PersisterMetrics,
        reserve: float = 0.0,
        hold: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.facts: dict[str, str] = {}
        self._context = context
        self._workers = workers
        self._placements = placements
        self._make_runner = make_runner
        self._metrics = metrics
        self._reserve = reserve
        self._hold = hold
        self._held = ""  # why no events are written; empty when they are
        self._log = get_logger("coordinator")
        self._running: dict[int, _Running] = {}
        self._assignment = Assignment({}, {})
        self._shared: set[int] = set()  # partitions of the volume that were divided among its processes
        self._trouble = "partitions have not been placed yet"
        self._claim_at = 0.0
        self._reconnects = 0

    @property
    def partitions(self) -> list[int]:
        """The partitions that this process runs, sorted."""
        return sorted(self._running)

    def progress(self) -> dict[int, PartitionProgress]:
        """Return how far each partition is that this process follows."""
        return {
            partition: PartitionProgress(committed, one.runner.waiting)
            for partition, one in self._running.items()
            if (committed := one.runner.committed) is not None
        }

    async def lower(self, partition: int, at: Position) -> None:
        """Report that *partition* has reached only *at*, and wait until trim cannot act on the earlier report any more.

        Raises:
            PlacementError: it was placed again.
            LogUnavailableError: the outcome is not known; call again.
        """
        one = self._running[partition]
        if at.sequence < one.record.committed:
            await self._put_progress(one, at)
        await asyncio.sleep(self._placements.fence_seconds)

    async def run(self) -> None:
        """Work until cancelled.

        Raises PermanentError: the volume cannot be used any more.
        """
        try:
            async with self._placements.watching(self._claim_soon), asyncio.TaskGroup() as group:
                group.create_task(self._assign())
                group.create_task(self._report())
                group.create_task(self._maintain())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def stop(self) -> None:
        """Finish the current batches and release every partition."""
        await self._release(list(self._running))
        self._workers.leave()

    def problems(self) -> list[str]:
        """Return why this process is not ready; empty when it is."""
        placed, blocked = self._assignment.placed, self._assignment.blocked
        problems = [reason for reason in (self._trouble, self._held) if reason]
        if not (self._trouble or placed or blocked):
            log = self._context.log
            problems.append(
                f"no partition of store {log.store} is placed on this volume: all {log.partitions} are on others; "
                f"FI_VOLUMES is {self._context.volumes}, and a partition does not move by itself"
            )
        problems += [
            f"partition {partition_name(p)} is placed here and was not assigned to a process of the volume yet"
            for p in sorted(placed.keys() - self._shared)
        ]
        for partition in self.partitions:
            runner, name = self._running[partition].runner, partition_name(partition)
            if runner.state is not RunnerState.FOLLOWING:
                problems.append(f"partition {name} is {runner.state}{runner.reason and f': {runner.reason}'}")
            elif runner.disk_wait > HUNG_SECONDS:
                problems.append(
                    f"partition {name} has waited for its file for {runner.disk_wait:.0f} s: does the disk respond?"
                )
        problems += [f"partition {partition_name(p)}: {reason}" for p, reason in sorted(blocked.items())]
        return problems

    # -- assign -------------------------------------------------------------------------------------------------------

    async def _assign(self) -> None:
        while True:
            try:
                if time.monotonic() >= self._claim_at or self._placements.reconnects != self._reconnects:
                    await self._claim()
                await self._share()
            except OSError as error:  # of the data directory; runners go on and show their own troubles
                self._in_trouble("DATA_DIRECTORY_FAILED", f"the data directory cannot be used: {error.strerror}")
            await asyncio.sleep(SHARE_SECONDS)

    async def _claim(self) -> None:
        before = self._assignment.blocked
        self._reconnects = self._placements.reconnects
        self._claim_at = math.inf  # unless the records change meanwhile
        try:
            self._assignment = await claim_partitions(self._context, self._placements)
        except TransientError as error:
            self._in_trouble("PLACEMENT_UNKNOWN", f"placement is not known: {error}")
            return
        except (LogMismatchError, PlacementError, VolumeError) as error:
            # the process goes on, so that /readyz shows it
            self._in_trouble("PLACEMENT_REFUSED", str(error))
            return
        self._trouble = ""
        full = len(self._assignment.placed) >= self._context.quota
        self._claim_at = min(self._claim_at, time.monotonic() + (CLAIMED_SECONDS if full else CLAIM_SECONDS))
        for partition, reason in self._assignment.blocked.items() - before.items():
            self._log.error("PARTITION_NOT_CLAIMED", partition=partition_name(partition), reason=reason)

    async def _share(self) -> None:
        alive = await asyncio.to_thread(self._workers.alive)
        placed = self._assignment.placed
        wanted = {p for p, worker in owners(placed, alive).items() if worker == self._workers.name}
        # a partition that was placed again starts again: its file is not the right one any more, and reports that
        given_up = [p for p, one in self._running.items() if p not in wanted or not _same(one.record, placed[p])]
        await self._release(given_up)
        new = sorted(wanted - self._running.keys())
        for partition in new:
            # writer: another process of the volume may have run the partition since this one wrote the record
            record = replace(placed[partition], writer="")
            one = self._running[partition] = _Running(self._make_runner(placed[partition]), record)
            one.runner.start()
        self._shared = set(placed)
        if new or given_up:
            self._log.info("PARTITIONS_SHARED", partitions=self.partitions, processes=len(alive))
            self.on_change()

    async def _release(self, partitions: list[int]) -> None:
        # a runner is listed until it has stopped: if this is cancelled, stop() waits for it
        await asyncio.gather(*(self._running[partition].runner.stop() for partition in partitions))
        placed = self._assignment.placed
        kept = [p for p in partitions if p in placed and _same(self._running[p].record, placed[p])]
        last = [(self._running[p], at) for p in kept if (at := self._running[p].runner.released_at) is not None]
        with contextlib.suppress(TimeoutError):  # a record that is behind its file does no harm
            async with asyncio.timeout(LAST_REPORT_SECONDS):
                await asyncio.gather(*(self._report_one(one, at) for one, at in last))
        for partition in partitions:
            del self._running[partition]
            self._metrics.of(partition).remove()
            self._log.info("PARTITION_RELEASED", partition=partition_name(partition))

    def _claim_soon(self) -> None:
        self._claim_at = 0.0

    def _in_trouble(self, event: str, reason: str) -> None:
        self._trouble = reason
        self._claim_at = time.monotonic() + CLAIM_SECONDS
        self._log.warning(event, reason=reason)

    # -- report -------------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Report progress every few seconds, and at once where the record is ahead of the file."""
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            now, due = time.monotonic(), []
            for one in self._running.values():
                at = one.runner.verified
                if at is not None and (at.sequence < one.record.committed or now >= one.report_at):
                    due.append((one, at))
                    one.report_at = now + REPORT_SECONDS
            await asyncio.gather(*(self._report_one(one, at) for one, at in due))

    async def _report_one(self, one: _Running, at: Position) -> None:
        """Report that a partition's file has reached *at*, unless its record says so."""
        name = partition_name(one.record.partition)
        if Position(one.record.committed, one.record.message_id) == at:
            return
        try:
            await self._put_progress(one, at)
        except PermanentError as error:
            self._log.error("PROGRESS_REFUSED", partition=name, reason=str(error))
            self._claim_soon()
            if isinstance(error, PlacementError):
                one.runner.fail(error)
        except LogUnavailableError as error:
            self._log.warning("PROGRESS_NOT_PUT", partition=name, reason=str(error))

    async def _put_progress(self, one: _Running, at: Position) -> None:
        """Put that a partition's file has reached *at*; raises what ``progress`` of the placements raises."""
        one.record = await self._placements.progress(
            one.record, at.sequence, at.message_id, owned=lambda: one.runner.holds_file
        )

    # -- maintain -----------------------------------------------------------------------------------------------------

    async def _maintain(self) -> None:
        while True:
            await self._measure()
            await asyncio.sleep(MAINTAIN_SECONDS)
            for one in list(self._running.values()):
                await one.runner.maintain()
            await self._advance_idle()

    async def _advance_idle(self) -> None:
        """Let idle partitions follow the end of the stream; trim would stop at their last events otherwise."""
        now = time.monotonic()
        for one in list(self._running.values()):
            if one.runner.idle_at is not None and now >= one.advance_at:
                one.advance_at = now + ADVANCE_SECONDS
                try:
                    await one.runner.advance()
                except (TransientError, PermanentError) as error:
                    self._log.warning("OBSERVATION_FAILED", reason=str(error))

    async def _measure(self) -> None:
        volume = self._context.volume
        try:
            free, size = await asyncio.to_thread(volume.room)
            backed_up = await asyncio.to_thread(backed_up_at, volume.directory)
            checked = await asyncio.to_thread(verified, volume.directory)
        except OSError as error:
            self._log.warning("OBSERVATION_FAILED", reason=f"the data directory cannot be measured: {error.strerror}")
            return
        self._metrics.volume_free.labels(volume.uuid).set(free)
        self._metrics.volume_size.labels(volume.uuid).set(size)
        self._metrics.backup.labels(volume.uuid).set(backed_up)
        self._metrics.verified.labels(volume.uuid).set(
            0 if checked is None else datetime.fromisoformat(checked.at).timestamp()
        )
        self._metrics.verify_problems.labels(volume.uuid).set(0 if checked is None else checked.problems)
        self.facts["verified"] = "" if checked is None else checked.show()
        self.facts["conflicts"] = str(sum(one.runner.conflicts for one in self._running.values()))
        self._keep_reserve(100 * free / size if size else 100.0)
        self._metrics.volume_held.labels(volume.uuid).set(bool(self._held))

    def _keep_reserve(self, free: float) -> None:
        """Hold the rounds while less than the reserve is *free*, percent: full disks stop the nodes that share them."""
        if not self._held and free < self._reserve:
            self._held = (
                f"events are not written, because {self._context.volume.directory} has {free:.1f} % of its disk free "
                f"and FI_DISK_RESERVE is {self._reserve:g} %: make room"
            )
            self._log.error("DISK_RESERVE_REACHED", reason=self._held)
        elif self._held and free >= self._reserve + RESERVE_MARGIN:
            self._held = ""
            self._log.info("DISK_RESERVE_FREE")
        self._hold(bool(self._held))


def _same(one: Placement, other: Placement) -> bool:
    return (one.volume, one.epoch) == (other.volume, other.epoch)
