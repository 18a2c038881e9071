"""The log on JetStream, put together as ingest and a persister use it: how it is reached, and how it is trimmed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import nats.errors
import nats.micro

from fiq.errors import FiqError, TransientError
from fiq.event import message_id_at
from services.core.command import product_version
from services.core.lifecycle import background_task, cancellable
from services.core.logs import LogThrottle, get_logger
from services.core.retry import retry
from services.log.dead_letters import DeadLetter, read_letter
from services.log.errors import StartupError
from services.log.jetstream.api import JetStreamApi, StoredMessage
from services.log.jetstream.connection import Connection, Role, check_max_payload, close, connect
from services.log.jetstream.follower import Budget, JetStreamFollower, check_log
from services.log.jetstream.monitor import LogMonitor, monitoring, show_progress
from services.log.jetstream.placement import KEYS_SECONDS, BucketPlacements, read_stores
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.questions import NatsAnswering
from services.log.jetstream.reader import JetStreamFeed, JetStreamReader
from services.log.jetstream.stream import (
    DEAD_STREAM,
    DEADLINE_SECONDS,
    PARTITIONS_KEY,
    PERSISTER_SERVICE,
    STREAM,
    corpus_subject,
    dead_subject,
    filter_subject,
    placement_key,
    provision,
    stream_identity,
)
from services.log.metrics import LogMetrics
from services.log.partitions import partition_name
from services.log.protocol import IngestLog, IngestRole, LogIdentity, PersisterLog, PersisterRole, Position, Trimmed
from services.log.settings import LogSettings
from services.log.status import LogState, PartitionProgress, Placement, StorePlacement

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
        """Delete from the stream what every store has committed, until cancelled; see :class:`Trimmer`."""
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


# -- trimming ---------------------------------------------------------------------------------------------------------

#: above this share of ``max_bytes`` committed events go whatever their age, down to that one
FULL, ENOUGH = 0.7, 0.6
#: sequences that one purge takes off the stream's beginning: some 6 ms of the leader
SLICE = 2_000
#: sequences over which one purge by filter reaches: about 130 events of a partition of 16, some 5 ms of the leader
FILTER_SLICE = 2_000
#: sequences between two looks at the age of a slice's events
STEP = 125
#: pause after a purge, seconds
PAUSE_SECONDS = 0.05
#: pause between two rounds, seconds
TRIM_SECONDS = 2.0

_trim_log = get_logger("eventlog.trim")


@dataclass(frozen=True, slots=True)
class _Stream:
    """The stream before a purge, and how far each partition is committed by every store."""

    first: int
    messages: int
    last: int
    fullness: float
    now: float
    committed: Mapping[int, int]
    read_at: float

    @property
    def lowest(self) -> int:
        return min(self.committed.values(), default=0)


class Trimmer:
    """Deletes from the stream what every store has committed: the broker itself deletes nothing (DESIGN, section 5).

    What counts as committed is what the keys of all stores say (:mod:`~services.log.jetstream.placement`), read from
    the bucket's leader before each purge. A partition of a store without a key has committed nothing. Only a file that
    has less than its key says can lack an event that is gone; such a file is an old copy. A key whose message id the
    stream does not have there does not count: the stream was set back, and what clients posted since is in no file.

    An event goes when it is older than the retention, or when the stream is more than 70 % full: then the oldest go
    first until it is 60 % full. An event is old when it is old both by the clock of the stream's leader and by our own,
    and no event counts as older than one that was stored before it: so no clock that jumps deletes what is young.

    All purges are slices, with pauses between them: a purge stops publishing while the leader works on it. Measured on
    three nodes: 2,000 events by sequence 6 ms, by filter 40 µs an event. Slices by sequence go up to the lowest
    committed sequence of all partitions. A partition that is stopped or not running holds that back; in a full stream
    the committed events of the others then go by filter, partition by partition, so it holds back only its own.

    One process trims: the one that runs the lowest partition of those that are run. Several do no harm.

    Args:
        nc: a connected client.
        retention: seconds for which committed events stay readable while there is room.
        on_round: called with what each round of :meth:`run` did.
    """

    def __init__(
        self, nc: Connection, *, retention: float, on_round: Callable[[Trimmed], None] = lambda _: None
    ) -> None:
        self._nc = nc
        self._api = JetStreamApi(nc)
        self._retention = retention
        self._on_round = on_round
        self._latest = 0.0  # the latest time at which an event up to the stream's beginning was stored
        self._throttle = LogThrottle.of_repeated()
        self._compared: dict[tuple[str, int], tuple[int, str, int, bool]] = {}  # what was found of the keys

    async def run(self, is_turn: Callable[[], bool]) -> None:
        """Trim until cancelled, whenever it *is_turn* of this process; failures are logged and tried again."""
        while True:
            if is_turn():
                try:
                    trimmed = await self.trim()
                except Exception as error:  # noqa: BLE001 - whatever a message holds, it must not end the service
                    reason = str(error) if isinstance(error, FiqError) else type(error).__name__
                    allowed = self._throttle.allow(reason)
                    if allowed is not None:
                        _trim_log.warning("TRIM_FAILED", reason=reason, **allowed)
                else:
                    self._throttle.reset()
                    self._on_round(trimmed)
                    if trimmed.purged:
                        _trim_log.info("STREAM_TRIMMED", purged=trimmed.purged, committed=trimmed.committed)
            await asyncio.sleep(TRIM_SECONDS)

    async def trim(self) -> Trimmed:
        """Delete what may go, slice by slice.

        Raises LogMismatchError: there is no stream; LogUnavailableError: the broker did not answer; PlacementError: the
        placements of all stores are not known.
        """
        purged = 0
        full = False
        while True:
            stream = await self._look()
            full = stream.fullness > (ENOUGH if full else FULL)
            gone = await self._slice(stream, full) if stream.messages else 0
            purged += gone
            if not gone:
                return Trimmed(stream.lowest, purged, stream.fullness)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _look(self) -> _Stream:
        read_at = time.monotonic()
        stores = await read_stores(self._nc, every=True)
        info = await self._api.request(f"STREAM.INFO.{STREAM}")
        state, config = info["state"], info["config"]
        partitions = int((config.get("metadata") or {}).get(PARTITIONS_KEY, 0))
        now = min(time.time(), datetime.fromisoformat(info["ts"]).timestamp())
        wrong = await self._wrong(stores, state["first_seq"], state["last_seq"])
        committed = {p: committed_everywhere(stores, p, state["last_seq"], wrong) for p in range(partitions)}
        fullness = state["bytes"] / config["max_bytes"]
        return _Stream(state["first_seq"], state["messages"], state["last_seq"], fullness, now, committed, read_at)

    async def _wrong(self, stores: Mapping[str, StorePlacement], first: int, last: int) -> set[tuple[str, int]]:
        """Return store and partition of each key that means another event than the stream has there."""
        keys = [(name, one) for name, store in stores.items() for one in store.partitions.values()]
        keys = [(name, one) for name, one in keys if one.message_id and first <= one.committed <= last]
        right = await asyncio.gather(*(self._is_right(name, one) for name, one in keys))
        return {(name, one.partition) for (name, one), is_right in zip(keys, right, strict=True) if not is_right}

    async def _is_right(self, store: str, one: Placement) -> bool:
        marker = one.committed, one.message_id, self._nc.reconnects  # after one it may be another log
        known = self._compared.get((store, one.partition))
        if known == (*marker, True):
            return True
        found = await self._api.leader_message(STREAM, one.committed)
        if found is None:  # deleted around a partition that stands still
            return True
        is_right = message_id_at(found["headers"]) == one.message_id
        self._compared[store, one.partition] = *marker, is_right
        if not is_right and known != (*marker, False):
            _trim_log.error("KEY_OF_ANOTHER_LOG", key=placement_key(store, one.partition), committed=one.committed)
        return is_right

    async def _slice(self, stream: _Stream, full: bool) -> int:
        """Purge one slice and return how many messages that were."""
        end = min(stream.first + SLICE - 1, stream.lowest)
        if end >= stream.first:
            if not full:
                end = await self._last_old(stream.first, end, stream.now - self._retention)
            if end >= stream.first:
                return await self._purge(stream, end)
        return await self._around(stream) if full else 0

    async def _around(self, stream: _Stream) -> int:
        """Purge a slice of what lies after a partition that is held up, of the other partitions."""
        ahead = [p for p, committed in stream.committed.items() if committed > stream.lowest]
        found = await asyncio.gather(*(self._next(p, stream.lowest) for p in ahead))
        firsts = {p: first for p, first in zip(ahead, found, strict=True) if 0 < first <= stream.committed[p]}
        if not firsts:
            return 0
        end = min(firsts.values()) + FILTER_SLICE - 1
        purged = 0
        for partition, first in sorted(firsts.items(), key=lambda item: item[1]):
            if first <= end:
                purged += await self._purge(stream, min(end, stream.committed[partition]), partition)
                await asyncio.sleep(PAUSE_SECONDS)
                if time.monotonic() - stream.read_at > KEYS_SECONDS / 2:
                    break  # look again: the keys are about to be too old
        return purged

    async def _purge(self, stream: _Stream, end: int, partition: int | None = None) -> int:
        if time.monotonic() - stream.read_at > KEYS_SECONDS:
            return 0  # this process stood still: look again before anything is deleted
        only = None if partition is None else filter_subject(partition)
        return await self._api.purge(STREAM, end + 1, only=only)

    async def _last_old(self, first: int, end: int, before: float) -> int:
        """Return the last sequence from *first* to *end* up to which all is older than *before*: looks every 125th."""
        reached = first - 1
        for at in (*range(first, end, STEP), end):
            stored_at = await self._stored_at(at)
            if max(self._latest, stored_at) >= before:
                return await self._boundary(reached, at, before)
            reached, self._latest = at, max(self._latest, stored_at)
        return reached

    async def _boundary(self, low: int, high: int, before: float) -> int:
        """Return the last old sequence between *low*, which is old or before the first, and *high*, which is not."""
        while high - low > 1:
            middle = (low + high) // 2
            if max(self._latest, await self._stored_at(middle)) >= before:
                high = middle
            else:
                low = middle
        return low

    async def _stored_at(self, sequence: int) -> float:
        """Return when the message at *sequence* was stored; 0 when there is none."""
        message = await self._api.get_message(STREAM, sequence)
        return 0.0 if message is None else datetime.fromisoformat(message["time"]).timestamp()

    async def _next(self, partition: int, after: int) -> int:
        """Return the sequence of the partition's next message as the stream's leader has it; 0 when there is none."""
        message = await self._api.leader_message(STREAM, after + 1, next_of=filter_subject(partition))
        return 0 if message is None else message["seq"]


def committed_everywhere(
    stores: Mapping[str, StorePlacement], partition: int, last: int, wrong: Collection[tuple[str, int]] = ()
) -> int:
    """Return the sequence up to which every store has committed the events of *partition*; 0 when one has no key of it.

    Args:
        stores: the keys of all stores.
        partition: its number.
        last: sequence of the stream's youngest event. A key that is ahead of it belongs to a log that was set back:
            what the file holds is then not known.
        wrong: store and partition of keys that do not count either: what the stream has there is another event.
    """
    placed = [None if (name, partition) in wrong else store.partitions.get(partition) for name, store in stores.items()]
    if not placed or any(one is None or one.committed > last for one in placed):
        return 0
    return min(one.committed for one in placed if one is not None)


def is_turn(state: LogState, store: str, own: Collection[int]) -> bool:
    """Return whether the process that runs partitions *own* of *store* is the one that trims."""
    owned = [(partition, one.store) for one in state.processes or () for partition in one.partitions]
    return bool(own) and (min(own), store) <= min(owned, default=(min(own), store))
