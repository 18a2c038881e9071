"""One partition in this process: open its file, follow its events, take part in the rounds, release the file.

:class:`PartitionRunner` repeats this until it is stopped::

    open the file → answer questions about it → check the log → follow from the committed position → join the rounds

An error ends one repetition. A transient error, and one that is not ours, abandons the file and starts again after a
pause; a permanent one stops the partition until an operator acts. :mod:`services.persister.rounds` writes the events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum

from structlog.typing import FilteringBoundLogger

from fiq.corpus import (
    CorpusError,
    CorpusLockedError,
    EventStore,
    PermanentCorpusError,
    StoreStats,
    TransientCorpusError,
)
from fiq.errors import PermanentError, TransientError
from services.core import logs
from services.log.errors import PlacementError
from services.log.partitions import partition_name
from services.log.protocol import Follower, Position
from services.persister.answering import QuestionResponder
from services.persister.dead_letters import DeadLetters, PoisonLimit, Quarantine
from services.persister.errors import described, reason_of
from services.persister.metrics import PersisterMetrics
from services.persister.rounds import OpenPartition, PartitionFile, Rounds

#: pauses between attempts after transient failures, seconds; the last one repeats
BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
#: a partition without events for this long is idle, seconds
IDLE_SECONDS = 2.0
#: pause while another process of the volume still holds the partition, seconds
HANDOVER_PAUSE_SECONDS = 0.1
#: a process that holds a partition for longer than this is not handing it over, seconds
HANDOVER_SECONDS = 10.0
#: the first warning comes when checkpoints have waited this long, the next at twice the time and so on, seconds
WARN_SECONDS = 60.0


class RunnerState(StrEnum):
    """What a partition is doing."""

    STARTING = "starting"
    FOLLOWING = "following"
    RETRYING = "retrying"
    STOPPED = "stopped"


class PartitionRunner:
    """One partition of this process.

    Args:
        partition: its number.
        open_store: opens the partition's store; runs in the HDF5 thread.
        follower: makes the partition's follower; the follower calls the argument whenever an event has arrived.
        dead_letters: where the partition's poison is stored.
        rounds: of this process.
        metrics: of this process.
        poison_limit: how much poison stops the partition.
        responder: answers questions about the partition while its file is open.
        check_log: awaited with the file's position before the partition is followed.

    Attributes:
        state: what the partition is doing.
        reason: why it is not being followed; empty when it is.
        released_at: the verified position when :meth:`stop` released the file; None when there was none.
    """

    def __init__(
        self,
        partition: int,
        *,
        open_store: Callable[[], EventStore],
        follower: Callable[[Callable[[], None]], Follower],
        dead_letters: DeadLetters,
        rounds: Rounds,
        metrics: PersisterMetrics,
        poison_limit: PoisonLimit | None = None,
        responder: QuestionResponder | None = None,
        check_log: Callable[[Position], Awaitable[None]] | None = None,
    ) -> None:
        self.partition = partition
        self.state = RunnerState.STARTING
        self.reason = ""
        self.released_at: Position | None = None
        self._open_store = open_store
        self._make_follower = follower
        self._rounds = rounds
        self._metrics = metrics.of(partition)
        self._responder = responder
        self._check_log = check_log
        self._name = partition_name(partition)
        self._log = logs.get_logger("runner").bind(partition=self._name)
        self._checkpoints = CheckpointWatch(self._log)
        self._quarantine = Quarantine(dead_letters, poison_limit or PoisonLimit(), self._metrics, self._log)
        self._file: PartitionFile | None = None
        self._follower: Follower | None = None
        self._joined: OpenPartition | None = None
        self._waiting = 0  # as of the last follower
        self._failures = 0
        self._locked_since = 0.0  # when the file was first found locked by another process; 0 when it is not
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Start to run the partition in a task."""
        self._metrics.queue(lambda: self.waiting, lambda: 0 if self._follower is None else self._follower.delivered)
        self._task = asyncio.create_task(self._run(), name=f"partition {self.partition}")

    async def stop(self) -> None:
        """Finish the current batch, commit, acknowledge, checkpoint and release the partition."""
        if self._task is None:
            return
        if not self._stopping:
            self._stopping = True
            self._task.cancel()
        # not awaited itself: a cancelled caller must neither cancel it again nor lose its own cancellation
        await asyncio.wait({self._task})

    @property
    def holds_file(self) -> bool:
        """Whether no other process can have the partition's file."""
        return self._file is not None

    @property
    def position(self) -> Position | None:
        """The position that the file has reached; None while the partition is not followed."""
        if self._file is None or self.state is not RunnerState.FOLLOWING:
            return None
        return Position(self._file.store.committed, self._file.store.committed_id)

    @property
    def verified(self) -> Position | None:
        """The position if it is known to belong to the log that is followed; None otherwise."""
        return None if self._follower is None or self._follower.in_doubt else self.position

    @property
    def committed(self) -> int | None:
        """The stream sequence that the file has reached; None while the partition is not followed."""
        position = self.position
        return None if position is None else position.sequence

    @property
    def conflicts(self) -> int:
        """Events under used ids that the file keeps; 0 while the partition is not followed."""
        return 0 if self._file is None or self.position is None else self._file.store.conflicts

    @property
    def waiting(self) -> int:
        """How many events of the partition are in the log and not in the file, as far as known."""
        if self._follower is not None:
            self._waiting = self._follower.waiting
        return self._waiting

    @property
    def disk_wait(self) -> float:
        """How long the oldest pending call in the HDF5 thread has waited, seconds."""
        return self._rounds.hdf5.longest

    @property
    def idle_at(self) -> int | None:
        """The committed sequence when no event has arrived for :data:`IDLE_SECONDS`; None otherwise."""
        if self._joined is None or time.monotonic() - self._joined.busy_at <= IDLE_SECONDS:
            return None
        return self.committed

    async def advance(self) -> None:
        """Move the committed position up to where the log certainly has no further events of the partition.

        Raises LogUnavailableError: the log did not answer.
        """
        joined, file = self._joined, self._file
        if joined is None or file is None or self.state is not RunnerState.FOLLOWING:
            return
        position = await joined.follower.empty_up_to()
        if position.sequence <= file.store.committed:
            return
        try:
            advanced = await self._rounds.hdf5.run(lambda: file.advance(position))
        except (CorpusError, PlacementError) as error:
            joined.follower.interrupt(error)
            return
        if advanced and self._joined is joined:
            joined.follower.advance(position)
            self._metrics.committed(position.sequence)

    async def maintain(self) -> None:
        """Update the gauges, and make a checkpoint if one is due, so that stock readers see recent events."""
        joined, file = self._joined, self._file
        if joined is None or file is None or self.state is not RunnerState.FOLLOWING:
            return
        stats = file.store.stats
        self._metrics.store(stats)
        self._checkpoints.update(stats)
        try:
            await self._rounds.hdf5.run(file.checkpoint)
        except (CorpusError, PlacementError) as error:
            joined.follower.interrupt(error)  # an idle partition must notice it too, and open its file again

    def fail(self, error: Exception) -> None:
        """End the current repetition with *error*: of a round, or because the placement changed."""
        if self._stopping:
            self._log.warning(logs.EVENT_PERSIST_FAILED, stopping=True, **described(error))
        elif self._follower is not None:
            self._follower.interrupt(error)

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._follow()
                except (PermanentError, PermanentCorpusError) as error:
                    await self._stop_for_good(error)
                    return
                except Exception as error:  # noqa: BLE001 - whatever it is, the partition must show it and try again
                    await self._pause(error)
        finally:
            await self._release()

    async def _follow(self) -> None:
        self._change(RunnerState.RETRYING if self.reason else RunnerState.STARTING, self.reason)
        file = await self._rounds.hdf5.run(self._open_file)
        self._locked_since = 0.0
        position = Position(file.store.committed, file.store.committed_id)
        self._metrics.committed(position.sequence)
        if self._responder is not None:
            await self._responder.open(self.partition, file)
        if self._check_log is not None:
            await self._check_log(position)
        follower = self._follower = self._make_follower(self._rounds.arrived)
        await follower.start(position)
        joined = self._joined = OpenPartition(
            *(self._name, file, follower, self._quarantine, self._metrics, self._log, self.fail),
            busy_at=time.monotonic(),
        )
        self._change(RunnerState.FOLLOWING)
        self._log.info(logs.EVENT_WORKER_STARTED, committed=position.sequence)
        self._rounds.join(joined)
        try:
            await follower.run()
        finally:
            await self._rounds.leave(joined)
            if joined.progressed:
                self._failures = 0

    def _open_file(self) -> PartitionFile:
        # assigned in the HDF5 thread: when the caller is cancelled meanwhile, _release must still find the file
        file = self._file = PartitionFile(self._open_store())
        return file

    async def _pause(self, error: Exception) -> None:
        await self._release(abandon=True)
        if self._is_handover(error):
            pause = HANDOVER_PAUSE_SECONDS
        else:
            pause = BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)]
            self._failures += 1
            transient = isinstance(error, TransientError | TransientCorpusError)
            self._metrics.failed("transient" if transient else "unexpected")
            self._log.warning(logs.EVENT_PERSIST_FAILED, retry_in_s=pause, **described(error))
        self._change(RunnerState.RETRYING, reason_of(error))
        await asyncio.sleep(pause)

    def _is_handover(self, error: Exception) -> bool:
        """Return whether another process has the file and is probably about to release it."""
        if not isinstance(error, CorpusLockedError):
            return False
        self._locked_since = self._locked_since or time.monotonic()
        return time.monotonic() - self._locked_since < HANDOVER_SECONDS

    async def _stop_for_good(self, error: Exception) -> None:
        await self._release(abandon=True)
        self._metrics.failed("permanent")
        self._log.error(logs.EVENT_PERSIST_FAILED, stopped=True, **described(error))
        self._change(RunnerState.STOPPED, reason_of(error))

    async def _release(self, *, abandon: bool = False) -> None:
        """Close the follower, then the file; *abandon* what is not committed, since it may be what failed."""
        if self._responder is not None:
            await self._responder.close(self.partition)
        self.released_at = None if abandon else self.verified
        self._joined = None
        self._waiting = self.waiting
        follower, self._follower = self._follower, None
        if follower is not None:
            try:
                await follower.close()
            except Exception as error:  # noqa: BLE001 - the file must be released whatever the broker does
                self._log.warning("FOLLOWER_CLOSE_FAILED", **described(error))
        file, self._file = self._file, None
        if file is not None:
            for failure in await self._rounds.hdf5.run(lambda: file.close(abandon=abandon)):
                self._log.warning("PARTITION_CLOSE_FAILED", **described(failure))

    def _change(self, state: RunnerState, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._metrics.state(state)


class CheckpointWatch:
    """Warns when the checkpoints of a partition are put off for a long time, and when its journal is compacted.

    Args:
        log: with the partition in each line.
    """

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._warn_after = WARN_SECONDS
        self._compactions = 0

    def update(self, stats: StoreStats) -> None:
        """Log what is remarkable in the current *stats*; to be called every few seconds."""
        waiting = stats.checkpoint_waiting_seconds
        if waiting >= self._warn_after:
            self._warn_after = 2 * waiting
            self._log.warning(
                "CHECKPOINTS_HELD_BACK",
                reason=stats.checkpoint_deferred_because,
                waiting_s=round(waiting),
                journal_bytes=stats.journal_bytes,
            )
        elif not waiting and self._warn_after > WARN_SECONDS:
            self._warn_after = WARN_SECONDS
            self._log.info("CHECKPOINTS_GO_ON", journal_bytes=stats.journal_bytes)
        if stats.compactions > self._compactions:
            self._log.warning("JOURNAL_COMPACTED", times=stats.compactions, journal_bytes=stats.journal_bytes)
        self._compactions = stats.compactions
