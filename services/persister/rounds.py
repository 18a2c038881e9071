"""Rounds: the events that have arrived for all partitions of the process are written and committed together.

A commit costs the same for one event as for a hundred, so under load commits are rare, and with little to do they come
at once. A round takes what the followers of the open partitions have received, bounded in events and bytes, and does
five steps. Their order is the guarantee:

1. decode: separate events from poison;
2. append: drop what the corpus holds, write the rest into HDF5;
3. set aside: store poison in ``fi-dead``;
4. commit: make events, position and message id durable in one step;
5. acknowledge: report each event's outcome to the log, once a partition.

After a crash at any point the same events are delivered again, and step 2 drops what step 4 has committed. A batch with
poison waits for the dead letters without the others, and a partition that fails leaves the round: its runner opens the
file again.

Everything that touches HDF5 runs in one thread, as one job for all partitions. Only the commits run in threads of their
own, one a file, while the HDF5 thread waits for them: h5py's lock admits one at a time, and the waits for the disk
overlap (eight partitions, fdatasync of 3 ms: 8 ms instead of 40, 2026-11-27).

A round starts at once if the last one could not take everything, or if writers wait for the commit
(:attr:`~services.log.protocol.Follower.writers_wait`). Otherwise it starts when rounds have used less than
:data:`SHARE` of the time: a single event is committed within milliseconds, and 2,000 events a second need three rounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from structlog.typing import FilteringBoundLogger

from fiq.corpus import EventStore, PermanentCorpusError, Record, StoredRow, StoreFailedError, TransientCorpusError
from fiq.errors import FiqError, PoisonError
from fiq.event import Event, decode, message_id_at
from services.core import logs
from services.core.lifecycle import spawn
from services.core.tracing import Spans
from services.log.errors import PlacementError
from services.log.protocol import Delivery, Fate, Follower, Outcome, Position
from services.persister.dead_letters import Quarantine
from services.persister.errors import NotNowError, described
from services.persister.metrics import PartitionMetrics, PersisterMetrics, show_traces, trace_id_in

T = TypeVar("T")

#: share of the time that rounds may use while each takes everything that has arrived
SHARE = 0.05
#: threads for the commits of a round
COMMITTERS = 8
#: longest time between the starts of two rounds, seconds
LONGEST_SECONDS = 0.5
#: errors that are not caused by a single message
_NOT_THE_MESSAGE = (FiqError, TransientCorpusError, PermanentCorpusError, StoreFailedError, OSError, MemoryError)

_log = logs.get_logger("rounds")


class Hdf5Thread:
    """Runs calls in the one thread that touches HDF5, and measures how long they take.

    Args:
        executor: has the thread.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._pending: dict[asyncio.Future[Any], float] = {}  # when it was made

    @property
    def longest(self) -> float:
        """How long the oldest pending call has waited, seconds; 0 without one."""
        return time.monotonic() - min(self._pending.values()) if self._pending else 0.0

    async def run(self, call: Callable[[], T]) -> T:
        """Run *call* in the thread. A cancelled caller waits until the call has ended."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, call)
        self._pending[future] = time.monotonic()
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            if not future.cancelled():
                future.exception()  # otherwise asyncio would log the error with its text, which may quote data
            raise
        finally:
            del self._pending[future]


class PartitionFile:
    """The open file of one partition; its methods run in the HDF5 thread.

    Calls wait there in a queue, and a file may be closed before their turn: what is called outside of rounds checks
    that.

    Attributes:
        store: the file's events.
    """

    def __init__(self, store: EventStore) -> None:
        self.store = store
        self._closed = False

    def close(self, *, abandon: bool) -> list[Exception]:
        """Release the file and return the errors of that; what is committed is safe all the same.

        Args:
            abandon: make no last checkpoint.
        """
        self._closed = True
        failures: list[Exception] = []
        for release in (self.store.abandon,) if abandon else (self.store.close, self.store.abandon):
            try:
                release()
            except Exception as error:  # noqa: BLE001 - the lock must be released in any case
                failures.append(error)
        return failures

    def check_readable(self) -> None:
        """Check that the file may be read to answer a question.

        Raises:
            NotNowError: it was closed, or holds what is not committed.
            PlacementError: it was deleted or replaced.
        """
        if self._closed:
            raise NotNowError("the partition was released")
        if self.store.uncommitted:
            raise NotNowError("a batch is half written")
        self.check_in_place()

    def advance(self, position: Position) -> bool:
        """Move the committed position forward; return False if the file was closed or is already further.

        Raises:
            PlacementError: it was deleted or replaced.
            CorpusError: the commit failed.
        """
        store = self.store
        if self._closed or store.uncommitted or store.committed >= position.sequence:
            return False
        self.check_in_place()
        store.commit(position.sequence, position.message_id)
        return True

    def checkpoint(self) -> None:
        """Make a checkpoint if one is due, unless the file was closed.

        Raises:
            PlacementError: it was deleted or replaced.
            CorpusError: the checkpoint failed; the journal holds everything.
        """
        if self._closed:
            return
        self.check_in_place()
        self.store.maybe_checkpoint()

    def check_in_place(self) -> None:
        """Check that the open files are still those in the directory: a commit to a deleted file would be lost.

        Raises PlacementError: one was deleted or replaced.
        """
        if not self.store.in_place:
            raise PlacementError(
                f"{self.store.path} or its journal was deleted or replaced while it was written: put both back, then "
                "restart the persister; the stream still has the events that they lack"
            )


@dataclass(slots=True, eq=False)
class OpenPartition:
    """A partition whose file is open and whose events are followed.

    Attributes:
        name: its number with two digits.
        file: its file.
        follower: delivers its events.
        quarantine: isolates its poison.
        metrics: of the partition.
        log: with the partition in each line.
        fail: called with the error that removes it from the rounds.
        busy_at: time of its last commit, on :func:`time.monotonic`.
        in_progress: done when the current batch is; None without one.
        progressed: whether it has committed anything since it joined the rounds.
    """

    name: str
    file: PartitionFile
    follower: Follower
    quarantine: Quarantine
    metrics: PartitionMetrics
    log: FilteringBoundLogger
    fail: Callable[[Exception], None]
    busy_at: float = 0.0
    in_progress: asyncio.Future[None] | None = None
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
class PartitionBatch:
    """The events of one partition in a round, and what became of them.

    Attributes:
        of: the partition.
        deliveries: as they came; at least one.
        events: those that can be written, with their positions in the log.
        poison: the others, with the reason.
        persisted: number of events that are new in the corpus.
        duplicates: number of events that it held already, body included.
        conflicts: events that are kept under /conflicts.
        consultations: number of consultations with new events.
        outcomes: by sequence, of each delivery that is not a new event.
        error: why the partition left the round.
    """

    of: OpenPartition
    deliveries: list[Delivery]
    events: list[tuple[int, Event]] = field(default_factory=list)
    poison: list[tuple[Delivery, str]] = field(default_factory=list)
    persisted: int = 0
    duplicates: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    consultations: int = 0
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def size(self) -> int:
        """Bytes of the bodies."""
        return sum(len(delivery.body) for delivery in self.deliveries)

    @property
    def oldest_ns(self) -> int | None:
        """When ingest received the oldest event, nanoseconds since the Unix epoch."""
        return min((event.received_ns for _, event in self.events), default=None)

    # -- the five steps: decode, append and commit run in threads, the others in the event loop ------------------------

    def decode(self) -> None:
        """Separate events from poison."""
        for delivery in self.deliveries:
            reason = self.of.quarantine.known.get(delivery.sequence)
            if reason is None:
                try:
                    event = decode(delivery.consultation, delivery.headers, delivery.body)
                    self.events.append((delivery.sequence, event))
                    continue
                except PoisonError as error:
                    reason = str(error)
            self.poison.append((delivery, reason))
            self.outcomes[delivery.sequence] = Outcome(Fate.POISON)

    def append(self, written_ns: int) -> None:
        """Write the events that the corpus does not hold, with the time *written_ns*, nanoseconds since the Unix epoch.

        Raises:
            PlacementError: the file was deleted or replaced.
            CorpusError: the file must be abandoned and opened again.
        """
        self.of.file.check_in_place()
        by_consultation: dict[str, list[tuple[int, Event]]] = {}
        for numbered in self.events:
            by_consultation.setdefault(numbered[1].consultation, []).append(numbered)
        for consultation, events in by_consultation.items():
            self._append(self.of.file.store, consultation, events, written_ns)

    async def set_aside(self) -> None:
        """Store the poison in ``fi-dead``, if there is any."""
        if self.poison:
            await self.of.quarantine.store(self.deliveries, self.poison)

    def commit(self) -> None:
        """Make the batch durable, together with the position that it reaches.

        Raises CorpusError: whether it was committed shows when the file is opened again.
        """
        last = self.deliveries[-1]
        self.of.file.store.commit(last.sequence, message_id_at(last.headers))
        self.of.quarantine.committed += len(self.deliveries)

    async def acknowledge(self) -> None:
        """Report to the log that everything up to here is safe, and what became of it."""
        await self.of.follower.acknowledge(self.deliveries[-1], self.outcomes)

    def _append(
        self, store: EventStore, consultation: str, events: Sequence[tuple[int, Event]], written_ns: int
    ) -> None:
        held = store.held(consultation, {event.event_id.bytes for _, event in events})
        new: dict[bytes, Record] = {}
        conflicts: list[Conflict] = []
        for sequence, event in events:
            event_id = event.event_id.bytes
            if (earlier := new.get(event_id)) is not None:
                first, same = earlier.sequence, earlier.body == event.body
            elif (row := held.get(event_id)) is not None:
                first = row.sequence
                if first == sequence:  # this very delivery was committed before a crash
                    self.duplicates += 1
                    continue
                same = _same_body(store, consultation, row, event.body)
            else:
                new[event_id] = _record(sequence, event, written_ns)
                continue
            self.outcomes[sequence] = Outcome(Fate.DUPLICATE if same else Fate.CONFLICT, first)
            # a writer that waits for the outcome is refused: its conflict is not kept
            if same or self.of.follower.writers_wait or _is_known_conflict(store, consultation, event):
                self.duplicates += 1
            else:
                conflicts.append(Conflict(sequence, event, first))
        store.append(consultation, list(new.values()))
        store.append_conflicts(consultation, [_record(one.sequence, one.event, written_ns) for one in conflicts])
        self.conflicts += conflicts
        self.persisted += len(new)
        self.consultations += bool(new)


class Rounds:
    """The rounds of one process.

    Args:
        hdf5: the one thread that touches HDF5.
        metrics: of this process.
        max_events: of one round, all partitions together.
        max_bytes: of their bodies, approximately.
        spans: makes spans of the batches; None when tracing is off.
    """

    def __init__(
        self,
        hdf5: Hdf5Thread,
        metrics: PersisterMetrics,
        *,
        max_events: int,
        max_bytes: int,
        spans: Spans | None = None,
    ) -> None:
        self.hdf5 = hdf5
        self._metrics = metrics
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._spans = spans
        self._joined: dict[str, OpenPartition] = {}
        self._arrived = asyncio.Event()
        self._enough = asyncio.Event()
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._ready = 0
        self._next_at = 0.0
        self._cost = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._committers = ThreadPoolExecutor(COMMITTERS, thread_name_prefix="commit")

    def join(self, one: OpenPartition) -> None:
        """Include the events of *one* in the rounds."""
        self._joined[one.name] = one
        self.arrived()

    async def leave(self, one: OpenPartition) -> None:
        """Take no more events of *one*, and wait until its current batch is acknowledged or has failed."""
        if self._joined.get(one.name) is one:
            del self._joined[one.name]
        if one.in_progress is not None:
            await asyncio.wait({one.in_progress})

    def arrived(self) -> None:
        """Note that a follower has received an event."""
        self._ready += 1
        self._arrived.set()
        if self._ready >= self._max_events:
            self._enough.set()

    def hold(self, held: bool) -> None:
        """Begin no further round while *held*: events wait in the log, and what is committed stays readable."""
        if held:
            self._allowed.clear()
        else:
            self._allowed.set()

    async def run(self) -> None:
        """Make rounds until cancelled. That abandons a round which has begun: let all partitions leave first."""
        while True:
            await self._arrived.wait()
            await self._pause()
            await self._allowed.wait()
            self._arrived.clear()
            self._enough.clear()
            self._ready = 0
            began = time.monotonic()
            batches, full = self._take()
            if not batches:
                continue
            await self._round(batches)
            at_once = full or any(batch.of.follower.writers_wait for batch in batches)
            self._next_at = 0.0 if at_once else began + min(LONGEST_SECONDS, self._cost / SHARE)
            if full:
                self._arrived.set()

    async def _pause(self) -> None:
        """Wait until the next round is due, or as many events wait as a round takes."""
        left = self._next_at - time.monotonic()
        if left > 0:
            try:
                async with asyncio.timeout(left):
                    await self._enough.wait()
            except TimeoutError:
                return

    def _take(self) -> tuple[list[PartitionBatch], bool]:
        """Return a batch of each partition that has events, in equal parts, and whether any were left."""
        waiting = [one for one in self._joined.values() if one.in_progress is None and one.follower.ready]
        waiting.sort(key=lambda one: one.follower.ready)
        events, size, full = self._max_events, self._max_bytes, False
        batches = []
        for left, one in zip(range(len(waiting), 0, -1), waiting, strict=True):
            most = 1 if one.quarantine.one_by_one else max(1, events // left)
            deliveries = one.follower.take(max_events=most, max_bytes=max(1, size // left))
            if not deliveries:
                continue
            batch = PartitionBatch(one, deliveries)
            one.in_progress = asyncio.get_running_loop().create_future()
            events, size = max(1, events - len(deliveries)), max(1, size - batch.size)
            full = full or one.follower.ready > 0
            batches.append(batch)
        return batches, full

    async def _round(self, batches: list[PartitionBatch]) -> None:
        """Decode and append *batches*, then finish them; a batch with poison does not hold up the others."""
        began, self._cost = time.perf_counter(), 0.0
        written_ns = time.time_ns()
        await self._in_hdf5(batches, PartitionBatch.decode, lambda batch: batch.append(written_ns))
        for batch in batches:
            if batch.poison:
                spawn(self._tasks, self._finish([batch], began))
        await self._finish([batch for batch in batches if not batch.poison], began)

    async def _finish(self, batches: list[PartitionBatch], began: float) -> None:
        """Set aside, commit and acknowledge *batches*."""
        await _each(batches, PartitionBatch.set_aside)
        await self._in_hdf5(batches, PartitionBatch.commit, parallel=True)
        await _each(batches, PartitionBatch.acknowledge)
        for batch in batches:
            self._done(batch)
        self._report([batch for batch in batches if batch.error is None], time.perf_counter() - began)

    async def _in_hdf5(
        self, batches: Sequence[PartitionBatch], *steps: Callable[[PartitionBatch], None], parallel: bool = False
    ) -> None:
        """Do *steps* for each batch that has not failed, in one job of the HDF5 thread; *parallel*: a thread each."""

        def do_steps(batch: PartitionBatch) -> float:
            started = time.thread_time()
            try:
                for step in steps:
                    if batch.error is None:
                        step(batch)
            except Exception as error:  # noqa: BLE001 - the partition leaves the round, the others go on
                batch.error = error
            return time.thread_time() - started

        def work() -> float:
            return sum((self._committers.map if parallel and len(batches) > 1 else map)(do_steps, batches))

        if not batches:
            return
        try:
            self._cost += await self.hdf5.run(work)
        except Exception as error:  # noqa: BLE001 - whatever it was, each of them opens its file again
            for batch in batches:
                batch.error = batch.error or error

    def _done(self, batch: PartitionBatch) -> None:
        one, error = batch.of, batch.error
        if error is None:
            one.busy_at, one.progressed = time.monotonic(), True
            if one.quarantine.one_by_one:
                one.quarantine.succeeded(batch.deliveries)
            if batch.conflicts:
                spawn(self._tasks, _announce(batch))
        else:
            if self._joined.get(one.name) is one:
                del self._joined[one.name]
            if not isinstance(error, _NOT_THE_MESSAGE):
                one.quarantine.failed(batch.deliveries, error)
            one.fail(error)
        assert one.in_progress is not None
        one.in_progress.set_result(None)
        one.in_progress = None
        if one.follower.ready:
            self.arrived()  # while the batch was in progress

    def _report(self, batches: Sequence[PartitionBatch], seconds: float) -> None:
        if not batches:
            return
        for batch in batches:
            batch.of.metrics.batch(batch)
            show_traces(batch, seconds, self._spans)
        events = sum(len(batch.deliveries) for batch in batches)
        self._metrics.batch_events.observe(events)
        self._metrics.batch_seconds.observe(seconds)
        oldest = min((ns for batch in batches if (ns := batch.oldest_ns) is not None), default=None)
        age = None if oldest is None else max(0.0, time.time() - oldest / 1e9)
        if age is not None:
            self._metrics.event_age_seconds.observe(age)
        _log.info(
            logs.EVENT_PERSISTED,
            partitions=",".join(batch.of.name for batch in batches),
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


async def _each(batches: Sequence[PartitionBatch], step: Callable[[PartitionBatch], Coroutine[Any, Any, None]]) -> None:
    """Do *step* for each batch that has not failed."""
    for batch in batches:
        if batch.error is None:
            try:
                await step(batch)
            except Exception as error:  # noqa: BLE001 - the partition leaves the round, the others go on
                batch.error = error


async def _announce(batch: PartitionBatch) -> None:
    """List committed conflicts in ``fi-dead``; the events are safe in the corpus, so nothing waits for this."""
    one, conflicts = batch.of, batch.conflicts
    listed = [(conflict.event.consultation, conflict.sequence, conflict.first) for conflict in conflicts]
    try:
        await one.quarantine.dead_letters.list_conflicts(listed)
    except (FiqError, OSError) as error:
        one.log.warning("CONFLICTS_NOT_ANNOUNCED", events=len(conflicts), **described(error))
    first = conflicts[0]
    headers = next(delivery.headers for delivery in batch.deliveries if delivery.sequence == first.sequence)
    one.log.warning(
        "EVENT_KEYS_REUSED",
        events=len(conflicts),
        sequence=first.sequence,
        first_sequence=first.first,
        **trace_id_in(headers),
    )


def _record(sequence: int, event: Event, written_ns: int) -> Record:
    return Record(sequence, event.received_ns, written_ns, event.event_id.bytes, event.body)


def _same_body(store: EventStore, consultation: str, row: StoredRow, body: bytes) -> bool:
    if row.length != len(body):
        return False
    with store.reading() as lookup:
        stored = lookup.consultation(consultation)
        return stored is not None and stored.body(row) == body


def _is_known_conflict(store: EventStore, consultation: str, event: Event) -> bool:
    """Return whether this very event is already kept under /conflicts."""
    event_id = event.event_id.bytes
    if event_id not in store.held_conflicts(consultation, {event_id}):
        return False
    with store.reading(conflicts=True) as lookup:
        stored = lookup.consultation(consultation)
        if stored is None:
            return False
        rows = map(stored.row, range(len(stored)))  # two conflicts under one id are rare
        return any(
            row.event_id == event_id and row.length == len(event.body) and stored.body(row) == event.body
            for row in rows
        )
