"""Keeps the right partitions running in this process, and puts into the bucket how far they are.

What is placed on the volume is read anew when the bucket has news, after a reconnect, and now and then. Putting the
progress is the fence: when the key of a partition has changed under this process, the placement is read, and a
partition that was placed anew is released.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace

from fiq.errors import PermanentError, TransientError
from services.core.logs import get_logger
from services.log.errors import LogMismatchError, LogUnavailableError, PlacementError
from services.log.partitions import partition_name
from services.log.protocol import Placements, Position
from services.log.status import Placement, Progress
from services.persister.assignment import Deployment, Placed, place
from services.persister.errors import VolumeError
from services.persister.members import Members, share
from services.persister.metrics import Metrics
from services.persister.runner import PartitionRunner, State
from services.persister.volume import backed_up_at

#: how often the members of the volume are looked at, seconds
STEP_SECONDS = 0.5
#: how often placement is read while the volume has not got its quota, seconds
PLACE_SECONDS = 2.0
#: and once it has, seconds
PLACED_SECONDS = 30.0
#: how often the files are looked after, seconds
OBSERVE_SECONDS = 2.0
#: how often it is looked whether there is progress to put, and how often that of one partition is put, seconds
PROGRESS_SECONDS, PUT_SECONDS = 1.0, 5.0
#: how long an orderly stop waits for the last progress to be put, seconds
LAST_PUT_SECONDS = 2.0
#: how often an idle partition's committed sequence follows the stream, seconds
ADVANCE_SECONDS = 10.0

#: a partition whose file does not answer for this long is not ready, seconds
HUNG_SECONDS = 10.0


class Coordinator:
    """The partitions of one process.

    Args:
        deployment: what the volume's processes agree on.
        members: the live processes of the volume.
        placements: reads, claims and updates places.
        make_runner: makes the runner of a placed partition.
        metrics: of this process.
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        members: Members,
        placements: Placements,
        make_runner: Callable[[Placement], PartitionRunner],
        metrics: Metrics,
    ) -> None:
        self._deployment = deployment
        self._members = members
        self._placements = placements
        self._make_runner = make_runner
        self._metrics = metrics
        self._log = get_logger("coordinator")
        self._runners: dict[int, PartitionRunner] = {}
        self._run_as: dict[int, Placement] = {}  # what each runner was made for, as the bucket has it now
        self._put_at: dict[int, float] = {}
        self._placed = Placed({}, {})
        self._shared: set[int] = set()  # partitions of the volume that were shared among its processes
        self._advance_at: dict[int, float] = {}
        self._place_at = 0.0
        self._trouble = "partitions have not been placed yet"
        self._reconnects = 0
        self.on_change: Callable[[list[int]], None] = lambda _: None

    @property
    def partitions(self) -> list[int]:
        """The partitions that this process runs, sorted."""
        return sorted(self._runners)

    def progress(self) -> dict[int, Progress]:
        """Return how far each partition is that this process follows just now."""
        return {
            partition: Progress(committed, runner.waiting)
            for partition, runner in self._runners.items()
            if (committed := runner.committed) is not None
        }

    async def lower(self, partition: int, at: Position) -> None:
        """Put that *partition* has reached no more than *at*, and wait until no trim goes by what its key said before.

        Raises:
            PlacementError: it was placed anew.
            LogUnavailableError: the outcome is not known; call again.
        """
        known = self._run_as[partition]
        if at.sequence < known.committed:
            self._run_as[partition] = await self._placements.progress(known, at.sequence, at.message_id)
        await asyncio.sleep(self._placements.fence_seconds)

    async def run(self) -> None:
        """Work until cancelled.

        Raises PermanentError: the volume cannot be used any more.
        """
        try:
            async with self._placements.watching(self._place_soon), asyncio.TaskGroup() as group:
                group.create_task(self._share())
                group.create_task(self._look_after())
                group.create_task(self._put_always())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def stop(self) -> None:
        """Finish the batches in hand and release every partition."""
        await self._release(list(self._runners))
        self._members.leave()

    def problems(self) -> list[str]:
        """Return why this process is not ready; nothing when it is."""
        problems = [self._trouble] if self._trouble else []
        if not (self._trouble or self._placed.here or self._placed.refused):
            log = self._deployment.log
            problems.append(
                f"no partition of store {log.store} is placed on this volume: all {log.partitions} are on others; "
                f"FI_VOLUMES is {self._deployment.volumes}, and a partition does not move by itself"
            )
        problems += [
            f"partition {partition_name(p)} is placed here, and was not shared among the volume's processes yet"
            for p in sorted(self._placed.here.keys() - self._shared)
        ]
        for partition, runner in sorted(self._runners.items()):
            if runner.state is not State.FOLLOWING:
                reason = f": {runner.reason}" if runner.reason else ""
                problems.append(f"partition {partition_name(partition)} is {runner.state}{reason}")
            elif runner.disk_wait > HUNG_SECONDS:
                problems.append(
                    f"partition {partition_name(partition)} has waited for its file for {runner.disk_wait:.0f} s: "
                    "does the disk answer?"
                )
        problems += [f"partition {partition_name(p)}: {reason}" for p, reason in sorted(self._placed.refused.items())]
        return problems

    # -- placement and sharing ----------------------------------------------------------------------------------------

    async def _share(self) -> None:
        while True:
            try:
                if time.monotonic() >= self._place_at or self._placements.reconnects != self._reconnects:
                    await self._place()
                await self._step()
            except OSError as error:  # the data directory; what runs goes on, and shows its own troubles
                self._in_trouble("DATA_DIRECTORY_FAILED", f"the data directory cannot be used: {error.strerror}")
            await asyncio.sleep(STEP_SECONDS)

    async def _place(self) -> None:
        before = self._placed.refused
        self._reconnects = self._placements.reconnects
        self._place_at = math.inf  # what changes from here on is read again
        try:
            self._placed = await place(self._deployment, self._placements)
        except TransientError as error:
            self._in_trouble("PLACEMENT_UNKNOWN", f"placement is not known: {error}")
            return
        except (LogMismatchError, PlacementError, VolumeError) as error:  # the process stays, for readiness to tell it
            self._in_trouble("PLACEMENT_REFUSED", str(error))
            return
        self._trouble = ""
        full = len(self._placed.here) >= self._deployment.quota
        self._place_at = min(self._place_at, time.monotonic() + (PLACED_SECONDS if full else PLACE_SECONDS))
        for partition, reason in self._placed.refused.items() - before.items():
            self._log.error("PARTITION_NOT_CLAIMED", partition=partition_name(partition), reason=reason)

    async def _step(self) -> None:
        alive = await asyncio.to_thread(self._members.alive)
        wanted = {p for p, owner in share(self._placed.here, alive).items() if owner == self._members.name}
        here = self._placed.here
        # one that was placed anew meanwhile begins anew, too: its file is no longer the right one, and says so
        given_up = [p for p in self._runners if p not in wanted or not _same(self._run_as[p], here[p])]
        await self._release(given_up)
        new = sorted(wanted - self._runners.keys())
        for partition in new:
            # what this process put when it had the partition earlier, another one of the volume may have gone on with
            self._run_as[partition] = replace(here[partition], writer="")
            runner = self._runners[partition] = self._make_runner(here[partition])
            runner.start()
        self._shared = set(here)
        if new or given_up:
            self._log.info("PARTITIONS_SHARED", partitions=self.partitions, processes=len(alive))
            self.on_change(self.partitions)

    async def _release(self, partitions: list[int]) -> None:
        # a runner stays in the list until it has stopped: whoever is cancelled here leaves it to stop()
        await asyncio.gather(*(self._runners[partition].stop() for partition in partitions))
        here = self._placed.here
        kept = [p for p in partitions if p in here and _same(self._run_as[p], here[p])]
        reached = {p: at for p in kept if (at := self._runners[p].reached) is not None}
        with contextlib.suppress(TimeoutError):  # then the key says less than the file has, which loses nothing
            async with asyncio.timeout(LAST_PUT_SECONDS):
                await asyncio.gather(*(self._put(partition, at) for partition, at in reached.items()))
        for partition in partitions:
            del self._runners[partition]
            self._metrics.of(partition).remove()
            self._log.info("PARTITION_RELEASED", partition=partition_name(partition))

    def _place_soon(self) -> None:
        self._place_at = 0.0

    def _in_trouble(self, event: str, reason: str) -> None:
        self._trouble = reason
        self._place_at = time.monotonic() + PLACE_SECONDS
        self._log.warning(event, reason=reason)

    # -- looking after ------------------------------------------------------------------------------------------------

    async def _look_after(self) -> None:
        """Do what a disk may keep waiting."""
        while True:
            await asyncio.sleep(OBSERVE_SECONDS)
            for runner in list(self._runners.values()):
                await runner.look_after()
            await self._advance_idle()
            await self._measure()

    async def _put_always(self) -> None:
        """Put what the partitions have reached, each now and then, and at once where the key says too much."""
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            now, due = time.monotonic(), {}
            for partition, runner in self._runners.items():
                at, known = runner.proven, self._run_as[partition]
                if at is not None and (at.sequence < known.committed or now >= self._put_at.get(partition, 0.0)):
                    due[partition] = at
                    self._put_at[partition] = now + PUT_SECONDS
            await asyncio.gather(*(self._put(partition, at) for partition, at in due.items()))

    async def _put(self, partition: int, at: Position) -> None:
        """Put that the file of *partition* has reached *at*, unless its key says so."""
        known = self._run_as[partition]
        if Position(known.committed, known.message_id) == at:
            return
        try:
            self._run_as[partition] = await self._placements.progress(known, at.sequence, at.message_id)
        except PermanentError as error:
            self._log.error("PROGRESS_REFUSED", partition=partition_name(partition), reason=str(error))
            self._place_soon()
            if isinstance(error, PlacementError) and partition in self._runners:
                self._runners[partition].fail(error)
        except LogUnavailableError as error:
            self._log.warning("PROGRESS_NOT_PUT", partition=partition_name(partition), reason=str(error))

    async def _measure(self) -> None:
        volume = self._deployment.volume
        try:
            free, size = await asyncio.to_thread(volume.room)
            backed_up = await asyncio.to_thread(backed_up_at, volume.directory)
        except OSError as error:
            self._log.warning("OBSERVATION_FAILED", reason=f"the data directory cannot be measured: {error.strerror}")
            return
        self._metrics.volume_free.labels(volume.uuid).set(free)
        self._metrics.volume_size.labels(volume.uuid).set(size)
        self._metrics.backup.labels(volume.uuid).set(backed_up)

    async def _advance_idle(self) -> None:
        """Move idle partitions up to the stream's end now and then, or trim would stop at their last events."""
        now = time.monotonic()
        for partition, runner in list(self._runners.items()):
            if runner.idle_at is not None and now >= self._advance_at.get(partition, 0.0):
                self._advance_at[partition] = now + ADVANCE_SECONDS
                try:
                    await runner.advance()
                except (TransientError, PermanentError) as error:
                    self._log.warning("OBSERVATION_FAILED", reason=str(error))


def _same(one: Placement, other: Placement) -> bool:
    return (one.volume, one.epoch) == (other.volume, other.epoch)
