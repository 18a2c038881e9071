"""One persister process, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import nats.errors
import nats.micro
from aiohttp import web
from nats.aio.client import Client

from services.contract.command import product_version
from services.contract.errors import BindError
from services.contract.lifecycle import Stop, cancellable, settle, unless_stopped
from services.contract.logs import get_logger
from services.contract.management import ReadinessCheck, add_management_routes, bind
from services.contract.telemetry import Spans
from services.corpus import StoreOptions
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.budget import Budget
from services.eventlog.jetstream.connection import close
from services.eventlog.jetstream.follower import JetStreamFollower
from services.eventlog.jetstream.names import PERSISTER_SERVICE, Role, consumer_name, corpus_subject
from services.eventlog.jetstream.placement import Placement, Placements
from services.eventlog.jetstream.processes import Progress, show_progress
from services.eventlog.jetstream.publisher import Publisher
from services.eventlog.jetstream.startup import reach_log
from services.eventlog.jetstream.trim import Trimmer
from services.eventlog.jetstream.watch import watching
from services.eventlog.partitions import partition_name
from services.eventlog.protocol import LogIdentity
from services.persister.answering import Desk
from services.persister.assignment import Deployment, open_store
from services.persister.coordinator import Coordinator
from services.persister.dead_letters import DeadLetters, PoisonLimit
from services.persister.members import Members
from services.persister.metrics import Metrics
from services.persister.reused import SHARE, Allowance
from services.persister.runner import Limits, PartitionRunner
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
#: the service's end may take this long to be announced, seconds
_FAREWELL_SECONDS = 2.0


async def serve(settings: PersisterSettings, stop: Stop, *, spans: Spans | None = None) -> None:
    """Persist until *stop* is requested; *spans* makes spans of the batches, if anybody wants them.

    Raises:
        FiqError: the process could not start, or its volume cannot be used any more.
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
                deployment = _deployment(settings, volume, identity)
                try:
                    settle()
                    log.info("PERSISTER_STARTED", port=port, volume=volume.uuid, directory=str(volume.directory))
                    async with watching(nc, settings.log, metrics.log):
                        await _persist(nc, settings, port, deployment, metrics, traces, readiness, stop)
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


async def _reached(settings: PersisterSettings, stop: Stop) -> tuple[Client, LogIdentity] | None:
    """Return a connection to the log and which one it is, or None when a stop was requested before that."""

    def lost(reason: str) -> None:
        stop.request(reason, failed=True)

    reaching = reach_log(settings.log, name="fi-persister", role=Role.PERSISTER, on_closed=lost)
    return await unless_stopped(reaching, stop)


async def _persist(
    nc: Client,
    settings: PersisterSettings,
    port: int,
    deployment: Deployment,
    metrics: Metrics,
    traces: Traces,
    readiness: Readiness,
    stop: Stop,
) -> None:
    publisher = Publisher(nc, deadline=_DEAD_LETTER_DEADLINE, max_in_flight=_DEAD_LETTERS_IN_FLIGHT)
    await publisher.start()
    with ThreadPoolExecutor(1, thread_name_prefix="hdf5") as hdf5:
        volume = deployment.volume
        members = Members(volume.workers, uuid.uuid4().hex)
        desk = Desk(nc, volume.store, hdf5, metrics)
        answering = asyncio.create_task(desk.run(), name="answering")
        coordinator = _coordinator(nc, settings, deployment, members, publisher, hdf5, metrics, traces, desk)
        members.join()
        readiness.coordinator = coordinator
        try:
            announced = _announced(nc, volume, members.name, f"{settings.host}:{port}", coordinator)
            await unless_stopped(_run(announced, coordinator), stop)
        finally:
            get_logger("persister").info("PERSISTER_STOPPING", reason=stop.reason)
            await coordinator.stop()
            answering.cancel()
            await asyncio.wait({answering})  # its last call in the HDF5 thread comes before that ends
            await publisher.close()


async def _run(announced: AbstractAsyncContextManager[None], coordinator: Coordinator) -> None:
    async with announced:
        await coordinator.run()


def _options(settings: PersisterSettings, sharing: int) -> StoreOptions:
    return StoreOptions(
        open_consultations=max(16, settings.open_consultations // sharing),
        known_ids=max(4096, settings.known_ids // sharing),
        metadata_cache_bytes=min(512 << 10, max(64 << 10, METADATA_CACHE_BYTES // sharing)),
        cached_pages=max(256, CACHED_PAGES // sharing),
    )


def _deployment(settings: PersisterSettings, volume: Volume, identity: LogIdentity) -> Deployment:
    return Deployment(volume, settings.volumes, settings.log, identity)


def _coordinator(
    nc: Client,
    settings: PersisterSettings,
    deployment: Deployment,
    members: Members,
    publisher: Publisher,
    hdf5: ThreadPoolExecutor,
    metrics: Metrics,
    traces: Traces,
    desk: Desk,
) -> Coordinator:
    identity = deployment.identity
    budget = Budget(settings.buffer_events, settings.buffer_bytes)

    def sharing() -> int:
        """Return among how many partitions the caches are divided; one that comes later gets a smaller part."""
        return max(1, len(coordinator.partitions))

    def make_runner(placement: Placement) -> PartitionRunner:
        partition = placement.partition

        def make_follower() -> JetStreamFollower:
            return JetStreamFollower(
                nc,
                consumer_name(settings.log.store, partition),
                partition,
                identity,
                budget=budget,
                on_repair=lambda reason: metrics.repairs.labels(reason).inc(),
            )

        return PartitionRunner(
            partition,
            open_store=lambda: open_store(deployment, placement, _options(settings, sharing())),
            follower=make_follower,
            dead_letters=DeadLetters(publisher, partition, identity, max_bytes=nc.max_payload),
            hdf5=hdf5,
            limits=Limits(settings.batch_events, settings.batch_bytes),
            metrics=metrics,
            traces=traces,
            poison_limit=PoisonLimit(streak=settings.poison_streak),
            allowance=Allowance(int(SHARE * settings.log.dead_max_bytes) // settings.log.partitions),
            desk=desk,
        )

    coordinator = Coordinator(
        deployment,
        members=members,
        placements=Placements(nc, settings.log),
        make_runner=make_runner,
        api=JetStreamApi(nc),
        trimmer=Trimmer(nc, partitions=settings.log.partitions, retention=settings.retention),
        metrics=metrics,
    )
    return coordinator


@asynccontextmanager
async def _announced(
    nc: Client, volume: Volume, worker: str, address: str, coordinator: Coordinator
) -> AsyncIterator[None]:
    """Be visible to `nats micro ls`, and tell there which partitions run here, and where `/readyz` is."""
    metadata = {
        "worker": worker,
        "volume": volume.uuid,
        "store": volume.store,
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "address": address,
        "partitions": "",
        "progress": "",
        "questions": corpus_subject(volume.store, 0, "*").replace(".0.", ".<partition>."),
    }

    def changed(partitions: list[int]) -> None:
        metadata["partitions"] = ",".join(partition_name(p) for p in partitions)

    def progressed(committed: dict[int, int]) -> None:
        metadata["progress"] = show_progress({p: Progress(at, 0) for p, at in committed.items()})

    coordinator.on_change = changed
    coordinator.on_progress = progressed
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
