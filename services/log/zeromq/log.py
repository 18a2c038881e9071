"""The log without a broker, put together as ingest and a persister use it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import zmq

from fiq.errors import ConfigurationError
from services.core.lifecycle import supervised_task
from services.log.dead_letters import DeadLetter
from services.log.errors import PlacementError
from services.log.metrics import LogMetrics
from services.log.partitions import partition_name
from services.log.protocol import (
    EVENT_LOG,
    AskedQuestion,
    IngestLog,
    IngestRole,
    LogIdentity,
    PersisterLog,
    PersisterRole,
    Position,
    Trimmed,
)
from services.log.settings import FORMED_FILE, LogSettings, formed_partitions
from services.log.status import (
    Backlog,
    LiveProcess,
    LogState,
    PartitionProgress,
    PartitionState,
    Placement,
    StorePlacement,
    Waiting,
)
from services.log.zeromq.links import Links, ZeroMqWriter
from services.log.zeromq.owner import Owner, ZeroMqFollower
from services.log.zeromq.reader import ZeroMqReader
from services.log.zeromq.sockets import Address, KeyCheck, read_keys

#: how often the status is renewed, seconds
_STATUS_SECONDS = 1.0
#: a single look waits this long for the owners' answers, seconds
_LOOK_SECONDS, _POLL_SECONDS = 0.75, 0.02
#: largest dead letter, bytes: none is kept
_DEAD_LETTER_BYTES = 1 << 20


@asynccontextmanager
async def open_for_ingest(
    settings: LogSettings, role: IngestRole, *, metrics: LogMetrics, on_closed: Callable[[str], None]
) -> AsyncIterator[IngestLog]:
    """Open the log for ingest; see :func:`services.log.open_log`. Owners need not be there yet."""
    with zmq.Context() as context:
        links = _links(context, settings, watches=False)
        try:
            status = ZeroMqStatus(links, settings, metrics)
            async with supervised_task(links.run(), "log", on_closed), supervised_task(status.run(), "log", on_closed):
                writer = ZeroMqWriter(links, deadline=role.deadline, max_in_flight=role.max_in_flight)
                yield IngestLog(writer, ZeroMqReader(links, settings), status, NoDeadLetters(), remembers_ids=True)
        finally:
            links.close()


@asynccontextmanager
async def open_for_persister(
    settings: LogSettings, role: PersisterRole, *, metrics: LogMetrics, on_closed: Callable[[str], None]
) -> AsyncIterator[PersisterLog]:
    """Open the log for a persister; see :func:`services.log.open_log`."""
    address = Address(settings.url, settings.store)
    keys = read_keys(settings, owner=True)
    if role.volumes != 1:
        raise ConfigurationError([f"FI_VOLUMES={role.volumes}: with FI_LOG_URL={settings.url} there is one volume"])
    address.prepare()
    _reserve(address, role.volume)
    with zmq.Context() as context:
        check = None if keys is None else KeyCheck(context, keys.clients | {keys.public})
        owner = Owner(context, address, settings.partitions, role, keys=keys)
        links = _links(context, settings, watches=True)
        try:
            status = ZeroMqStatus(links, settings, metrics)
            tasks = (
                supervised_task(links.run(), "log", on_closed),
                supervised_task(owner.run(), "log", on_closed),
                supervised_task(status.run(), "log", on_closed),
            )
            async with tasks[0], tasks[1], tasks[2]:
                yield ZeroMqPersisterLog(owner, settings, status)
        finally:
            links.close()
            if check is not None:
                check.close()


async def look_once(settings: LogSettings) -> LogState:
    """Return what the owners say now, for a command; takes less than a second.

    Raises ConfigurationError: FI_LOG_URL or the keys cannot be used.
    """
    with zmq.Context() as context:
        links = _links(context, settings, watches=True)
        try:
            end = time.monotonic() + _LOOK_SECONDS
            while time.monotonic() < end and not all(link.up for link in links.all):  # noqa: ASYNC110 - for a moment
                await asyncio.sleep(_POLL_SECONDS)
            return ZeroMqStatus(links, settings, None).look()
        finally:
            links.close()


def _links(context: zmq.Context[zmq.Socket[bytes]], settings: LogSettings, *, watches: bool) -> Links:
    # a persister that watches others knocks with the pair that all persisters have
    owner = watches and not settings.zmq_server_key
    keys = read_keys(settings, owner=owner)
    return Links(context, Address(settings.url, settings.store), settings.partitions, keys=keys, watches=watches)


def _reserve(address: Address, volume: str) -> None:
    """Make sure that the directory of the Unix sockets belongs to one volume: two would share a store's events.

    Raises PlacementError: it belongs to another one.
    """
    if not address.is_ipc:
        return
    path = address.directory / f"{address.store}.volume"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(volume, "ascii")
    try:
        os.link(temporary, path)
    except FileExistsError:
        found = path.read_text("ascii")
        if found != volume:
            raise PlacementError(
                f"{path} says that the sockets belong to volume {found}, and FI_DATA_DIR is volume {volume}: set "
                "FI_DATA_DIR or FI_LOG_URL; if the other volume is gone for good, remove the file"
            ) from None
    finally:
        temporary.unlink()


# -- status -----------------------------------------------------------------------------------------------------------


class ZeroMqStatus:
    """What the owners say of their partitions; see :class:`services.log.protocol.Status`.

    There is no stream, so a snapshot has none, and no dead letters.

    Args:
        links: to the owners.
        settings: of the log.
        metrics: where it is shown; None for a look by itself.
    """

    def __init__(self, links: Links, settings: LogSettings, metrics: LogMetrics | None) -> None:
        self.state = LogState()
        self._links = links
        self._settings = settings
        self._metrics = metrics

    async def run(self) -> None:
        """Renew the snapshot each second until cancelled."""
        while True:
            self.state = self.look()
            if self._metrics is not None:
                self._show(self._metrics, self.state)
            await asyncio.sleep(_STATUS_SECONDS)

    def look(self) -> LogState:
        """Return a snapshot."""
        store = self._settings.store
        processes: dict[tuple[str, ...], LiveProcess] = {}
        placed: dict[int, Placement] = {}
        partitions = []
        for link in self._links.all:
            p, last = link.partition, link.last
            if last is not None:
                placed[p] = Placement(p, last.volume, 1, last.committed, 1, 0)
            if last is not None and link.up:
                key = (last.volume, last.about.get("host", ""), last.about.get("pid", ""))
                one = processes.get(key) or LiveProcess(store, last.volume, frozenset(), {}, metadata=last.about)
                progress = {**one.progress, p: PartitionProgress(last.committed, last.waiting)}
                processes[key] = replace(one, partitions=one.partitions | {p}, progress=progress)
            committed, events = (0, 0) if last is None else (last.committed, last.waiting)
            waiting = Waiting(events, committed, stalled=not link.up)
            partitions.append(PartitionState(p, placed.get(p), int(link.up), committed, waiting, None))
        volumes = tuple(sorted({one.volume for one in placed.values()}))
        formed = len(placed) == self._settings.partitions
        placement = StorePlacement(store, formed, volumes, placed, frozenset(), volumes[0] if volumes else "", 1)
        return LogState(
            at=time.monotonic(),
            has_stream=False,
            placements={store: placement} if placed else {},
            processes=tuple(processes.values()),
            stores={store: tuple(partitions)},
        )

    def backlog(self) -> Backlog | None:
        """Return what the owners have received and not committed.

        Sequences are those of partitions, and all that was answered is committed. So the sum of all partitions stands
        for the position of the log.
        """
        partitions = self.state.partitions(self._settings.store)
        if not any(one.owners for one in partitions):
            return None
        total = sum(one.committed + one.waiting.events for one in partitions)
        return Backlog(self.state.at, total, tuple(replace(one.waiting, sequence=total) for one in partitions))

    async def ready(self) -> list[str]:
        """Return why events cannot be stored just now; nothing when they can."""
        mismatches = {link.mismatch for link in self._links.all if link.mismatch}
        if mismatches:
            return sorted(mismatches)
        missing = [partition_name(link.partition) for link in self._links.all if not link.up]
        if not missing:
            return []
        return [
            f"no persister answers for partitions {', '.join(missing)} at {self._settings.url}: start the persisters"
        ]

    def _show(self, metrics: LogMetrics, state: LogState) -> None:
        up = [link.up for link in self._links.all]
        metrics.connected.set(any(up))
        metrics.available.set(all(up))
        metrics.stores(state)


# -- persister --------------------------------------------------------------------------------------------------------


class ZeroMqPersisterLog:
    """The log as a persister uses it; see :class:`services.log.protocol.PersisterLog`."""

    def __init__(self, owner: Owner, settings: LogSettings, status: ZeroMqStatus) -> None:
        role = owner.role
        self.identity = LogIdentity(EVENT_LOG, role.volume)
        self.placements = VolumePlacements(role.directory, role.volume, settings)
        self.answering = OwnersAnswering(owner)
        self.dead_letters = NoDeadLetters()
        self.status = status
        self._owner = owner

    def follower(
        self,
        partition: int,
        *,
        trimmable: int,
        on_events: Callable[[], None],
        on_repair: Callable[[str], None],
    ) -> ZeroMqFollower:
        """Return what takes the events of *partition*; there is nothing to trim or to repair."""
        return ZeroMqFollower(self._owner, partition, on_events=on_events)

    async def check(self, after: Position, *, trimmable: int) -> None:
        """Accept every position: the file itself is the log."""

    @asynccontextmanager
    async def announced(
        self,
        about: Mapping[str, str],
        partitions: Callable[[], Collection[int]],
        progress: Callable[[], Mapping[int, PartitionProgress]],
    ) -> AsyncIterator[Callable[[], None]]:
        """Tell *about* this process to those who ask for the state of its partitions."""
        self._owner.about = about
        yield lambda: None

    async def trim(self, own: Callable[[], Collection[int]], on_round: Callable[[Trimmed], None]) -> None:
        """Do nothing until cancelled: the log keeps no events."""
        await asyncio.Event().wait()


class OwnersAnswering:
    """Brings questions to the partitions that are open here; see :class:`services.log.protocol.Answering`."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    async def open(self, partition: int, take: Callable[[AskedQuestion], None]) -> None:
        """Have *take* called with each question about *partition*."""
        self._owner.takers[partition] = take

    async def close(self, partition: int) -> None:
        """Take no more questions about *partition*."""
        self._owner.takers.pop(partition, None)


