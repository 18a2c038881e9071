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

import nats.errors
import nats.micro
from aiohttp import web

from fiq.corpus import KnownIds, StoreOptions
from fiq.errors import BindError
from services.core.command import product_version
from services.core.lifecycle import Stop, background_task, cancellable, freeze_garbage, run_until_stopped
from services.core.logs import get_logger
from services.core.management import ReadinessCheck, add_management_routes, bind
from services.core.tracing import Spans
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.budget import Budget
from services.log.jetstream.connection import Connection, close
from services.log.jetstream.continuity import check_log
from services.log.jetstream.follower import JetStreamFollower
from services.log.jetstream.monitor import LogMonitor, monitoring
from services.log.jetstream.names import PERSISTER_SERVICE, Role, corpus_subject
from services.log.jetstream.placement import Placement, Placements
from services.log.jetstream.processes import show_progress
from services.log.jetstream.provision import reach_log
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.trim import Trimmed, Trimmer, is_turn
from services.log.partitions import partition_name
from services.log.protocol import LogIdentity, Position
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
#: a dead letter may take this long, seconds
_DEAD_LETTER_DEADLINE = 5.0
_DEAD_LETTERS_IN_FLIGHT = 256
#: seconds that an answer of /healthz, /readyz or /metrics gets to be written at the end
_FLUSH_SECONDS = 1.0
#: how old what this process says of its progress may be, seconds
TELL_SECONDS = 0.5
#: the service's end may take this long to be announced, seconds
_FAREWELL_SECONDS = 2.0


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
            reached = await _reached(settings, stop)
            if reached is not None:
                nc, identity = reached
                deployment = Deployment(volume, settings.volumes, settings.log, identity)
                try:
                    freeze_garbage()
                    log.info("PERSISTER_STARTED", port=port, volume=volume.uuid, directory=str(volume.directory))
                    async with monitoring(nc, settings.log, metrics.log) as monitor:
                        await _persist(nc, settings, port, deployment, metrics, traces, readiness, monitor, stop)
                finally:
                    await close(nc)
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


async def _reached(settings: PersisterSettings, stop: Stop) -> tuple[Connection, LogIdentity] | None:
    """Return a connection to the log and which one it is, or None when a stop was requested before that."""

    def lost(reason: str) -> None:
        stop.request(reason, failed=True)

    reaching = reach_log(settings.log, name="fi-persister", role=Role.PERSISTER, on_closed=lost)
    return await run_until_stopped(reaching, stop)


async def _persist(
    nc: Connection,
    settings: PersisterSettings,
    port: int,
    deployment: Deployment,
    metrics: Metrics,
    traces: Traces,
    readiness: Readiness,
    monitor: LogMonitor,
    stop: Stop,
) -> None:
    publisher = Publisher(nc, deadline=_DEAD_LETTER_DEADLINE, max_in_flight=_DEAD_LETTERS_IN_FLIGHT)
    await publisher.start()
    with ThreadPoolExecutor(1, thread_name_prefix="hdf5") as hdf5:
        volume = deployment.volume
        members = Members(volume.workers, uuid.uuid4().hex)
        desk = Desk(nc, volume.store, hdf5, metrics)
        limits = Limits(settings.batch_events, settings.batch_bytes)
        rounds = Rounds(Hdf5Thread(hdf5), limits, metrics, traces)
        coordinator = _coordinator(nc, settings, deployment, members, publisher, rounds, metrics, desk)
        members.join()
        readiness.coordinator = coordinator
        try:
            async with background_task(
                desk.run(), "answering"
            ):  # its last call in the HDF5 thread comes before that ends
                try:
                    announced = _announced(nc, volume, members.name, f"{settings.host}:{port}", coordinator, monitor)
                    trimming = _trimming(nc, volume.store, settings.retention, coordinator, monitor, metrics)
                    await run_until_stopped(_run(announced, trimming, rounds, coordinator), stop)
                finally:
                    get_logger("persister").info("PERSISTER_STOPPING", reason=stop.reason)
                    await coordinator.stop()
        finally:
            await publisher.close()


async def _run(
    announced: AbstractAsyncContextManager[None],
    trimming: Coroutine[Any, Any, None],
    rounds: Rounds,
    coordinator: Coordinator,
) -> None:
    async with background_task(trimming, "trim"), announced:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(rounds.run(), name="rounds")
                group.create_task(coordinator.run(), name="coordinator")
        except ExceptionGroup as failed:  # one of them cannot go on: the process ends, and says why
            raise failed.exceptions[0] from None


