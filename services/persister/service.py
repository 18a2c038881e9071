"""One persister process, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from aiohttp import web

from fiq.corpus import KnownIds, StoreOptions
from fiq.errors import BindError
from services.core.lifecycle import Stop, background_task, freeze_garbage, run_until_stopped
from services.core.logs import get_logger
from services.core.management import ReadinessCheck, add_management_routes, bind
from services.core.tracing import Spans
from services.log import open_log
from services.log.protocol import Follower, PersisterLog, PersisterRole, Position, Trimmed
from services.log.status import Placement
from services.persister.answering import Desk
from services.persister.assignment import Deployment, open_store
from services.persister.coordinator import Coordinator
from services.persister.dead_letters import DeadLetters, PoisonLimit
from services.persister.members import Members
from services.persister.metrics import Metrics
from services.persister.rounds import Hdf5Thread, Limits, Rounds
from services.persister.runner import PartitionRunner
from services.persister.settings import PersisterSettings
from services.persister.traces import Traces
from services.persister.volume import Volume

#: HDF5's metadata caches of all partition files together; in memory they take 20 times as much, bytes
METADATA_CACHE_BYTES = 2 << 20
#: pages of 4 KiB that all partition files of the process keep in memory together
CACHED_PAGES = 4096
#: seconds that an answer of /healthz, /readyz or /metrics gets to be written at the end
_FLUSH_SECONDS = 1.0


async def serve(settings: PersisterSettings, stop: Stop, *, spans: Spans | None = None) -> None:
    """Persist until *stop* is requested; *spans* makes spans of the batches, if anybody wants them.

    Raises FiqError: the process could not start, or its volume cannot be used any more.
    """
    log = get_logger("persister")
    # before the cluster is waited for: a taken port and an unfit directory are known at once
    with bind(settings.host, settings.port, "FI_PERSISTER_HOST, FI_PERSISTER_PORT") as sock:
        volume = await asyncio.to_thread(Volume.open, settings.data_dir, settings.log.store)
        metrics = Metrics()
        traces = Traces(spans)
        metrics.info.labels(volume.store, volume.uuid, socket.gethostname()).set(1)
        readiness = Readiness()
        async with _management(sock, metrics, readiness) as port:
            role = PersisterRole(
                name="fi-persister",
                volume=volume.uuid,
                directory=volume.directory,
                volumes=settings.volumes,
                retention=settings.retention,
                buffer_events=settings.buffer_events,
                buffer_bytes=settings.buffer_bytes,
            )
            opening = open_log(
                settings.log, role, metrics=metrics.log, on_closed=lambda reason: stop.request(reason, failed=True)
            )
            async with contextlib.AsyncExitStack() as stack:
                opened = await run_until_stopped(stack.enter_async_context(opening), stop)
                if opened is not None:
                    freeze_garbage()
                    log.info("PERSISTER_STARTED", port=port, volume=volume.uuid, directory=str(volume.directory))
                    deployment = Deployment(volume, settings.volumes, settings.log, opened.identity)
                    await _persist(opened, settings, port, deployment, metrics, traces, readiness, stop)
    log.info("PERSISTER_STOPPED", reason=stop.reason)


class Readiness:
    """Why this process is not ready; asked before there is a coordinator, too."""

    def __init__(self) -> None:
        self.coordinator: Coordinator | None = None

    async def __call__(self) -> list[str]:
        """Return the reasons; none means ready."""
        if self.coordinator is None:
            return ["the cluster has not been reached yet"]
        return self.coordinator.problems()


async def _persist(
    log: PersisterLog,
    settings: PersisterSettings,
    port: int,
    deployment: Deployment,
    metrics: Metrics,
    traces: Traces,
    readiness: Readiness,
    stop: Stop,
) -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="hdf5") as hdf5:
        volume = deployment.volume
        members = Members(volume.workers, uuid.uuid4().hex)
        desk = Desk(log.answering, hdf5, metrics)
        limits = Limits(settings.batch_events, settings.batch_bytes)
        rounds = Rounds(Hdf5Thread(hdf5), limits, metrics, traces)
        coordinator = _coordinator(log, settings, deployment, members, rounds, metrics, desk)
        members.join()
        readiness.coordinator = coordinator
        about = {
            "worker": members.name,
            "volume": volume.uuid,
            "store": volume.store,
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "address": f"{settings.host}:{port}",
        }
        async with background_task(desk.run(), "answering"):  # its last call in the HDF5 thread is before that ends
            try:
                announced = log.announced(about, lambda: coordinator.partitions, coordinator.progress)
                trimming = _trimming(log, coordinator, metrics)
                await run_until_stopped(_run(announced, trimming, rounds, coordinator), stop)
            finally:
                get_logger("persister").info("PERSISTER_STOPPING", reason=stop.reason)
                await coordinator.stop()


async def _run(
    announced: AbstractAsyncContextManager[Callable[[], None]],
    trimming: Coroutine[Any, Any, None],
    rounds: Rounds,
    coordinator: Coordinator,
) -> None:
    async with background_task(trimming, "trim"), announced as changed:
        coordinator.on_change = lambda _: changed()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(rounds.run(), name="rounds")
                group.create_task(coordinator.run(), name="coordinator")
        except ExceptionGroup as failed:  # one of them cannot go on: the process ends, and says why
            raise failed.exceptions[0] from None


async def _trimming(log: PersisterLog, coordinator: Coordinator, metrics: Metrics) -> None:
    def done(trimmed: Trimmed) -> None:
        metrics.stream_fullness.set(trimmed.fullness)
        metrics.trimmed.inc(trimmed.purged)

    await log.trim(lambda: coordinator.partitions, done)


def _options(settings: PersisterSettings, sharing: int, ids: KnownIds) -> StoreOptions:
    return StoreOptions(
        open_consultations=max(16, settings.open_consultations // sharing),
        ids=ids,
        metadata_cache_bytes=min(512 << 10, max(64 << 10, METADATA_CACHE_BYTES // sharing)),
        cached_pages=max(256, CACHED_PAGES // sharing),
    )


def _coordinator(
    log: PersisterLog,
    settings: PersisterSettings,
    deployment: Deployment,
    members: Members,
    rounds: Rounds,
    metrics: Metrics,
    desk: Desk,
) -> Coordinator:
    ids = KnownIds(settings.known_ids)

    def sharing() -> int:
        """Return among how many partitions the caches are divided; one that comes later gets a smaller part."""
        return max(1, len(coordinator.partitions))

    def make_runner(placement: Placement) -> PartitionRunner:
        partition = placement.partition

        def make_follower(on_events: Callable[[], None]) -> Follower:
            return log.follower(
                partition,
                trimmable=placement.committed,
                on_events=on_events,
                on_repair=lambda reason: metrics.repairs.labels(reason).inc(),
            )

        async def settle(at: Position) -> None:
            """Let trim keep what an older file lacks: what is gone meanwhile, the follower finds out."""
            if at.sequence < placement.committed:
                await log.check(at, trimmable=placement.committed)
                await coordinator.lower(partition, at)

        return PartitionRunner(
            partition,
            open_store=lambda: open_store(deployment, placement, _options(settings, sharing(), ids)),
            follower=make_follower,
            dead_letters=DeadLetters(log.dead_letters, partition, deployment.identity),
            rounds=rounds,
            metrics=metrics,
            poison_limit=PoisonLimit(streak=settings.poison_streak),
            desk=desk,
            settle=settle,
        )

    coordinator = Coordinator(
        deployment,
        members=members,
        placements=log.placements,
        make_runner=make_runner,
        metrics=metrics,
    )
    return coordinator


@asynccontextmanager
async def _management(sock: socket.socket, metrics: Metrics, ready: ReadinessCheck) -> AsyncIterator[int]:
    app = web.Application()
    add_management_routes(app, metrics.registry, ready)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_FLUSH_SECONDS)
    await runner.setup()
    port: int = sock.getsockname()[1]
    try:
        try:
            await web.SockSite(runner, sock).start()
        except OSError as error:  # another process bound the port, too, and was the first to listen
            raise BindError(f"cannot listen on port {port} (FI_PERSISTER_PORT): {error.strerror or error}") from error
        yield port
    finally:
        await runner.cleanup()
