"""Rounds: what has come for all partitions of the process is written, committed and acknowledged together.

A commit costs the same for one event as for a hundred, so commits are made seldom under load and at once when there is
little to do. Each partition whose file is open is a *member*. A round takes what the members' followers have received,
bounded in events and bytes, and goes through five steps, whose order is the guarantee:

1. decode: tell events from poison;
2. append: drop what the corpus holds, write the rest into HDF5;
3. set aside: store poison in ``fi-dead``;
4. commit: make events, position and message id durable in one step;
5. acknowledge: once a partition, so that operators see the lag fall.

A crash anywhere leads to the same events again, and step 2 drops what step 4 has kept. Everything that touches HDF5
runs in one thread, as one job for all partitions. A partition with poison waits for the dead letters alone, and one
that fails leaves the round: its runner opens the file anew.

A round begins at once when the last one could not take everything, or when the log answers its writers only after the
commit (:attr:`~services.log.protocol.Follower.writers_wait`). Otherwise it begins when rounds have taken less than
:data:`SHARE` of the time: a lone event is committed within milliseconds, and 2,000 events a second cost three rounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from structlog.typing import FilteringBoundLogger

from fiq.corpus import (
    EventStore,
    PermanentCorpusError,
    Record,
    StoredRow,
    StoreFailedError,
    TransientCorpusError,
)
from fiq.errors import FiqError, PoisonError
from fiq.event import Event, decode
from services.core import logs
from services.core.lifecycle import spawn
from services.log.partitions import partition_name
from services.log.protocol import Delivery, Fate, Follower, Outcome, message_id_at
from services.persister.dead_letters import DeadLetters, SetAside, Suspects
from services.persister.errors import described
from services.persister.metrics import Metrics, PartitionMetrics
from services.persister.partition_file import PartitionFile
from services.persister.traces import Traces, trace_id_in

T = TypeVar("T")

#: rounds that take all there is use at most this share of the time
SHARE = 0.05
#: longest time between the beginnings of two rounds, seconds
LONGEST_SECONDS = 0.5
#: errors that say nothing about a single message
_NOT_THE_MESSAGE = (FiqError, TransientCorpusError, PermanentCorpusError, StoreFailedError, OSError, MemoryError)

_log = logs.get_logger("rounds")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a round takes.

    Attributes:
        events: events of all partitions, at most.
        size: bytes of their bodies, about, at most.
    """

    events: int
    size: int


class Hdf5Thread:
    """Makes calls in the one thread that touches HDF5, and knows how long they take.

    Args:
        executor: has the thread.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._made: dict[asyncio.Future[Any], float] = {}  # when

    @property
    def longest(self) -> float:
        """For how long the oldest call has waited for its answer, seconds; 0 without one."""
        return time.monotonic() - min(self._made.values()) if self._made else 0.0

    async def run(self, call: Callable[[], T]) -> T:
        """Run *call* in the thread; also when the caller is cancelled meanwhile it runs to its end first."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, call)
        self._made[future] = time.monotonic()
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            if not future.cancelled():
                future.exception()  # nobody else asks for it, and asyncio would log its text, which may quote data
            raise
        finally:
            del self._made[future]


@dataclass(slots=True, eq=False)
class Member:
    """A partition whose file is open and whose events are followed.

    Attributes:
        partition: its number.
        file: its file.
        store: what is open of it.
        follower: delivers its events.
        aside: stores its poison away.
        suspects: finds the message that breaks a batch.
        dead_letters: where conflicts are announced.
        metrics: of the partition.
        log: with the partition in each line.
        fail: called with the error that ends its membership.
        busy_at: when it committed last, on :func:`time.monotonic`.
        in_hand: is done when the batch that is being worked on is.
        progressed: whether it has committed anything since it joined.
    """

    partition: int
    file: PartitionFile
    store: EventStore
    follower: Follower
    aside: SetAside
    suspects: Suspects
    dead_letters: DeadLetters
    metrics: PartitionMetrics
    log: FilteringBoundLogger
    fail: Callable[[Exception], None]
    busy_at: float = 0.0
    in_hand: asyncio.Future[None] | None = None
    progressed: bool = False


@dataclass(frozen=True, slots=True)
class Conflict:
    """An event whose id its consultation holds with another body.

    Attributes:
        sequence: its position in the log.
        event: the event.
        first: position of the event that the consultation keeps.
    """

    sequence: int
    event: Event
    first: int


