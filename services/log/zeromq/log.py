"""The log without a broker, put together as ingest and a persister use it, and the persister's side of it.

The persister has one socket for each partition whose file this process has open. A partition's socket is bound by its
follower's ``start``, after the file was opened and locked, and closed with the follower, before the file is released.
What has come until then and was not committed is forgotten: ingest sends it to the next owner. The follower gives each
event the next sequence as it arrives, so sequences rise in the order in which events came, with gaps where one was a
copy.

Memory is bounded by credit. FI_BUFFER_EVENTS and FI_BUFFER_BYTES are divided among the open partitions, and each
partition's part among the processes that send to it; :class:`~services.log.zeromq.wire.State` tells each what it may
have sent without an answer. A process that was not heard for :data:`GONE_SECONDS` gives its part back.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import zmq

from fiq.errors import ConfigurationError
from fiq.event import message_id_at
from services.core.lifecycle import supervised_task
from services.core.logs import get_logger
from services.log.dead_letters import DeadLetter
from services.log.errors import PlacementError
from services.log.metrics import LogMetrics
from services.log.partitions import partition_name
from services.log.protocol import (
    EVENT_LOG,
    AskedQuestion,
    Delivery,
    Failure,
    Fate,
    IngestLog,
    IngestRole,
    LogIdentity,
    Outcome,
    PersisterLog,
    PersisterRole,
    Position,
    Trimmed,
)
from services.log.questions import Answer, MalformedError, Question, decode_question, encode_answer
from services.log.settings import FORMED_FILE, LogSettings, formed_partitions
from services.log.status import (
    LogState,
    PartitionProgress,
    Placement,
    StorePlacement,
)
from services.log.zeromq import wire
from services.log.zeromq.links import Links, ZeroMqReader, ZeroMqStatus, ZeroMqWriter
from services.log.zeromq.sockets import Address, KeyCheck, Keys, LoopSocket, read_keys
from services.log.zeromq.wire import Done, MalformedMessageError, State

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


# -- the owner of a partition -----------------------------------------------------------------------------------------

#: a process that was not heard for this long is gone, seconds
GONE_SECONDS = 5.0
#: how often followers look after their clients; how old what these know may be, seconds
_CLIENTS_SECONDS, _STATE_SECONDS = 0.25, 0.5
#: the smallest credit, events
_LEAST_EVENTS = 16
#: largest answer to a question, bytes
ANSWER_BYTES = 64 << 20
_log = get_logger("zeromq")


class Owner:
    """What the partitions of one process have in common.

    Args:
        context: of the process.
        address: where the sockets are bound.
        partitions: how many the store has.
        role: of the process.
        keys: of this process; None without encryption.

    Attributes:
        takers: who answers questions, by partition.
        about: what this process says of itself.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: Address,
        partitions: int,
        role: PersisterRole,
        *,
        keys: Keys | None,
    ) -> None:
        self.context = context
        self.address = address
        self.partitions = partitions
        self.role = role
        self.keys = keys
        self.takers: dict[int, Callable[[AskedQuestion], None]] = {}
        self.about: Mapping[str, str] = {}
        self._followers: set[ZeroMqFollower] = set()

    def add(self, follower: ZeroMqFollower) -> None:
        """Count *follower* among those that share the buffer."""
        self._followers.add(follower)

    def discard(self, follower: ZeroMqFollower) -> None:
        """Count it no more."""
        self._followers.discard(follower)

    def credit(self, clients: int) -> tuple[int, int]:
        """Return what each of the *clients* of a partition may have in flight: events, and bytes."""
        parts = max(1, len(self._followers)) * max(1, clients)
        return max(_LEAST_EVENTS, self.role.buffer_events // parts), self.role.buffer_bytes // parts

    async def run(self) -> None:
        """Look after the clients until cancelled."""
        while True:
            for follower in list(self._followers):
                follower.look(time.monotonic())
            await asyncio.sleep(_CLIENTS_SECONDS)


@dataclass(slots=True, eq=False)
class _Client:
    """A process that sends events or asks questions."""

    name: str
    watches: bool
    heard_at: float


@dataclass(frozen=True, slots=True)
class _Received:
    """An event that is not answered."""

    sequence: int
    client: bytes
    number: int


class ZeroMqFollower:
    """Follows one partition; see :class:`services.log.protocol.Follower`.

    Args:
        owner: of this process.
        partition: its number.
        on_events: called when there is something new to take.
    """

    writers_wait = True

    def __init__(self, owner: Owner, partition: int, *, on_events: Callable[[], None]) -> None:
        self._owner = owner
        self._partition = partition
        self._on_events = on_events
        self._socket: LoopSocket | None = None
        self._unbind: Callable[[], None] = lambda: None
        self._interrupted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._instance = ""
        self._position = Position(0)
        self._last = 0
        self._queue: deque[Delivery] = deque()
        self._received: deque[_Received] = deque()
        self._clients: dict[bytes, _Client] = {}
        self._told_at = 0.0
        self._told: tuple[int, int, int] = (0, 0, 0)

    async def start(self, after: Position) -> None:
        """Take events from now on; the first one gets the sequence after *after*.

        Raises LogUnavailableError: the address is taken; LogAccessError: its directory is not private.
        """
        self._position, self._last = after, after.sequence
        self._instance = uuid.uuid4().hex
        self._queue.clear()
        self._received.clear()
        if self._socket is None:
            owner = self._owner
            owner.address.prepare()
            made = LoopSocket(owner.context, zmq.ROUTER, self._take_message, keys=owner.keys)
            try:
                self._unbind = owner.address.bind(made.socket, self._partition)
            except BaseException:
                made.close()
                raise
            self._socket = made
            owner.add(self)
        self._tell_all()

    async def run(self) -> None:
        """Wait until cancelled or interrupted: events come by themselves."""
        await self._interrupted

    def take(self, *, max_events: int, max_bytes: int) -> list[Delivery]:
        """Return what has come and was not taken, within the bounds; at least one event when there is one."""
        taken: list[Delivery] = []
        size = 0
        while self._queue and len(taken) < max_events and size < max_bytes:
            delivery = self._queue.popleft()
            size += len(delivery.body)
            taken.append(delivery)
        return taken

    @property
    def ready(self) -> int:
        """How many events can be taken now."""
        return len(self._queue)

    @property
    def waiting(self) -> int:
        """How many events were received and are not committed."""
        return len(self._received)

    @property
    def delivered(self) -> int:
        """The same: all that waits is here."""
        return len(self._received)

    @property
    def in_doubt(self) -> bool:
        """False: the file itself is the log."""
        return False

    async def acknowledge(self, delivery: Delivery, outcomes: Mapping[int, Outcome]) -> None:
        """Answer every event up to *delivery*: one message for each process that sent some."""
        done: dict[bytes, list[tuple[int, int, Done]]] = {}
        while self._received and self._received[0].sequence <= delivery.sequence:
            one = self._received.popleft()
            done.setdefault(one.client, []).append((one.number, *_answer(one.sequence, outcomes.get(one.sequence))))
        self._position = Position(delivery.sequence, message_id_at(delivery.headers))
        if self._socket is not None:
            for client, events in done.items():
                self._socket.send([client, *wire.encode_done(events)])

    async def empty_up_to(self) -> Position:
        """Return the committed position: there are no sequences of other partitions to skip."""
        return self._position

    def advance(self, position: Position) -> None:
        """Note that the sink has reached *position*."""
        self._position = position

    def interrupt(self, error: Exception) -> None:
        """Make :meth:`run` raise *error*."""
        if not self._interrupted.done():
            self._interrupted.set_exception(error)

    async def close(self) -> None:
        """Take nothing more; what is not committed is sent to the next owner. Idempotent."""
        made, self._socket = self._socket, None
        if made is not None:
            self._owner.discard(self)
            self._unbind()
            made.close()
        self._queue.clear()
        if not self._interrupted.done():
            self._interrupted.cancel()

    # -- clients ------------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Forget clients that are gone, and tell the others what is new."""
        for name in [name for name, one in self._clients.items() if now - one.heard_at > GONE_SECONDS]:
            del self._clients[name]
        if now - self._told_at >= _STATE_SECONDS or self._told != self._news():
            self._tell_all()

    def _news(self) -> tuple[int, int, int]:
        return self._position.sequence, *self._owner.credit(self._writers())

    def _writers(self) -> int:
        return sum(not one.watches for one in self._clients.values())

    def _tell_all(self) -> None:
        self._told_at, self._told = time.monotonic(), self._news()
        for identity, client in self._clients.items():
            self._tell(identity, client)

    def _tell(self, identity: bytes, client: _Client) -> None:
        owner = self._owner
        events, size = (0, 0) if client.watches else owner.credit(self._writers())
        state = State(
            instance=self._instance,
            committed=self._position.sequence,
            waiting=self.waiting,
            credit_events=events,
            credit_bytes=size,
            store=owner.address.store,
            volume=owner.role.volume,
            partitions=owner.partitions,
            about=dict(owner.about),
        )
        if self._socket is not None:
            self._socket.send([identity, *wire.encode_state(state)])

    # -- what comes ---------------------------------------------------------------------------------------------------

    def _take_message(self, frames: list[bytes]) -> None:
        identity, *message = frames
        client = self._clients.get(identity)
        if client is not None:
            client.heard_at = time.monotonic()
        try:
            match message:
                case [wire.HELLO, data]:
                    name, watches = wire.decode_hello(data)
                    client = self._clients[identity] = _Client(name, watches, time.monotonic())
                    self._tell(identity, client)
                case [wire.EVENTS, *_] if client is None or not client.watches:
                    if client is None:  # forgotten while it was frozen; its next HELLO names it
                        self._clients[identity] = _Client("", watches=False, heard_at=time.monotonic())
                    self._take_events(identity, message)
                case [wire.ASK, number, kind, data]:
                    self._take_question(identity, number, kind, data)
                case [wire.BYE]:
                    self._clients.pop(identity, None)
                case _:
                    raise MalformedMessageError("an unknown kind of message, or events of a process that only watches")
        except MalformedMessageError as error:
            _log.warning("MESSAGE_MALFORMED", partition=partition_name(self._partition), reason=str(error))

    def _take_events(self, identity: bytes, message: list[bytes]) -> None:
        for number, consultation, headers, body in wire.decode_events(message):
            self._last += 1
            self._received.append(_Received(self._last, identity, number))
            self._queue.append(Delivery(self._last, consultation, headers, body, ""))
            self._on_events()

    def _take_question(self, identity: bytes, number: bytes, kind: bytes, data: bytes) -> None:
        asked = _Asked(self, identity, number, kind.decode("ascii", "replace"), data)
        take = self._owner.takers.get(self._partition)
        if take is None:
            self._reply(identity, number, wire.CODES[Failure.NOT_NOW], b"the partition was let go")
        else:
            take(asked)

    def _reply(self, identity: bytes, number: bytes, code: int, data: bytes) -> bool:
        return self._socket is not None and self._socket.send([identity, *wire.encode_reply(number, code, data)])


class _Asked:
    """A question that has arrived; see :class:`services.log.protocol.AskedQuestion`."""

    __slots__ = ("_follower", "_identity", "_number", "kind", "question", "room", "within")

    def __init__(self, follower: ZeroMqFollower, identity: bytes, number: bytes, kind: str, data: bytes) -> None:
        self._follower = follower
        self._identity = identity
        self._number = number
        self.room = ANSWER_BYTES
        self.question: Question | None = None
        self.kind, self.within = "unknown", 1.0
        try:
            self.question, self.within = decode_question(kind, data)
            self.kind = kind
        except MalformedError:
            return

    async def answer(self, answer: Answer) -> bool:
        """Send *answer*; False when the asker is gone."""
        return self._follower._reply(self._identity, self._number, 0, encode_answer(answer))

    async def fail(self, failure: Failure, reason: str) -> bool:
        """Send why there is no answer; False when the asker is gone."""
        return self._follower._reply(self._identity, self._number, wire.CODES[failure], reason.encode())


def _answer(sequence: int, outcome: Outcome | None) -> tuple[int, Done]:
    if outcome is None:
        return sequence, Done.STORED
    return (0, Done.REFUSED) if outcome.fate is Fate.POISON else (outcome.first, Done.DUPLICATE)
