"""A partition without a broker: a scripted follower, a real partition file, and what ended up in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

from fiq.corpus import EventStore, Identity, StorageIO, StoreOptions, open_corpus
from fiq.errors import TransientError
from fiq.event import Event
from services.core.tracing import Spans
from services.log.protocol import Answering, Delivery, LogIdentity, Outcome, Position
from services.persister.answering import QuestionResponder
from services.persister.dead_letters import DeadLetters, PoisonLimit
from services.persister.metrics import PersisterMetrics
from services.persister.partition import PartitionRunner, RunnerState
from services.persister.rounds import Hdf5Thread, Rounds
from tests.support.polling import eventually

LOG = LogIdentity("fi-events", "2026-11-23T10:00:00Z")
VOLUME = "0b9f6a52-7d83-4c1e-9d6a-52f0c7a9b101"
IDENTITY = Identity("main", VOLUME, 1, 0, 1, LOG.name, LOG.created)


def event(number: int, consultation: str = "c1") -> Event:
    """Make the event with this *number*: always the same one."""
    body = b'{"event_type":"T","payload":%d}' % number
    return Event(consultation, UUID(int=number), 1_700_000_000_000_000_000 + number, body)


def delivery(sequence: int, *, of: int | None = None, consultation: str = "c1") -> Delivery:
    """Deliver the event with number *of* (by default the sequence) at *sequence*."""
    made = event(sequence if of is None else of, consultation)
    return Delivery(sequence, consultation, made.headers(), made.body, f"token-{sequence}")


def reusing(sequence: int, *, of: int, consultation: str = "c1", body: bytes = b'{"event_type":"T"}') -> Delivery:
    """Deliver at *sequence* another *body* under the id of the event with number *of*."""
    return Delivery(sequence, consultation, event(of, consultation).headers(), body, f"token-{sequence}")


def poison(sequence: int, headers: Mapping[str, str] | None = None, body: bytes = b"garbage") -> Delivery:
    """Deliver what is no event."""
    return Delivery(sequence, "c1", headers, body, f"token-{sequence}")


class Stream:
    """The deliveries of a partition and what became of them.

    Attributes:
        acknowledged: sequences, in order.
        followers: how many were started.
        interrupted: errors that a runner raised through its follower.
    """

    def __init__(self, *deliveries: Delivery) -> None:
        self.deliveries = list(deliveries)
        self.acknowledged: list[int] = []
        self.followers = 0
        self.advanced: list[int] = []
        self.empty_up_to = Position(0)
        self.in_doubt = False
        self.started: list[Position] = []
        self.on_acknowledge: Callable[[int], None] = lambda _: None
        self.on_events: list[Callable[[], None]] = []

    def add(self, *deliveries: Delivery) -> None:
        """Publish more."""
        self.deliveries += deliveries
        for _ in deliveries:  # as a real follower does
            for tell in self.on_events:
                tell()

    def follower(self, on_events: Callable[[], None]) -> ScriptedFollower:
        """Make a follower; each start begins where it is told."""
        self.on_events.append(on_events)
        return ScriptedFollower(self)


class ScriptedFollower:
    """Follows a :class:`Stream`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._position = 0
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, after: Position) -> None:
        self._stream.followers += 1
        self._stream.started.append(after)
        self._position = after.sequence

    async def run(self) -> None:
        await self._ended

    def take(self, *, max_events: int, max_bytes: int) -> list[Delivery]:
        found = self._left()[:max_events]
        if found:
            self._position = found[-1].sequence
        return found

    @property
    def ready(self) -> int:
        return len(self._left())

    @property
    def waiting(self) -> int:
        return len(self._left())

    @property
    def delivered(self) -> int:
        return 0

    @property
    def writers_wait(self) -> bool:
        return False

    @property
    def in_doubt(self) -> bool:
        return self._stream.in_doubt

    def _left(self) -> list[Delivery]:
        return [one for one in self._stream.deliveries if one.sequence > self._position]

    async def acknowledge(self, delivery: Delivery, outcomes: Mapping[int, Outcome]) -> None:
        self._stream.on_acknowledge(delivery.sequence)
        self._stream.acknowledged.append(delivery.sequence)

    async def empty_up_to(self) -> Position:
        return self._stream.empty_up_to

    def advance(self, position: Position) -> None:
        self._stream.advanced.append(position.sequence)

    def interrupt(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    async def close(self) -> None:
        pass


class DeadStream:
    """Takes dead letters, or refuses them while it is *down*."""

    max_bytes = 2**20

    def __init__(self) -> None:
        self.letters: list[tuple[int, bytes, dict[str, str]]] = []
        self.down = False
        self.attempts = 0
        self.gate: asyncio.Event | None = None

    async def store(self, partition: int, body: bytes, headers: dict[str, str]) -> None:
        self.attempts += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.down:
            raise TransientError("the dead-letter stream is out of reach")
        self.letters.append((partition, body, headers))

    @property
    def reasons(self) -> list[tuple[int, str]]:
        """Sequence and reason of each letter."""
        return [(int(headers["Fi-Stream-Sequence"]), headers["Fi-Reason"]) for _, _, headers in self.letters]


class Rig:
    """One partition runner on a real file in *folder*."""

    def __init__(
        self,
        folder: Path,
        stream: Stream,
        hdf5: ThreadPoolExecutor,
        limit: PoisonLimit | None,
        spans: Spans | None,
        answering: Answering | None,
    ) -> None:
        self.path = folder / "00.h5"
        self.stream = stream
        self.dead = DeadStream()
        self.metrics = PersisterMetrics()
        self.io = StorageIO()
        self.opened = 0
        self.store: EventStore | None = None
        self.wrap: Callable[[EventStore], None] = lambda _: None
        self.rounds = Rounds(Hdf5Thread(hdf5), self.metrics, max_events=100, max_bytes=2**20, spans=spans)
        self.responder = None if answering is None else QuestionResponder(answering, self.rounds.hdf5, self.metrics)
        self.turning = asyncio.create_task(self.rounds.run())
        self.runner = PartitionRunner(
            0,
            open_store=self._open,
            follower=stream.follower,
            dead_letters=DeadLetters(self.dead, 0, LOG),
            rounds=self.rounds,
            metrics=self.metrics,
            poison_limit=limit,
            responder=self.responder,
        )

    def _open(self) -> EventStore:
        self.opened += 1
        options = StoreOptions(io=self.io)
        if self.path.exists():
            self.store = EventStore.open(self.path, expected=IDENTITY, options=options)
        else:
            self.store = EventStore.create(self.path, IDENTITY, options)
        self.wrap(self.store)
        return self.store

    async def reach(self, sequence: int) -> None:
        """Wait until *sequence* is acknowledged."""
        await eventually(lambda: sequence in self.stream.acknowledged)

    async def be(self, state: RunnerState) -> None:
        """Wait for a state of the runner."""
        await eventually(lambda: self.runner.state is state)

    def sample(self, name: str, **labels: str) -> float | None:
        """Return the value of a metric of this partition."""
        return self.metrics.registry.get_sample_value(name, {"partition": "00", **labels})

    def content(self) -> dict[str, list[int]]:
        """Return each consultation's sequences, as a reader sees them now."""
        return contents(self.path)


def contents(path: Path) -> dict[str, list[int]]:
    """Return each consultation's sequences in the partition file at *path*."""
    with open_corpus(path) as corpus:
        return {name: [record.sequence for record in corpus[name]] for name in corpus}


def conflicts(path: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Return sequence and body of each consultation's conflicts in the partition file at *path*."""
    with open_corpus(path) as corpus:
        return {kept.id: [(record.sequence, record.raw) for record in kept] for kept in corpus.conflicts()}


@asynccontextmanager
async def rig(
    folder: Path,
    stream: Stream,
    *,
    limit: PoisonLimit | None = None,
    spans: Spans | None = None,
    answering: Answering | None = None,
) -> AsyncIterator[Rig]:
    """Make a :class:`Rig`; its runner is the test's to start."""
    with ThreadPoolExecutor(1) as hdf5:
        made = Rig(folder, stream, hdf5, limit, spans, answering)
        try:
            yield made
        finally:
            await made.runner.stop()  # an HDF5 file that is open when the interpreter ends crashes it
            made.turning.cancel()
            await asyncio.wait({made.turning})