@dataclass(slots=True, eq=False)
class Batch:
    """What a round has of one partition, and what became of it.

    Attributes:
        member: the partition.
        deliveries: as they came, one at least.
        events: what can be written, with its position in the log.
        poison: what never can, with the reason.
        persisted: events that are new in the corpus.
        duplicates: events that it held already, body and all.
        conflicts: events that go beside the others.
        consultations: consultations touched.
        created: consultations that were not in the corpus.
        outcomes: by sequence, what became of the deliveries that are not new events in the corpus.
        error: why the partition left the round.
    """

    member: Member
    deliveries: list[Delivery]
    events: list[tuple[int, Event]] = field(default_factory=list)
    poison: list[tuple[Delivery, str]] = field(default_factory=list)
    persisted: int = 0
    duplicates: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    consultations: int = 0
    created: list[str] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def size(self) -> int:
        """Bytes of the bodies."""
        return sum(len(delivery.body) for delivery in self.deliveries)

    @property
    def oldest_ns(self) -> int | None:
        """When ingest took the oldest event, nanoseconds since the Unix epoch."""
        return min((event.received_ns for _, event in self.events), default=None)

    # -- the steps: set_aside and acknowledge in the event loop, the others in the HDF5 thread ------------------

    def decode(self) -> None:
        """Tell events from poison."""
        self.events, self.poison = decoded(self.deliveries, self.member.suspects.condemned)
        self.outcomes = {delivery.sequence: Outcome(Fate.POISON) for delivery, _ in self.poison}

    def append(self) -> None:
        """Write what the corpus does not hold.

        Raises:
            PlacementError: the file was deleted or replaced.
            CorpusError: the file must be abandoned and opened again.
        """
        store = self.member.store
        self.member.file.check_in_place(store)
        of_each: dict[str, list[tuple[int, Event]]] = {}
        for numbered in self.events:
            of_each.setdefault(numbered[1].consultation, []).append(numbered)
        for consultation, events in of_each.items():
            self._append(store, consultation, events)

    async def set_aside(self) -> None:
        """Store the poison in ``fi-dead``, and count it."""
        await self.member.aside.poison_of(self.deliveries, self.poison)

    def commit(self) -> None:
        """Make the batch durable, together with the position that it reaches.

        Raises CorpusError: whether it counts shows when the file is opened again.
        """
        last = self.deliveries[-1]
        self.member.store.commit(last.sequence, message_id_at(last.headers))
        self.member.file.created(self.created)

    async def acknowledge(self) -> None:
        """Tell the log once that everything up to here is safe."""
        await self.member.follower.acknowledge(self.deliveries[-1], self.outcomes)

    def _append(self, store: EventStore, consultation: str, events: Sequence[tuple[int, Event]]) -> None:
        held = store.held(consultation, {event.event_id.bytes for _, event in events})
        new: dict[bytes, Record] = {}
        conflicts: list[Conflict] = []
        for sequence, event in events:
            event_id = event.event_id.bytes
            if (first := new.get(event_id)) is not None:
                same, at = first.body == event.body, first.sequence
            elif (row := held.get(event_id)) is not None:
                # what was delivered before stands at its own sequence: after a crash all of a batch may be that
                same = row.sequence == sequence or _same_body(store, consultation, row, event.body)
                at = row.sequence
            else:
                new[event_id] = _record(sequence, event)
                continue
            if at != sequence:
                self.outcomes[sequence] = Outcome(Fate.DUPLICATE if same else Fate.CONFLICT, at)
            if same or self.member.follower.writers_wait:
                continue
            if not _is_known_conflict(store, consultation, event):
                conflicts.append(Conflict(sequence, event, at))
        if store.append(consultation, list(new.values())):
            self.created.append(consultation)
        store.append_conflicts(consultation, [_record(one.sequence, one.event) for one in conflicts])
        self.conflicts += conflicts
        self.persisted += len(new)
        self.duplicates += len(events) - len(new) - len(conflicts)
        self.consultations += bool(new)