async def _trimming(
    nc: Connection, store: str, retention: float, coordinator: Coordinator, monitor: LogMonitor, metrics: Metrics
) -> None:
    def done(trimmed: Trimmed) -> None:
        metrics.stream_fullness.set(trimmed.fullness)
        metrics.trimmed.inc(trimmed.purged)

    trimmer = Trimmer(nc, retention=retention, on_round=done)
    await trimmer.run(lambda: is_turn(monitor.state, store, coordinator.partitions))


def _options(settings: PersisterSettings, sharing: int, ids: KnownIds) -> StoreOptions:
    return StoreOptions(
        open_consultations=max(16, settings.open_consultations // sharing),
        ids=ids,
        metadata_cache_bytes=min(512 << 10, max(64 << 10, METADATA_CACHE_BYTES // sharing)),
        cached_pages=max(256, CACHED_PAGES // sharing),
    )


def _coordinator(
    nc: Connection,
    settings: PersisterSettings,
    deployment: Deployment,
    members: Members,
    publisher: Publisher,
    rounds: Rounds,
    metrics: Metrics,
    desk: Desk,
) -> Coordinator:
    identity = deployment.identity
    budget = Budget(settings.buffer_events, settings.buffer_bytes)
    ids = KnownIds(settings.known_ids)

    def sharing() -> int:
        """Return among how many partitions the caches are divided; one that comes later gets a smaller part."""
        return max(1, len(coordinator.partitions))

    def make_runner(placement: Placement) -> PartitionRunner:
        partition = placement.partition

        def make_follower(on_events: Callable[[], None]) -> JetStreamFollower:
            return JetStreamFollower(
                nc,
                settings.log.store,
                partition,
                identity,
                budget=budget,
                trimmable=placement.committed,
                on_events=on_events,
                on_repair=lambda reason: metrics.repairs.labels(reason).inc(),
            )

        async def settle(at: Position) -> None:
            """Let trim keep what an older file lacks: what is gone meanwhile, the follower finds out."""
            if at.sequence < placement.committed:
                await check_log(JetStreamApi(nc), identity, at, trimmable=placement.committed)
                await coordinator.lower(partition, at)

        return PartitionRunner(
            partition,
            open_store=lambda: open_store(deployment, placement, _options(settings, sharing(), ids)),
            follower=make_follower,
            dead_letters=DeadLetters(publisher, partition, identity, max_bytes=nc.max_payload),
            rounds=rounds,
            metrics=metrics,
            poison_limit=PoisonLimit(streak=settings.poison_streak),
            desk=desk,
            settle=settle,
        )

    coordinator = Coordinator(
        deployment,
        members=members,
        placements=Placements(nc, settings.log),
        make_runner=make_runner,
        metrics=metrics,
    )
    return coordinator


@asynccontextmanager
async def _announced(
    nc: Connection, volume: Volume, worker: str, address: str, coordinator: Coordinator, monitor: LogMonitor
) -> AsyncIterator[None]:
    """Be visible to `nats micro ls`: which partitions run here, how far they are, and where `/readyz` is."""
    metadata = {
        "worker": worker,
        "volume": volume.uuid,
        "store": volume.store,
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "address": address,
        "partitions": "",
        "progress": "",
        "stream_sequence": "",
        "questions": corpus_subject(volume.store, 0, "*").replace(".0.", ".<partition>."),
    }

    def changed(partitions: list[int]) -> None:
        metadata["partitions"] = ",".join(partition_name(p) for p in partitions)

    async def tell() -> None:
        while True:
            stream = monitor.state.stream
            metadata["progress"] = show_progress(coordinator.progress())
            metadata["stream_sequence"] = "" if stream is None else str(stream.last_sequence)
            await asyncio.sleep(TELL_SECONDS)

    coordinator.on_change = changed
    service = await cancellable(
        nats.micro.add_service(
            nc,
            name=PERSISTER_SERVICE,
            version=product_version(),
            description="Writes partitions of fi-events into HDF5.",
            metadata=metadata,
        )
    )
    try:
        async with background_task(tell(), "progress"):
            yield
    finally:
        # the connection may be gone, and the service with it
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await cancellable(service.stop())


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
