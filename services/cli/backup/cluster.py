"""What the cluster knows of a store's placements, their history included, and the fence that changes them.

``backup`` compares files with it; ``restore`` and ``give-up`` decide by it what is lost, and *fence*: they place the
partitions again, in higher epochs. From then on files of older epochs are refused, and nothing is trimmed that the new
files lack.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from services.cli.errors import BackupError, RestoreRefusedError
from services.cli.status import ClusterSnapshot, Worker, take_snapshot
from services.cli.target import Target, connected
from services.log.errors import LogRefusedError, LogUnavailableError, PlacementError
from services.log.jetstream.placement import FENCE_SECONDS, BucketPlacements, read_stores
from services.log.jetstream.stream import BUCKET, STREAM
from services.log.metrics import PARTITIONS, PROCESSES
from services.log.partitions import partition_name
from services.log.status import Placement


@dataclass(frozen=True, slots=True)
class StoreView:
    """A store in the cluster, as a backup or a restore needs it.

    Attributes:
        created: when the stream was created, as the broker states it.
        partitions: how many the stream has.
        first: sequence of the oldest message; one above *last* when the stream is empty.
        last: sequence of the newest message that ever existed.
        holes: messages that are missing between these two: trim skips a partition that is stopped.
        placed: the store's placements, by partition.
        history: for each partition, the placements in the kept history of its key, the newest last.
        workers: the persisters that answer, of all volumes.
    """

    created: str
    partitions: int
    first: int
    last: int
    holes: int
    placed: Mapping[int, Placement]
    history: Mapping[int, tuple[Placement, ...]]
    workers: tuple[Worker, ...]

    def placed_on(self, volume: str) -> tuple[int, ...]:
        """Return the partitions that are placed on *volume*."""
        return tuple(partition for partition, one in sorted(self.placed.items()) if one.volume == volume)

    def highest_epoch(self, partition: int) -> int:
        """Return the highest epoch that *partition* is known to have had; 0 when it had none."""
        return max((one.epoch for one in self.history[partition]), default=0)

    def reached(self, partition: int, *, since: int) -> int:
        """Return the highest committed sequence in the history of *partition* in epochs from *since* on, else 0."""
        return max((one.committed for one in self.history[partition] if one.epoch >= since), default=0)

    def alive_on(self, volume: str) -> tuple[str, ...]:
        """Return for each live persister of *volume* why nothing may replace the volume."""
        return tuple(
            f"a persister of this volume runs: {worker.name} on {worker.host}, pid {worker.pid}. Stop all persisters "
            "of the volume first; two directories with one identity would fight for its partitions"
            for worker in self.workers
            if worker.volume == volume
        )


async def look(target: Target, store: str) -> StoreView | None:
    """Ask the cluster about *store*; return None when it has no stream of events.

    Raises:
        LogUnavailableError: no node answered, or it is unknown where partitions are placed or which persisters run.
        BackupError: the stream was not created by fiq.
    """
    settings = replace(target.settings, store=store)
    async with connected(settings, target.role) as connection:
        snapshot = await take_snapshot(connection, settings, target.state)
        stream = snapshot.stream
        if stream is None:
            return None
        if not stream.partitions:
            raise BackupError(f"stream {STREAM} was not made by fiq: its metadata has no number of partitions")
        _check_known(snapshot)
        placements = BucketPlacements(connection, replace(settings, partitions=stream.partitions))
        every = range(stream.partitions)
        history = await asyncio.gather(*(placements.history(partition) for partition in every))
    first, last = max(1, stream.first_sequence), stream.last_sequence
    return StoreView(
        created=stream.created,
        partitions=stream.partitions,
        first=first,
        last=last,
        holes=max(0, last + 1 - first) - stream.messages,
        placed=snapshot.placed,
        history=dict(zip(every, history, strict=True)),
        workers=snapshot.workers,
    )


def _check_known(snapshot: ClusterSnapshot) -> None:
    log = snapshot.log
    for part, known in ((PARTITIONS, log.placements), (PROCESSES, log.processes)):
        if known is None or part in log.troubles:
            raise LogUnavailableError(f"the cluster does not say all of its state ({snapshot.why_unknown(part)})")


async def other_stores(target: Target) -> tuple[str, ...]:
    """Return the names of the other stores that have partitions, and so copies of their own.

    Raises LogUnavailableError: no node answered.
    """
    async with connected(target.settings, target.role) as connection:
        return tuple(name for name in await read_stores(connection) if name != target.settings.store)


async def fence(target: Target, store: str, wanted: Iterable[Placement], seen: StoreView) -> None:
    """Place partitions again: files of older epochs are refused from now on, and what is not committed is kept.

    A trim that has read the keys before is over when this returns: look at the stream once more.

    Args:
        target: the cluster.
        store: the volume's store.
        wanted: the new placements, with new epochs, and with what the restored files will hold.
        seen: the cluster as it was.

    Raises RestoreRefusedError: the broker refused one, or it has changed meanwhile; those before it are placed.
    """
    async with connected(target.settings, target.role) as connection:
        placements = BucketPlacements(connection, replace(target.settings, store=store))
        for one in sorted(wanted, key=lambda placement: placement.partition):
            known = seen.placed.get(one.partition)
            try:
                if known is not None:
                    current = replace(one, revision=known.revision)
                    await placements.renew(current, epoch=one.epoch, committed=one.committed)
                elif (found := await placements.place(one)).volume != one.volume:
                    raise PlacementError(f"volume {found.volume} has taken it")
            except (LogUnavailableError, LogRefusedError, PlacementError) as error:
                raise RestoreRefusedError(
                    f"partition {partition_name(one.partition)} could not be placed again in bucket {BUCKET} "
                    f"({error}). The old directory might run at the same time as the new one, and events that the new "
                    "one lacks might be trimmed, so no file was restored. Use the NATS user `placement`, and try again"
                ) from error
    await asyncio.sleep(FENCE_SECONDS)
