"""Runs one partition: fetch a batch, drop what the corpus holds, write, commit, acknowledge the last.

The order is the guarantee. A dead letter is stored before its message counts as done, a commit is durable before its
acknowledgement is sent, and the committed sequence lies in the same commit as the events. So a crash anywhere leads
to the same events again, and the corpus drops what it holds.

What fails decides what happens: a transient error abandons the file and starts over after a pause, a permanent one
stops the partition until an operator has acted, a poison message is set aside.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from services.contract import logs
from services.contract.errors import FiqError, PermanentError, TransientError
from services.corpus import (
    CorpusError,
    CorpusLockedError,
    EventStore,
    PermanentCorpusError,
    StoreFailedError,
    TransientCorpusError,
)
from services.eventlog.errors import PlacementError
from services.eventlog.partitions import partition_name
from services.eventlog.protocol import Delivery, Follower
from services.persister.batch import Sorted, Written
from services.persister.checkpoints import CheckpointWatch
from services.persister.dead_letters import DeadLetters, PoisonLimit
from services.persister.hdf5_thread import Calls
from services.persister.metrics import Metrics
from services.persister.partition_file import PartitionFile
from services.persister.reasons import described, reason_of
from services.persister.reused import Allowance, ReusedKeys
from services.persister.set_aside import SetAside
from services.persister.suspects import Suspects
from services.persister.traces import Traces

#: pauses between attempts after transient failures, seconds; the last one repeats
BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
#: a partition without events for this long is idle, seconds
IDLE_SECONDS = 2.0
#: pause while another process of the volume still holds the partition, seconds
HANDOVER_PAUSE_SECONDS = 0.1
#: a handover takes this long at most: whoever holds the partition then does not let go of it, seconds
HANDOVER_SECONDS = 10.0


class State(StrEnum):
    """What a partition is doing."""

    STARTING = "starting"
    FOLLOWING = "following"
    RETRYING = "retrying"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is committed together.

    Attributes:
        events: events in a batch, at most.
        size: bytes of bodies in a batch, about, at most.
    """

    events: int
    size: int


class Answers(Protocol):
    """Answers questions about partitions whose files are open."""

    async def open(self, partition: int, file: PartitionFile, store: EventStore) -> None:
        """Answer for *partition* from now on."""
        ...

    async def close(self, partition: int) -> None:
        """Answer for it no more. Idempotent."""
        ...


