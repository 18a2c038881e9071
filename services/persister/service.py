"""One persister process: it opens its volume, reaches the log, and runs its partitions until it is stopped.

::

    log ── follower ──┐                       ┌── partition file
                      ├── rounds ── HDF5 thread
    coordinator ── partition runners ─────────┘── answers to questions

The coordinator (:mod:`services.persister.coordinator`) decides which partitions run here. One thread makes all calls
of HDF5, but for the commits of a round (:mod:`services.persister.rounds`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections import ChainMap
from collections.abc import Callable
from contextlib import AsyncExitStack

from fiq.corpus import KnownIds, StoreOptions
from services.core.command import product_version
from services.core.lifecycle import Stop, background_task, freeze_garbage, run_until_stopped
from services.core.logs import get_logger
from services.core.management import bind, serve_management
from services.core.tracing import Spans
from services.core.watchdog import Watchdog
from services.log import PersisterLog, PersisterRole, open_log
from services.log.protocol import Follower, Position, Trimmed
from services.log.status import Placement
from services.persister.answering import QuestionResponder
from services.persister.coordinator import Coordinator
from services.persister.dead_letters import DeadLetters, PoisonLimit
from services.persister.metrics import PersisterMetrics
from services.persister.partition import PartitionRunner
from services.persister.placement import VolumeContext, Workers, open_store
from services.persister.rounds import Hdf5Thread, Rounds
from services.persister.settings import PersisterSettings
from services.persister.volume import Volume, check_durable

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
        async with background_task(self._responder.run(), "answering"):
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
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._rounds.run(), name="rounds")
                    group.create_task(coordinator.run(), name="coordinator")
            except ExceptionGroup as failed:  # one of them cannot go on: the process ends and reports why
                raise failed.exceptions[0] from None

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