class NoDeadLetters:
    """Keeps nothing: an event that cannot be stored is refused, and its sender is told."""

    max_bytes = _DEAD_LETTER_BYTES

    async def store(self, partition: int, body: bytes, headers: dict[str, str]) -> None:
        """Drop the letter; the persister's log has the reason."""

    async def page(self, after: int, limit: int) -> tuple[list[DeadLetter], bool]:
        """Return nothing."""
        return [], False

    async def get(self, sequence: int) -> DeadLetter | None:
        """Return None."""
        return None

    async def remove(self, sequence: int) -> bool:
        """Return False."""
        return False


class VolumePlacements:
    """All partitions belong to one volume; see :class:`services.log.protocol.Placements`.

    Its files say which exist, and the lock on each keeps a second process out. Once all were made a missing one is an
    error for an operator, never a new beginning: :data:`FORMED_FILE` in the volume says so.

    Args:
        directory: of the volume.
        volume: its UUID.
        settings: of the log.
    """

    reconnects = 0
    fence_seconds = 0.0

    def __init__(self, directory: Path, volume: str, settings: LogSettings) -> None:
        self._directory = directory
        self._volume = volume
        self._store = settings.store
        self._partitions = settings.partitions

    def record_of(self, partition: int) -> str:
        """Return where it is written that the partition was made."""
        return str(self._directory / FORMED_FILE)

    async def read(self) -> StorePlacement:
        """Return which partitions were made.

        Raises PlacementError: the volume was made for another number of partitions.
        """
        return await asyncio.to_thread(self._read)

    def _read(self) -> StorePlacement:
        formed = self._formed()
        there = {p for p in range(self._partitions) if (self._directory / f"{partition_name(p)}.h5").exists()}
        here = {p: self._placement(p) for p in (range(self._partitions) if formed else sorted(there))}
        volumes = (self._volume,) if here else ()
        return StorePlacement(self._store, formed, volumes, here, frozenset(), self._volume, 1)

    def _formed(self) -> bool:
        path = self._directory / FORMED_FILE
        try:
            found = formed_partitions(self._directory)
        except (OSError, ValueError):
            raise PlacementError(f"{path} cannot be read: put it back from a backup of the volume") from None
        if found not in (None, self._partitions):
            raise PlacementError(f"{path}: the volume has {found} partitions; set FI_PARTITIONS={found}")
        return found is not None

    def _placement(self, partition: int) -> Placement:
        return Placement(partition, self._volume, 1, 0, 1, 0)

    async def claim(self, partition: int, volume: str, epoch: int, *, begins: int) -> Placement:
        """Return the place of *partition*, whose file was just made."""
        return self._placement(partition)

    async def begin(self) -> bool:
        """Return False: the volume has one store."""
        return False

    async def form(self, volumes: Collection[str]) -> None:
        """Note durably that all files were made."""
        await asyncio.to_thread(self._form)

    def _form(self) -> None:
        path = self._directory / FORMED_FILE
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"partitions": self._partitions}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)

    async def progress(
        self, placement: Placement, committed: int, message_id: str = "", *, owned: Callable[[], bool] = lambda: True
    ) -> Placement:
        """Return *placement* with the progress; it is kept nowhere but in the file."""
        return replace(placement, committed=committed, message_id=message_id)

    @asynccontextmanager
    async def watching(self, on_change: Callable[[], None]) -> AsyncIterator[None]:
        """Watch nothing: what this volume has changes by its own processes alone."""
        yield
