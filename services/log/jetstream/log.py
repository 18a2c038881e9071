"""The log on JetStream, put together as ingest and a persister use it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import nats.errors
import nats.micro

from fiq.errors import TransientError
from services.core.command import product_version
from services.core.lifecycle import background_task, cancellable
from services.core.logs import get_logger
from services.core.retry import retry
from services.log.dead_letters import DeadLetter, read_letter
from services.log.errors import StartupError
from services.log.jetstream.api import JetStreamApi, StoredMessage
from services.log.jetstream.connection import Connection, Role, check_max_payload, close, connect
from services.log.jetstream.follower import Budget, JetStreamFollower, check_log
from services.log.jetstream.monitor import LogMonitor, monitoring, show_progress
from services.log.jetstream.placement import BucketPlacements
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.questions import NatsAnswering
from services.log.jetstream.reader import JetStreamFeed, JetStreamReader
from services.log.jetstream.stream import (
    DEAD_STREAM,
    DEADLINE_SECONDS,
    PERSISTER_SERVICE,
    corpus_subject,
    dead_subject,
    provision,
    stream_identity,
)
from services.log.jetstream.trim import Trimmer, is_turn
from services.log.metrics import LogMetrics
from services.log.partitions import partition_name
from services.log.protocol import IngestLog, IngestRole, LogIdentity, PersisterLog, PersisterRole, Position, Trimmed
from services.log.settings import LogSettings
from services.log.status import PartitionProgress

#: one try to reach the cluster, seconds; each that fails is logged
_TRY_SECONDS = 5.0
#: pause between two tries, and the least that a try gets, seconds
_STARTUP_RETRY_SECONDS = 0.5
#: a dead letter may take this long, seconds
_DEAD_LETTER_DEADLINE = 5.0
_DEAD_LETTERS_IN_FLIGHT = 256
#: bodies that are read for a page of dead letters, about, bytes
_DEAD_LETTER_PAGE_BYTES = 4 << 20
#: how old what a process says of its progress may be, seconds
ANNOUNCE_SECONDS = 0.5
#: a process that ends withdraws its announcement within this time, seconds
_WITHDRAW_SECONDS = 2.0

T = TypeVar("T")

_log = get_logger("startup")


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
                yield IngestLog(publisher, reader, monitor, DeadLetterReading(nc), JetStreamFeed(nc))
        finally:
            await publisher.close()
    finally:
        await close(nc)


@asynccontextmanager
async def open_for_persister(
    settings: LogSettings, role: PersisterRole, *, metrics: LogMetrics, on_closed: Callable[[str], None]
) -> AsyncIterator[PersisterLog]:
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
        return self._nc.max_payload

    async def store(self, partition: int, body: bytes, headers: dict[str, str]) -> None:
        await self._publisher.publish(dead_subject(partition), body, headers)


class DeadLetterReading:
    """Reads ``fi-dead`` from its leader, message by message; see :class:`services.log.protocol.DeadLetterBox`.

    A replica would do for a list, but shows a letter that was just removed.
    """

    def __init__(self, nc: Connection) -> None:
        self._api = JetStreamApi(nc, timeout=_DEAD_LETTER_DEADLINE)

    async def page(self, after: int, limit: int) -> tuple[list[DeadLetter], bool]:
        found: list[DeadLetter] = []
        size = 0
        while True:
            message = await self._api.leader_message(DEAD_STREAM, after + 1, next_of=">")
            if message is None:
                return found, False
            if len(found) == limit or size > _DEAD_LETTER_PAGE_BYTES:
                return found, True
            letter = _letter(message)
            size += letter.size
            found.append(dataclasses.replace(letter, body=b"", event=None))
            after = letter.sequence

    async def get(self, sequence: int) -> DeadLetter | None:
        message = await self._api.leader_message(DEAD_STREAM, sequence)
        return None if message is None else _letter(message)

    async def remove(self, sequence: int) -> bool:
        return await self._api.delete_message(DEAD_STREAM, sequence)


def _letter(message: StoredMessage) -> DeadLetter:
    return read_letter(message["seq"], message["time"], message["subject"], message["headers"], message["data"])


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
        self.placements = BucketPlacements(nc, settings)
        self.answering = NatsAnswering(nc, settings.store)
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
        await check_log(JetStreamApi(self._nc), self.identity, after, trimmable=trimmable)

    @asynccontextmanager
    async def announced(
        self,
        about: Mapping[str, str],
        partitions: Callable[[], Collection[int]],
        progress: Callable[[], Mapping[int, PartitionProgress]],
    ) -> AsyncIterator[Callable[[], None]]:
        """Answer in the NATS service API (ADR-32), which ``nats micro ls`` shows, while the body runs."""
        questions = corpus_subject(self._store, 0, "*").replace(".0.", ".<partition>.")
        metadata = {"questions": questions}

        def update() -> None:
            stream = self.status.state.stream
            metadata.update(about)
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


# -- reaching the cluster ---------------------------------------------------------------------------------------------


async def reach(settings: LogSettings, *, name: str, role: Role, on_closed: Callable[[str], None]) -> Connection:
    """Connect, and provision where the settings say so; try again until FI_STARTUP_TIMEOUT while only time can help.

    Raises Exception: as :func:`services.log.open_log`.
    """
    step = (lambda nc, left: provision(nc, settings, deadline=left)) if settings.provision else _nothing
    return (await _reach(settings, name, role, on_closed, step))[0]


async def reach_log(
    settings: LogSettings, *, name: str, role: Role, on_closed: Callable[[str], None]
) -> tuple[Connection, LogIdentity]:
    """Do as :func:`reach`, and return which log it is, too; without provisioning the stream must exist already."""
    step = provision if settings.provision else stream_identity
    return await _reach(settings, name, role, on_closed, lambda nc, left: step(nc, settings, deadline=left))


async def _nothing(nc: Connection, left: float) -> None:
    """Leave the streams to others."""


async def _reach(
    settings: LogSettings,
    name: str,
    role: Role,
    on_closed: Callable[[str], None],
    step: Callable[[Connection, float], Awaitable[T]],
) -> tuple[Connection, T]:
    """Connect and take *step*, which gets the seconds that are left for it; try again while only time can help."""
    loop = asyncio.get_running_loop()
    end = loop.time() + settings.startup_timeout

    def within(limit: float) -> float:
        return min(limit, max(_STARTUP_RETRY_SECONDS, end - loop.time()))

    async def attempt() -> tuple[Connection, T]:
        nc = await connect(settings, name=name, role=role, on_closed=on_closed, deadline=within(_TRY_SECONDS))
        try:
            return nc, await step(nc, within(DEADLINE_SECONDS))
        except BaseException:
            await close(nc)
            raise

    def failed(error: Exception) -> None:
        left = end - loop.time()
        if left <= 0:
            waited = f"gave up after {settings.startup_timeout:g} s (FI_STARTUP_TIMEOUT)"
            raise StartupError(f"{waited}: {error}") from error
        _log.warning("LOG_AWAITED", reason=str(error), seconds_left=round(left, 1))

    return await retry(attempt, on=TransientError, pause=_STARTUP_RETRY_SECONDS, failed=failed)