class PartitionRunner:
    """One partition of this process.

    Args:
        partition: its number.
        open_store: opens the partition's file; runs in *hdf5*.
        follower: makes the partition's follower.
        dead_letters: where poison goes.
        hdf5: the one thread that touches HDF5.
        limits: how much is committed together.
        metrics: of this process.
        traces: shows which traces came with a batch.
        poison_limit: when bad messages are a flood.
        allowance: how many events under used keys are copied whole.
        desk: answers questions about the partition while its file is open.
    """

    def __init__(
        self,
        partition: int,
        *,
        open_store: Callable[[], EventStore],
        follower: Callable[[], Follower],
        dead_letters: DeadLetters,
        hdf5: Executor,
        limits: Limits,
        metrics: Metrics,
        traces: Traces | None = None,
        poison_limit: PoisonLimit | None = None,
        allowance: Allowance | None = None,
        desk: Answers | None = None,
    ) -> None:
        self.partition = partition
        self.state = State.STARTING
        self.reason = ""
        self._file = PartitionFile(open_store)
        self._make_follower = follower
        self._limits = limits
        self._metrics = metrics.of(partition)
        self._log = logs.get_logger("runner").bind(partition=partition_name(partition))
        self._traces = traces or Traces()
        self._checkpoints = CheckpointWatch(self._log)
        self._aside = SetAside(dead_letters, poison_limit or PoisonLimit(), self._metrics, self._log)
        self._reused = ReusedKeys(dead_letters, self._metrics, self._log, allowance or Allowance())
        self._desk = desk
        self._follower: Follower | None = None
        self._suspects = Suspects()
        self._failures = 0
        self._locked_at = 0.0  # when another process was first found to have the file; 0 when none does
        self._busy_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._calls = Calls(hdf5)

    def start(self) -> None:
        """Begin in a task of its own."""
        self._task = asyncio.create_task(self._run(), name=f"partition {self.partition}")

    async def stop(self) -> None:
        """Finish the batch in hand, commit, acknowledge, checkpoint and release the partition."""
        if self._task is None:
            return
        if not self._stopping:
            self._stopping = True
            self._task.cancel()
        # whoever waits here may be cancelled: that must neither cancel the task a second time nor get lost
        await asyncio.wait({self._task})

    @property
    def committed(self) -> int | None:
        """The stream sequence that the file has reached; None unless the partition is followed just now."""
        store = self._file.store
        return store.committed if store is not None and self.state is State.FOLLOWING else None

    @property
    def disk_wait(self) -> float:
        """For how long the oldest call on the partition's file has waited for its answer, seconds; 0 without one."""
        return self._calls.longest

    @property
    def idle_at(self) -> int | None:
        """The committed sequence when nothing came in for a while; None otherwise."""
        if self._file.store is None or self.state is not State.FOLLOWING:
            return None
        return self._file.store.committed if time.monotonic() - self._busy_at > IDLE_SECONDS else None

    async def advance(self, sequence: int) -> None:
        """Commit that the partition has no events up to *sequence* that are not in its file: it must be proved."""
        store, follower = self._file.store, self._follower
        if store is None or follower is None or self.state is not State.FOLLOWING:
            return
        try:
            advanced = await self._calls.run(lambda: self._file.advance(store, sequence))
        except (CorpusError, PlacementError) as error:
            follower.interrupt(error)
            return
        if advanced and self._file.store is store:
            follower.advance(sequence)
            self._metrics.committed(sequence)

    async def look_after(self) -> None:
        """Renew the gauges, and bring the partition file up to date for stock readers when nothing comes in."""
        store, follower = self._file.store, self._follower
        if store is None or follower is None or self.state is not State.FOLLOWING:
            return
        stats = store.stats
        self._metrics.store(stats)
        self._checkpoints.note(stats)
        try:
            await self._calls.run(lambda: self._file.checkpoint(store))
        except (CorpusError, PlacementError) as error:
            follower.interrupt(error)  # an idle partition must show it too, and open its file again

    # -- life ---------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._follow()
                except (TransientError, TransientCorpusError, StoreFailedError) as error:
                    await self._pause(error)
                except (PermanentError, PermanentCorpusError) as error:
                    await self._stop_for_good(error)
                    return
                except Exception as error:  # noqa: BLE001 - whatever it is, the partition must show it and go on
                    await self._pause(error)
        finally:
            await self._release()

    async def _follow(self) -> None:
        self._change(State.RETRYING if self.reason else State.STARTING, self.reason)
        store = await self._calls.run(self._file.open)
        self._locked_at = 0.0
        self._metrics.committed(store.committed)
        if self._desk is not None:
            await self._desk.open(self.partition, self._file, store)
        self._follower = self._make_follower()
        await self._follower.start(store.committed)
        self._busy_at = time.monotonic()
        self._change(State.FOLLOWING)
        self._log.info(logs.EVENT_WORKER_STARTED, committed=store.committed)
        while True:
            batch = await self._follower.batch(
                max_events=1 if self._suspects.singly else self._limits.events, max_bytes=self._limits.size
            )
            work = asyncio.create_task(self._persist(batch))
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait({work})
                if not work.cancelled() and (error := work.exception()) is not None:
                    self._log.warning(logs.EVENT_PERSIST_FAILED, stopping=True, **described(error))
                raise

    async def _pause(self, error: Exception) -> None:
        await self._release(abandon=True)
        if self._is_handover(error):
            pause = HANDOVER_PAUSE_SECONDS
        else:
            pause = BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)]
            self._failures += 1
            self._metrics.failed(
                "transient" if isinstance(error, TransientError | TransientCorpusError) else "unexpected"
            )
            self._log.warning(logs.EVENT_PERSIST_FAILED, retry_in_s=pause, **described(error))
        self._change(State.RETRYING, reason_of(error))
        await asyncio.sleep(pause)

    def _is_handover(self, error: Exception) -> bool:
        """Tell whether another process has the file and may be about to let go of it."""
        if not isinstance(error, CorpusLockedError):
            return False
        self._locked_at = self._locked_at or time.monotonic()
        return time.monotonic() - self._locked_at < HANDOVER_SECONDS

    async def _stop_for_good(self, error: Exception) -> None:
        await self._release(abandon=True)
        self._metrics.failed("permanent")
        self._log.error(logs.EVENT_PERSIST_FAILED, stopped=True, **described(error))
        self._change(State.STOPPED, reason_of(error))

    async def _release(self, *, abandon: bool = False) -> None:
        """Let go of the consumer, then of the file; with *abandon* what is not committed may be what went wrong."""
        if self._desk is not None:
            await self._desk.close(self.partition)
        follower, self._follower = self._follower, None
        if follower is not None:
            try:
                await follower.close()
            except Exception as error:  # noqa: BLE001 - the file must be released whatever the broker does
                self._log.warning("FOLLOWER_CLOSE_FAILED", **described(error))
        for failure in await self._calls.run(lambda: self._file.close(abandon=abandon)):
            self._log.warning("PARTITION_CLOSE_FAILED", **described(failure))

    def _change(self, state: State, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._metrics.state(state)

    # -- one batch ----------------------------------------------------------------------------------------------------

    async def _persist(self, batch: list[Delivery]) -> None:
        started = time.perf_counter()
        store, follower = self._file.store, self._follower
        if store is None or follower is None:
            raise RuntimeError("no store is open")
        reached = batch[-1].sequence
        try:
            sorted_, written = await self._calls.run(lambda: self._file.take(store, batch, self._suspects.condemned))
            if written is None:
                await self._aside.poison_of(batch, sorted_)
                written = await self._calls.run(lambda: self._file.write(store, sorted_.events, reached))
            else:
                self._aside.none_of(batch)
            if written.reused:
                await self._reused.set_aside(batch, written.reused)
                await self._calls.run(lambda: self._file.commit(store, written, reached))
        except (FiqError, TransientCorpusError, PermanentCorpusError, StoreFailedError):
            raise
        except (OSError, MemoryError):  # the machine's trouble, not the message's
            raise
        except Exception as error:
            self._suspects.failed(batch, error)
            raise
        await follower.acknowledge(batch[-1])
        self._busy_at = time.monotonic()
        self._failures = 0
        self._suspects.passed(batch)
        self._report(batch, sorted_, written, time.perf_counter() - started)
        await self._calls.run(store.maybe_checkpoint)

    def _report(self, batch: list[Delivery], sorted_: Sorted, written: Written, seconds: float) -> None:
        oldest = min((event.received_ns for _, event in sorted_.events), default=None)
        size = sum(len(delivery.body) for delivery in batch)
        self._metrics.committed(batch[-1].sequence)
        self._metrics.batch(len(batch), size, written, seconds, oldest)
        self._log.info(
            logs.EVENT_PERSISTED,
            first_sequence=batch[0].sequence,
            last_sequence=batch[-1].sequence,
            persisted=written.persisted,
            duplicates=written.duplicates,
            dead=len(sorted_.poison) + len(written.reused),
            consultations=written.consultations,
            bytes=size,
            duration_s=round(seconds, 6),
            age_s=None if oldest is None else round(max(0.0, time.time() - oldest / 1e9), 6),
        )
        self._traces.show(self._log, partition_name(self.partition), sorted_, written, seconds)