class Rounds:
    """The rounds of one process.

    Args:
        hdf5: the one thread that touches HDF5.
        limits: how much a round takes.
        metrics: of this process.
        traces: shows which traces came with a batch.
    """

    def __init__(self, hdf5: Hdf5Thread, limits: Limits, metrics: Metrics, traces: Traces | None = None) -> None:
        self.hdf5 = hdf5
        self._limits = limits
        self._metrics = metrics
        self._traces = traces or Traces()
        self._members: dict[int, Member] = {}
        self._arrived = asyncio.Event()
        self._enough = asyncio.Event()
        self._ready = 0
        self._next_at = 0.0
        self._cost = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def join(self, member: Member) -> None:
        """Take what comes for *member* into the rounds."""
        self._members[member.partition] = member
        self.arrived()

    async def leave(self, member: Member) -> None:
        """Take nothing more of *member*, and wait until its batch in hand is committed and acknowledged, or failed."""
        if self._members.get(member.partition) is member:
            del self._members[member.partition]
        if member.in_hand is not None:
            await asyncio.wait({member.in_hand})

    def arrived(self) -> None:
        """Note that a follower has something new to hand out."""
        self._ready += 1
        self._arrived.set()
        if self._ready >= self._limits.events:
            self._enough.set()

    async def run(self) -> None:
        """Make rounds until cancelled; what is in hand then is finished by :meth:`leave`."""
        while True:
            await self._arrived.wait()
            await self._pause()
            self._arrived.clear()
            self._enough.clear()
            self._ready = 0
            began = time.monotonic()
            batches, full = self._take()
            if not batches:
                continue
            await asyncio.shield(spawn(self._tasks, self._round(batches), "round"))
            at_once = full or any(batch.member.follower.writers_wait for batch in batches)
            self._next_at = 0.0 if at_once else began + min(LONGEST_SECONDS, self._cost / SHARE)
            if full:
                self._arrived.set()

    # -- one round ----------------------------------------------------------------------------------------------------

    async def _round(self, batches: list[Batch]) -> None:
        """Persist *batches*: decode, append, set aside, commit, acknowledge."""
        began, self._cost = time.perf_counter(), 0.0
        await self._in_hdf5(batches, Batch.decode, Batch.append)
        for batch in batches:
            if batch.poison:
                spawn(self._tasks, self._finish([batch], began))
        await self._finish([batch for batch in batches if not batch.poison], began)

    async def _finish(self, batches: list[Batch], began: float) -> None:
        await _each(batches, Batch.set_aside)
        await self._in_hdf5(batches, Batch.commit)
        await _each(batches, Batch.acknowledge)
        for batch in batches:
            self._done(batch)
        self._report([batch for batch in batches if batch.error is None], time.perf_counter() - began)

    def _take(self) -> tuple[list[Batch], bool]:
        """Return a batch of each member that has something, in equal parts, and whether something was left."""
        waiting = [one for one in self._members.values() if one.in_hand is None and one.follower.ready]
        waiting.sort(key=lambda member: member.follower.ready)
        events, size, full = self._limits.events, self._limits.size, False
        batches = []
        for left, member in zip(range(len(waiting), 0, -1), waiting, strict=True):
            most = 1 if member.suspects.singly else max(1, events // left)
            deliveries = member.follower.take(max_events=most, max_bytes=max(1, size // left))
            if not deliveries:
                continue
            batch = Batch(member, deliveries)
            member.in_hand = asyncio.get_running_loop().create_future()
            events, size = max(1, events - len(deliveries)), max(1, size - batch.size)
            full = full or member.follower.ready > 0
            batches.append(batch)
        return batches, full

    async def _pause(self) -> None:
        """Wait until the next round is due, or as much waits as one can take."""
        left = self._next_at - time.monotonic()
        if left > 0:
            try:
                async with asyncio.timeout(left):
                    await self._enough.wait()
            except TimeoutError:
                return

    async def _in_hdf5(self, batches: Sequence[Batch], *steps: Callable[[Batch], None]) -> None:
        """Take *steps* with each batch that has not failed, all of them in one job of the HDF5 thread."""

        def work() -> float:
            started = time.thread_time()
            for batch in batches:
                try:
                    for step in steps:
                        if batch.error is None:
                            step(batch)
                except Exception as error:  # noqa: BLE001 - the partition leaves the round, the others go on
                    batch.error = error
            return time.thread_time() - started

        if not batches:
            return
        try:
            self._cost += await self.hdf5.run(work)
        except Exception as error:  # noqa: BLE001 - whatever it was, each of them opens its file anew
            for batch in batches:
                batch.error = batch.error or error

    def _done(self, batch: Batch) -> None:
        member, error = batch.member, batch.error
        if error is None:
            member.busy_at, member.progressed = time.monotonic(), True
            member.suspects.passed(batch.deliveries)
            if batch.conflicts:
                spawn(self._tasks, _announce(batch))
        else:
            if self._members.get(member.partition) is member:
                del self._members[member.partition]
            if not isinstance(error, _NOT_THE_MESSAGE):
                member.suspects.failed(batch.deliveries, error)
            member.fail(error)
        assert member.in_hand is not None
        member.in_hand.set_result(None)
        member.in_hand = None
        if member.follower.ready:
            self.arrived()  # it came while the batch was in hand

    def _report(self, batches: Sequence[Batch], seconds: float) -> None:
        if not batches:
            return
        for batch in batches:
            batch.member.metrics.batch(batch)
            self._traces.show(batch.member.log, partition_name(batch.member.partition), batch, seconds)
        events = sum(len(batch.deliveries) for batch in batches)
        self._metrics.batch_events.observe(events)
        self._metrics.batch_seconds.observe(seconds)
        oldest = min((ns for batch in batches if (ns := batch.oldest_ns) is not None), default=None)
        age = None if oldest is None else max(0.0, time.time() - oldest / 1e9)
        if age is not None:
            self._metrics.event_age_seconds.observe(age)
        _log.info(
            logs.EVENT_PERSISTED,
            partitions=",".join(partition_name(batch.member.partition) for batch in batches),
            last_sequence=max(batch.deliveries[-1].sequence for batch in batches),
            persisted=sum(batch.persisted for batch in batches),
            duplicates=sum(batch.duplicates for batch in batches),
            dead=sum(len(batch.poison) for batch in batches),
            conflicts=sum(len(batch.conflicts) for batch in batches),
            consultations=sum(batch.consultations for batch in batches),
            bytes=sum(batch.size for batch in batches),
            duration_s=round(seconds, 6),
            age_s=None if age is None else round(age, 6),
        )


async def _each(batches: Sequence[Batch], step: Callable[[Batch], Coroutine[Any, Any, None]]) -> None:
    """Take *step* with each batch that has not failed."""
    for batch in batches:
        if batch.error is None:
            try:
                await step(batch)
            except Exception as error:  # noqa: BLE001 - the partition leaves the round, the others go on
                batch.error = error


async def _announce(batch: Batch) -> None:
    """Tell in ``fi-dead`` of conflicts that are committed; they are safe in the corpus, so nothing waits for it."""
    member, conflicts = batch.member, batch.conflicts
    try:
        await member.dead_letters.point_to([(one.event.consultation, one.sequence, one.first) for one in conflicts])
    except (FiqError, OSError) as error:
        member.log.warning("CONFLICTS_NOT_ANNOUNCED", events=len(conflicts), **described(error))
    headers = {delivery.sequence: delivery.headers for delivery in batch.deliveries}
    first = conflicts[0]
    member.log.warning(
        "EVENT_KEYS_REUSED",
        events=len(conflicts),
        sequence=first.sequence,
        first_sequence=first.first,
        **trace_id_in(headers[first.sequence]),
    )


# -- the corpus, in the HDF5 thread -----------------------------------------------------------------------------------


def decoded(
    deliveries: Sequence[Delivery], condemned: Mapping[int, str]
) -> tuple[list[tuple[int, Event]], list[tuple[Delivery, str]]]:
    """Return the events of *deliveries* with their positions, and with its reason what is poison or *condemned*."""
    events: list[tuple[int, Event]] = []
    poison: list[tuple[Delivery, str]] = []
    for delivery in deliveries:
        if delivery.sequence in condemned:
            poison.append((delivery, condemned[delivery.sequence]))
            continue
        try:
            event = decode(delivery.consultation, delivery.headers, delivery.body)
        except PoisonError as error:
            poison.append((delivery, str(error)))
        else:
            events.append((delivery.sequence, event))
    return events, poison


def _record(sequence: int, event: Event) -> Record:
    return Record(sequence, event.received_ns, event.event_id.bytes, event.body)


def _same_body(store: EventStore, consultation: str, row: StoredRow, body: bytes) -> bool:
    if row.length != len(body):
        return False
    with store.reading() as lookup:
        stored = lookup.consultation(consultation)
        return stored is not None and stored.body(row) == body


def _is_known_conflict(store: EventStore, consultation: str, event: Event) -> bool:
    """Return whether the conflicts hold this very event already: it was posted once more."""
    event_id = event.event_id.bytes
    if event_id not in store.held_conflicts(consultation, {event_id}):
        return False
    with store.reading(conflicts=True) as lookup:
        stored = lookup.consultation(consultation)
        rows = [] if stored is None else map(stored.row, range(len(stored)))  # two conflicts under one id are rare
        return any(
            row.event_id == event_id and row.length == len(event.body) and stored.body(row) == event.body
            for row in rows
            if stored is not None
        )
