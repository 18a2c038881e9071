"""One persister process: it opens its volume, reaches the log, and keeps the right partitions running until it ends.

::

    log ── follower ──┐                       ┌── partition file
                      ├── rounds ── HDF5 thread
    coordinator ── partition runners ─────────┘── answers to questions

One thread makes all calls of HDF5, but for the commits of a round (:mod:`services.persister.rounds`). Three loops of
the :class:`Coordinator` run at the same time:

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
import os
import socket
import time
import uuid
from collections import ChainMap
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import datetime

from fiq.corpus import KnownIds, StoreOptions
from fiq.errors import PermanentError, TransientError
from services.core.command import product_version
from services.core.lifecycle import Stop, background_task, freeze_garbage, run_until_stopped
from services.core.logs import get_logger
from services.core.management import bind, serve_management
from services.core.tracing import Spans
from services.core.watchdog import Watchdog
from services.log import PersisterLog, PersisterRole, open_log
from services.log.errors import LogMismatchError, LogUnavailableError, PlacementError
from services.log.partitions import partition_name
from services.log.protocol import Follower, Placements, Position, Trimmed
from services.log.status import PartitionProgress, Placement
from services.persister.answering import QuestionResponder
from services.persister.dead_letters import DeadLetters, PoisonLimit
from services.persister.errors import VolumeError
from services.persister.metrics import PersisterMetrics
from services.persister.partition import PartitionRunner, RunnerState
from services.persister.rounds import Hdf5Thread, Rounds
from services.persister.settings import PersisterSettings
from services.persister.volume import (
    Assignment,
    Volume,
    VolumeContext,
    Workers,
    backed_up_at,
    check_durable,
    claim_partitions,
    open_store,
    owners,
    verified,
)

#: HDF5's metadata caches of all partition files together; in memory they take 20 times as much, bytes
METADATA_CACHE_BYTES = 2 << 20
#: pages of 4 KiB that all partition files of the process keep in memory together
CACHED_PAGES = 4096

_ADDRESS = "FI_PERSISTER_HOST, FI_PERSISTER_PORT"


async def serve(settings: PersisterSettings, stop: Stop, *, spans: Spans | None = None) -> None:
    """Persist until *stop* is requested; *spans* makes spans of the batches.

    Raises FiqError: the process could not start, or its volume cannot be used any more.
    """
    logger = get_logger("persister")
    # a taken port and an unfit directory are reported before the log is waited for
    sock = bind(settings.host, settings.port, _ADDRESS)
    async with AsyncExitStack() as stack:
        stack.callback(sock.close)
        watchdog = stack.enter_context(Watchdog(settings.watchdog))
        if not settings.allow_ephemeral:
            await asyncio.to_thread(check_durable, settings.data_dir)
        volume = await asyncio.to_thread(Volume.open, settings.data_dir, settings.log.store)
        metrics = PersisterMetrics()
        metrics.info.labels(volume.store, volume.uuid, socket.gethostname()).set(1)
        readiness = Readiness()
        await stack.enter_async_context(serve_management(sock, metrics.registry, readiness, _ADDRESS))
        port = sock.getsockname()[1]
        role = PersisterRole(
            name="fi-persister",
            volume=volume.uuid,
            directory=volume.directory,
            volumes=settings.volumes,
            retention=settings.retention,
            buffer_events=settings.buffer_events,
            buffer_bytes=settings.buffer_bytes,
        )
        log = open_log(
            settings.log, role, metrics=metrics.log, on_closed=lambda reason: stop.request(reason, failed=True)
        )
        reached = await run_until_stopped(stack.enter_async_context(log), stop)
        if reached is not None:
            freeze_garbage()
            logger.info("PERSISTER_STARTED", port=port, volume=volume.uuid, directory=str(volume.directory))
            with watchdog.threads(1, "hdf5") as executor:
                process = _Process(settings, volume, reached, Hdf5Thread(executor), metrics, spans)
                readiness.coordinator = process.coordinator
                await process.run(f"{settings.host}:{port}", stop)
    logger.info("PERSISTER_STOPPED", reason=stop.reason)


class Readiness:
    """Reports why this process is not ready.

    Attributes:
        coordinator: of the process; None before the log has been reached.
    """

    def __init__(self) -> None:
        self.coordinator: Coordinator | None = None

    async def __call__(self) -> list[str]:
        """Return the reasons; empty when it is ready."""
        if self.coordinator is None:
            return ["the cluster has not been reached yet"]
        return self.coordinator.problems()


class _Process:
    """The parts of a persister that has reached its log."""

    def __init__(
        self,
        settings: PersisterSettings,
        volume: Volume,
        log: PersisterLog,
        hdf5: Hdf5Thread,
        metrics: PersisterMetrics,
        spans: Spans | None,
    ) -> None:
        self._settings = settings
        self._volume = volume
        self._log = log
        self._metrics = metrics
        self._known_ids = KnownIds(settings.known_ids)
        self._context = VolumeContext(volume, settings.volumes, settings.log, log.identity)
        self._workers = Workers(volume.workers, uuid.uuid4().hex)
        self._responder = QuestionResponder(log.answering, hdf5, metrics)
        self._rounds = Rounds(
            hdf5, metrics, max_events=settings.batch_events, max_bytes=settings.batch_bytes, spans=spans
        )
        self.coordinator = Coordinator(
            self._context,
            workers=self._workers,
            placements=log.placements,
            make_runner=self._make_runner,
            metrics=metrics,
            reserve=settings.disk_reserve,
            hold=self._rounds.hold,
        )

    async def run(self, address: str, stop: Stop) -> None:
        """Persist until *stop* is requested, then release all partitions; *address* is that of the endpoints."""
        self._workers.join()
        answering = background_task(self._responder.run(), "answering")
        async with answering, background_task(self._rounds.run(), "rounds"):
            try:
                await run_until_stopped(self._run(address), stop)
            finally:
                get_logger("persister").info("PERSISTER_STOPPING", reason=stop.reason)
                await self.coordinator.stop()

    async def _run(self, address: str) -> None:
        about = {
            "worker": self._workers.name,
            "volume": self._volume.uuid,
            "store": self._volume.store,
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "address": address,
            "version": product_version(),
        }
        coordinator = self.coordinator
        trimming = self._log.trim(lambda: coordinator.partitions, self._trimmed)
        announced = self._log.announced(
            ChainMap(coordinator.facts, about), lambda: coordinator.partitions, coordinator.progress
        )
        async with background_task(trimming, "trim"), announced as update:
            coordinator.on_change = update
            await coordinator.run()

    def _trimmed(self, trimmed: Trimmed) -> None:
        self._metrics.stream_fullness.set(trimmed.fullness)
        self._metrics.trimmed.inc(trimmed.purged)

    def _make_runner(self, placement: Placement) -> PartitionRunner:
        partition = placement.partition

        def make_follower(on_events: Callable[[], None]) -> Follower:
            return self._log.follower(
                partition,
                trimmable=placement.committed,
                on_events=on_events,
                on_repair=lambda reason: self._metrics.repairs.labels(reason).inc(),
            )

        async def check_log(at: Position) -> None:
            """Make trim keep what an older file lacks; if it is gone already, the follower reports that."""
            if at.sequence < placement.committed:
                await self._log.check(at, trimmable=placement.committed)
                await self.coordinator.lower(partition, at)

        return PartitionRunner(
            partition,
            open_store=lambda: open_store(self._context, placement, self._options()),
            follower=make_follower,
            dead_letters=DeadLetters(self._log.dead_letters, partition, self._log.identity),
            rounds=self._rounds,
            metrics=self._metrics,
            poison_limit=PoisonLimit(streak=self._settings.poison_streak),
            responder=self._responder,
            check_log=check_log,
        )

    def _options(self) -> StoreOptions:
        """Return the options of the next file: the caches are divided among the partitions, late ones get less."""
        partitions = max(1, len(self.coordinator.partitions))
        return StoreOptions(
            open_consultations=max(16, self._settings.open_consultations // partitions),
            ids=self._known_ids,
            metadata_cache_bytes=min(512 << 10, max(64 << 10, METADATA_CACHE_BYTES // partitions)),
            cached_pages=max(256, CACHED_PAGES // partitions),
        )


# -- the coordinator --------------------------------------------------------------------------------------------------

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
