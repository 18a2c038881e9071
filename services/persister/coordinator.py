"""Keeps the right partitions running in this process, and looks after them: backlog, trim, idle checkpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from services.contract.errors import PermanentError, TransientError
from services.contract.logs import get_logger
from services.eventlog.errors import LogMismatchError
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.idle import empty_up_to
from services.eventlog.jetstream.names import STREAM, consumer_name
from services.eventlog.jetstream.placement import Placement, Placements, placement_of
from services.eventlog.jetstream.trim import Trimmer
from services.eventlog.partitions import partition_name
from services.persister.assignment import Deployment, Placed, place
from services.persister.members import Members, share
from services.persister.metrics import Metrics
from services.persister.runner import PartitionRunner, State

#: how often the members of the volume are looked at, seconds
STEP_SECONDS = 0.5
#: how often placement is read while the volume has not got its quota, seconds
PLACE_SECONDS = 2.0
#: and once it has, seconds
PLACED_SECONDS = 30.0
#: how often the broker is asked for the backlog, and the stream is trimmed, seconds
OBSERVE_SECONDS = 2.0
#: how often an idle partition's committed sequence follows the stream, seconds
ADVANCE_SECONDS = 30.0

#: a partition whose file does not answer for this long is not ready, seconds
HUNG_SECONDS = 10.0
#: above this share of the stream's limit idle partitions follow at once, so that trim finds something
_HURRY_FULLNESS = 0.6


class Coordinator:
    """The partitions of one process.

    Args:
        deployment: what the volume's processes agree on.
        members: the live processes of the volume.
        placements: reads and claims places.
        make_runner: makes the runner of a placed partition.
        api: for the backlog.
        trimmer: used while this process runs partition 00.
        metrics: of this process.
    """

    def __init__(
        self,
        deployment: Deployment,
        *,
        members: Members,
        placements: Placements,
        make_runner: Callable[[Placement], PartitionRunner],
        api: JetStreamApi,
        trimmer: Trimmer,
        metrics: Metrics,
    ) -> None:
        self._deployment = deployment
        self._members = members
        self._placements = placements
        self._make_runner = make_runner
        self._api = api
        self._trimmer = trimmer
        self._metrics = metrics
        self._log = get_logger("coordinator")
        self._runners: dict[int, PartitionRunner] = {}
        self._run_as: dict[int, Placement] = {}  # what each runner was made for
        self._placed = Placed({}, {})
        self._shared: set[int] = set()  # partitions of the volume that were shared among its processes
        self._advance_at: dict[int, float] = {}
        self._place_at = 0.0
        self._trouble = "partitions have not been placed yet"
        self.on_change: Callable[[list[int]], None] = lambda _: None
        self.on_progress: Callable[[dict[int, int]], None] = lambda _: None

    @property
    def partitions(self) -> list[int]:
        """The partitions that this process runs, sorted."""
        return sorted(self._runners)

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            PermanentError: the volume cannot be used any more.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._share())
                group.create_task(self._look_after())
                group.create_task(self._observe_always())
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
                if time.monotonic() >= self._place_at:
                    await self._place()
                await self._step()
            except OSError as error:  # the data directory; what runs goes on, and shows its own troubles
                self._in_trouble("DATA_DIRECTORY_FAILED", f"the data directory cannot be used: {error.strerror}")
            await asyncio.sleep(STEP_SECONDS)

    async def _place(self) -> None:
        before = self._placed.refused
        try:
            self._placed = await place(self._deployment, self._placements)
        except TransientError as error:
            self._in_trouble("PLACEMENT_UNKNOWN", f"placement is not known: {error}")
            return
        except LogMismatchError as error:  # the followers say so, too; the process stays, so that readiness tells it
            self._in_trouble("PLACEMENT_REFUSED", str(error))
            return
        self._trouble = ""
        full = len(self._placed.here) >= self._deployment.quota
        self._place_at = time.monotonic() + (PLACED_SECONDS if full else PLACE_SECONDS)
        for partition, reason in self._placed.refused.items() - before.items():
            self._log.error("PARTITION_NOT_CLAIMED", partition=partition_name(partition), reason=reason)

    async def _step(self) -> None:
        alive = await asyncio.to_thread(self._members.alive)
        wanted = {p for p, owner in share(self._placed.here, alive).items() if owner == self._members.name}
        here = self._placed.here
        # one that was placed anew meanwhile begins anew, too: its file is no longer the right one, and says so
        given_up = [p for p in self._runners if p not in wanted or self._run_as[p] != here[p]]
        await self._release(given_up)
        new = sorted(wanted - self._runners.keys())
        for partition in new:
            self._run_as[partition] = here[partition]
            runner = self._runners[partition] = self._make_runner(here[partition])
            runner.start()
        self._shared = set(here)
        if new or given_up:
            self._log.info("PARTITIONS_SHARED", partitions=self.partitions, processes=len(alive))
            self.on_change(self.partitions)

    async def _release(self, partitions: list[int]) -> None:
        # a runner stays in the list until it has stopped: whoever is cancelled here leaves it to stop()
        await asyncio.gather(*(self._runners[partition].stop() for partition in partitions))
        for partition in partitions:
            del self._runners[partition]
            self._metrics.of(partition).remove()
            self._log.info("PARTITION_RELEASED", partition=partition_name(partition))

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
            await self._try(self._advance_idle())
            await self._measure()

    async def _observe_always(self) -> None:
        """Do what only the broker may keep waiting: numbers must not stand still when a disk does."""
        while True:
            await asyncio.sleep(OBSERVE_SECONDS)
            await self._try(self._observe())
            self.on_progress({p: at for p, runner in self._runners.items() if (at := runner.committed) is not None})
            await self._try(self._trim())

    async def _try(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (TransientError, PermanentError) as error:
            self._log.warning("OBSERVATION_FAILED", reason=str(error))

    async def _measure(self) -> None:
        volume = self._deployment.volume
        try:
            free, size = await asyncio.to_thread(volume.room)
        except OSError as error:
            self._log.warning("OBSERVATION_FAILED", reason=f"the data directory cannot be measured: {error.strerror}")
            return
        self._metrics.volume_free.labels(volume.uuid).set(free)
        self._metrics.volume_size.labels(volume.uuid).set(size)

    async def _observe(self) -> None:
        if not self._runners:
            return
        infos = {info["name"]: info for info in await self._api.list_consumers(STREAM)}
        for partition in self.partitions:
            info = infos.get(consumer_name(self._deployment.log.store, partition))
            if info is None:
                continue
            if placement_of(partition, info) != self._placed.here.get(partition):
                self._place_at = 0.0
            waiting, pending = info["num_pending"], info["num_ack_pending"]
            self._metrics.of(partition).queue(waiting + pending, pending)

    async def _advance_idle(self) -> None:
        """Move idle partitions up to the stream's end now and then, or trim would stop at their last events."""
        stream = await self._api.stream_info(STREAM)
        if stream is None:
            return
        hurry = stream["state"]["bytes"] > _HURRY_FULLNESS * stream["config"]["max_bytes"]
        now = time.monotonic()
        for partition, runner in list(self._runners.items()):
            committed = runner.idle_at
            if committed is None or committed >= stream["state"]["last_seq"]:
                continue
            if hurry or now >= self._advance_at.get(partition, 0.0):
                self._advance_at[partition] = now + ADVANCE_SECONDS
                reached = await empty_up_to(self._api, partition, committed)
                if reached > committed:
                    await runner.advance(reached)

    async def _trim(self) -> None:
        if 0 not in self._runners:
            return
        trimmed = await self._trimmer.trim()
        self._metrics.stream_fullness.set(trimmed.fullness)
        if trimmed.purged:
            self._metrics.trimmed.inc(trimmed.purged)
            self._log.info("STREAM_TRIMMED", purged=trimmed.purged, committed=trimmed.committed)
