"""The log on JetStream, put together as ingest and a persister use it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager

import nats.errors
import nats.micro

from services.core.command import product_version
from services.core.lifecycle import background_task, cancellable
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.budget import Budget
from services.log.jetstream.connection import Connection, check_max_payload, close
from services.log.jetstream.continuity import check_log
from services.log.jetstream.follower import JetStreamFollower
from services.log.jetstream.monitor import LogMonitor, monitoring
from services.log.jetstream.names import PERSISTER_SERVICE, Role, corpus_subject, dead_subject
from services.log.jetstream.placement import Placements
from services.log.jetstream.processes import show_progress
from services.log.jetstream.provision import reach, reach_log
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.questions import Answering
from services.log.jetstream.reading import JetStreamReader
from services.log.jetstream.trim import Trimmer, is_turn
from services.log.metrics import LogMetrics
from services.log.partitions import partition_name
from services.log.protocol import IngestLog, IngestRole, LogIdentity, PersisterRole, Position, Trimmed
from services.log.settings import LogSettings
from services.log.status import Progress

#: a dead letter may take this long, seconds
_DEAD_LETTER_DEADLINE = 5.0
_DEAD_LETTERS_IN_FLIGHT = 256
#: how old what a process says of its progress may be, seconds
ANNOUNCE_SECONDS = 0.5
#: a process that ends withdraws its announcement within this time, seconds
_WITHDRAW_SECONDS = 2.0


@asynccontextmanager
async def open_for_ingest(
    settings: LogSettings, role: IngestRole, *, metrics: LogMetrics, on_closed: Callable[[str], None]
) -> AsyncIterator[IngestLog]:
    """Open the log for ingest; see :func:`services.log.open_log`."""
    nc = await reach(settings, name=role.name, role=Role.INGEST, on_closed=on_closed)
    try:
        check_max_payload(nc, role.max_event_bytes)
        reader = JetStreamReader(nc, settings)
        publisher = Publisher(nc, deadline=role.deadline, max_in_flight=role.max_in_flight, known=reader.known)
        await publisher.start()
        try:
            async with monitoring(nc, settings, metrics, on_closed) as monitor:
                yield IngestLog(publisher, reader, monitor)
        finally:
            await publisher.close()
    finally:
        await close(nc)


@asynccontextmanager
async def open_for_persister(
    settings: LogSettings, role: PersisterRole, *, metrics: LogMetrics, on_closed: Callable[[str], None]
) -> AsyncIterator[JetStreamPersisterLog]:
    """Open the log for a persister; see :func:`services.log.open_log`."""
    nc, identity = await reach_log(settings, name=role.name, role=Role.PERSISTER, on_closed=on_closed)
    try:
        publisher = Publisher(nc, deadline=_DEAD_LETTER_DEADLINE, max_in_flight=_DEAD_LETTERS_IN_FLIGHT)
        await publisher.start()
        try:
            async with monitoring(nc, settings, metrics, on_closed) as monitor:
                yield JetStreamPersisterLog(nc, settings, role, identity, publisher, monitor)
        finally:
            await publisher.close()
    finally:
        await close(nc)


class DeadLetterStream:
    """Stores dead letters in ``fi-dead``; see :class:`services.log.protocol.DeadLetterStore`."""

    def __init__(self, nc: Connection, publisher: Publisher) -> None:
        self._nc = nc
        self._publisher = publisher

    @property
    def max_bytes(self) -> int:
        """How large a dead letter may be, headers included, bytes."""
        return self._nc.max_payload

    async def store(self, partition: int, body: bytes, headers: dict[str, str]) -> None:
        """Store a dead letter of *partition*."""
        await self._publisher.publish(dead_subject(partition), body, headers)


class JetStreamPersisterLog:
    """The log as a persister uses it; see :class:`services.log.protocol.PersisterLog`."""

    def __init__(
        self,
        nc: Connection,
        settings: LogSettings,
        role: PersisterRole,
        identity: LogIdentity,
        publisher: Publisher,
        monitor: LogMonitor,
    ) -> None:
        self.identity = identity
        self.placements = Placements(nc, settings)
        self.answering = Answering(nc, settings.store)
        self.dead_letters = DeadLetterStream(nc, publisher)
        self.status = monitor
        self._nc = nc
        self._store = settings.store
        self._retention = role.retention
        self._budget = Budget(role.buffer_events, role.buffer_bytes)

    def follower(
        self,
        partition: int,
        *,
        trimmable: int,
        on_events: Callable[[], None],
        on_repair: Callable[[str], None],
    ) -> JetStreamFollower:
        """Return a follower of *partition*, which shares the memory for events with the others."""
        return JetStreamFollower(
            self._nc,
            self._store,
            partition,
            self.identity,
            budget=self._budget,
            trimmable=trimmable,
            on_events=on_events,
            on_repair=on_repair,
        )

    async def check(self, after: Position, *, trimmable: int) -> None:
        """Check that the stream can be followed from *after*."""
        await check_log(JetStreamApi(self._nc), self.identity, after, trimmable=trimmable)

    @asynccontextmanager
    async def announced(
        self,
        about: Mapping[str, str],
        partitions: Callable[[], Collection[int]],
        progress: Callable[[], Mapping[int, Progress]],
    ) -> AsyncIterator[Callable[[], None]]:
        """Answer in the NATS service API (ADR-32), which ``nats micro ls`` shows, while the body runs."""
        questions = corpus_subject(self._store, 0, "*").replace(".0.", ".<partition>.")
        metadata = {**about, "questions": questions}

        def update() -> None:
            stream = self.status.state.stream
            metadata["partitions"] = ",".join(partition_name(p) for p in sorted(partitions()))
            metadata["progress"] = show_progress(progress())
            metadata["stream_sequence"] = "" if stream is None else str(stream.last_sequence)

        async def renew() -> None:
            while True:
                update()
                await asyncio.sleep(ANNOUNCE_SECONDS)

        update()
        service = await cancellable(
            nats.micro.add_service(
                self._nc,
                name=PERSISTER_SERVICE,
                version=product_version(),
                description="Writes partitions of fi-events into HDF5.",
                metadata=metadata,
            )
        )
        try:
            async with background_task(renew(), "announcement"):
                yield update
        finally:
            # the connection may be gone, and the service with it
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                async with asyncio.timeout(_WITHDRAW_SECONDS):
                    await cancellable(service.stop())

    async def trim(self, own: Callable[[], Collection[int]], on_round: Callable[[Trimmed], None]) -> None:
        """Delete from the stream what every store has committed, until cancelled; see :mod:`.trim`."""
        trimmer = Trimmer(self._nc, retention=self._retention, on_round=on_round)
        await trimmer.run(lambda: is_turn(self.status.state, self._store, own()))
