"""The life of one partition in this process: open its file, follow its events, take part in the rounds, release it.

What fails decides what happens: a transient error abandons the file and starts over after a pause, a permanent one
stops the partition until an operator has acted. How events are written is in :mod:`services.persister.rounds`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from fiq.corpus import (
    CorpusError,
    CorpusLockedError,
    EventStore,
    PermanentCorpusError,
    StoreFailedError,
    StoreStats,
    TransientCorpusError,
)
from fiq.errors import PermanentError, TransientError
from services.core import logs
from services.log.errors import PlacementError
from services.log.partitions import partition_name
from services.log.protocol import Follower, Position
from services.persister.dead_letters import DeadLetters, PoisonLimit, SetAside, Suspects
from services.persister.errors import described, reason_of
from services.persister.metrics import Metrics
from services.persister.partition_file import PartitionFile
from services.persister.rounds import Member, Rounds

#: pauses between attempts after transient failures, seconds; the last one repeats
BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
#: a partition without events for this long is idle, seconds
IDLE_SECONDS = 2.0
#: pause while another process of the volume still holds the partition, seconds
HANDOVER_PAUSE_SECONDS = 0.1
#: a handover takes this long at most: whoever holds the partition then does not let go of it, seconds
HANDOVER_SECONDS = 10.0

#: checkpoints that wait for so long are worth a warning, seconds; it is repeated after as long again, doubled each time
WARN_SECONDS = 60.0


class State(StrEnum):
    """What a partition is doing."""

    STARTING = "starting"
    FOLLOWING = "following"
    RETRYING = "retrying"
    STOPPED = "stopped"


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
        open_store: opens the partition's file; runs in the HDF5 thread.
        follower: makes the partition's follower, which calls what it is given whenever something has come.
        dead_letters: where poison goes.
        rounds: of this process.
        metrics: of this process.
        poison_limit: when bad messages are a flood.
        desk: answers questions about the partition while its file is open.
        settle: awaited before the partition is followed, with what its file has.
    """

    def __init__(
        self,
        partition: int,
        *,
        open_store: Callable[[], EventStore],
        follower: Callable[[Callable[[], None]], Follower],
        dead_letters: DeadLetters,
        rounds: Rounds,
        metrics: Metrics,
        poison_limit: PoisonLimit | None = None,
        desk: Answers | None = None,
        settle: Callable[[Position], Awaitable[None]] | None = None,
    ) -> None:
        self.partition = partition
        self.state = State.STARTING
        self.reason = ""
        #: what was proven when :meth:`stop` let go of the file
        self.reached: Position | None = None
        self._file = PartitionFile(open_store)
        self._make_follower = follower
        self._dead_letters = dead_letters
        self._rounds = rounds
        self._metrics = metrics.of(partition)
        self._log = logs.get_logger("runner").bind(partition=partition_name(partition))
        self._checkpoints = CheckpointWatch(self._log)
        self._aside = SetAside(dead_letters, poison_limit or PoisonLimit(), self._metrics, self._log)
        self._suspects = Suspects()
        self._desk = desk
        self._settle = settle
        self._member: Member | None = None
        self._follower: Follower | None = None
        self._waited = 0  # what was known to wait when it was followed last
        self._failures = 0
        self._locked_at = 0.0  # when another process was first found to have the file; 0 when none does
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Begin in a task of its own."""
        self._metrics.queue(lambda: self.waiting, lambda: 0 if self._follower is None else self._follower.delivered)
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
    def position(self) -> Position | None:
        """What the file has reached; None unless the partition is followed just now."""
        store = self._file.store
        if store is None or self.state is not State.FOLLOWING:
            return None
        return Position(store.committed, store.committed_id)

    @property
    def proven(self) -> Position | None:
        """The position, while the log is known to be the one that it belongs to; None otherwise."""
        return None if self._follower is None or self._follower.in_doubt else self.position

    @property
    def committed(self) -> int | None:
        """The stream sequence that the file has reached; None unless the partition is followed just now."""
        position = self.position
        return None if position is None else position.sequence

    @property
    def waiting(self) -> int:
        """Events of the partition that the log has and the file has not, as far as is known."""
        if self._follower is not None:
            self._waited = self._follower.waiting
        return self._waited

    @property
    def disk_wait(self) -> float:
        """For how long the oldest call on a partition file of the process has waited for its answer, seconds."""
        return self._rounds.hdf5.longest

    @property
    def idle_at(self) -> int | None:
        """The committed sequence when nothing came in for a while; None otherwise."""
        if self._member is None or time.monotonic() - self._member.busy_at <= IDLE_SECONDS:
            return None
        return self.committed

    async def advance(self) -> None:
        """Commit up to where it is proven that the partition has no events which are not in its file.

        Raises LogUnavailableError: no proof to be had just now.
        """
        member = self._member
        if member is None or self.state is not State.FOLLOWING:
            return
        position = await member.follower.empty_up_to()
        if position.sequence <= member.store.committed:
            return
        try:
            advanced = await self._rounds.hdf5.run(lambda: self._file.advance(member.store, position))
        except (CorpusError, PlacementError) as error:
            member.follower.interrupt(error)
            return
        if advanced and self._member is member:
            member.follower.advance(position)
            self._metrics.committed(position.sequence)

    async def look_after(self) -> None:
        """Renew the gauges, and bring the partition file up to date for stock readers."""
        member = self._member
        if member is None or self.state is not State.FOLLOWING:
            return
        stats = member.store.stats
        self._metrics.store(stats)
        self._checkpoints.note(stats)
        try:
            await self._rounds.hdf5.run(lambda: self._file.checkpoint(member.store))
        except (CorpusError, PlacementError) as error:
            member.follower.interrupt(error)  # an idle partition must show it too, and open its file again

    def fail(self, error: Exception) -> None:
        """Take the error of a round in which this partition took part, or of its key in the bucket."""
        if self._stopping:
            self._log.warning(logs.EVENT_PERSIST_FAILED, stopping=True, **described(error))
        elif self._follower is not None:
            self._follower.interrupt(error)

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
        store = await self._rounds.hdf5.run(self._file.open)
        self._locked_at = 0.0
        self._metrics.committed(store.committed)
        if self._desk is not None:
            await self._desk.open(self.partition, self._file, store)
        position = Position(store.committed, store.committed_id)
        if self._settle is not None:
            await self._settle(position)
        follower = self._follower = self._make_follower(self._rounds.arrived)
        await follower.start(position)
        member = self._member = Member(
            self.partition,
            self._file,
            store,
            follower,
            self._aside,
            self._suspects,
            self._dead_letters,
            self._metrics,
            self._log,
            fail=self.fail,
            busy_at=time.monotonic(),
        )
        self._change(State.FOLLOWING)
        self._log.info(logs.EVENT_WORKER_STARTED, committed=store.committed)
        self._rounds.join(member)
        try:
            await follower.run()
        finally:
            await self._rounds.leave(member)
            if member.progressed:
                self._failures = 0

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
        """Let go of the follower, then of the file; with *abandon* what is not committed may be what went wrong."""
        if self._desk is not None:
            await self._desk.close(self.partition)
        self.reached = None if abandon else self.proven
        self._member = None
        self._waited = self.waiting
        follower, self._follower = self._follower, None
        if follower is not None:
            try:
                await follower.close()
            except Exception as error:  # noqa: BLE001 - the file must be released whatever the broker does
                self._log.warning("FOLLOWER_CLOSE_FAILED", **described(error))
        for failure in await self._rounds.hdf5.run(lambda: self._file.close(abandon=abandon)):
            self._log.warning("PARTITION_CLOSE_FAILED", **described(failure))

    def _change(self, state: State, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._metrics.state(state)


class CheckpointWatch:
    """Follows the stats of one partition's store.

    Args:
        log: bound to the partition.
    """

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._warn_after = WARN_SECONDS
        self._compactions = 0

    def note(self, stats: StoreStats) -> None:
        """Look at the *stats* as they are now; call it every second or so."""
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
