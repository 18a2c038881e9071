"""What the cluster knows of a volume: where its partitions live, how far the stream reaches, who is at work on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from services.cli.errors import BackupError, RestoreRefusedError
from services.cli.overview import Worker, ask_workers
from services.cli.target import Target, connected
from services.log.errors import LogRefusedError, LogUnavailableError, PlacementError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.placement import FENCE_SECONDS, Placements, read_stores
from services.log.jetstream.stream import BUCKET, STREAM, read_stream
from services.log.partitions import partition_name
from services.log.status import Placement, StorePlacement

#: the bucket gets so long to have a leader, seconds
ELECTION_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The cluster as a backup or a restore needs it.

    Attributes:
        created: when the stream was created, as the broker states it.
        partitions: how many the stream has.
        first: sequence of the oldest message; one above *last* when the stream is empty.
        last: sequence of the youngest message that there ever was.
        holes: messages that are missing between these two: trim goes around a partition that stands still.
        placed: where the store's partitions live.
        history: of each partition, where the kept history of its key says that it lived, the newest last.
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
        """Return the partitions that live on *volume*, by number."""
        return tuple(partition for partition, place in sorted(self.placed.items()) if place.volume == volume)

    def highest_epoch(self, partition: int) -> int:
        """Return the highest epoch that *partition* ever had, as far as is known; 0 when it had none."""
        return max((place.epoch for place in self.history[partition]), default=0)

    def reached(self, partition: int, *, since: int) -> int:
        """Return the highest sequence that keys of *partition* called committed in epochs from *since* on, else 0."""
        return max((place.committed for place in self.history[partition] if place.epoch >= since), default=0)

    def alive_on(self, volume: str) -> tuple[str, ...]:
        """Return for each live persister of *volume* why nothing may be put in its place."""
        return tuple(
            f"a persister of this volume runs: {worker.name} on {worker.host}, pid {worker.pid}. Stop all persisters "
            "of the volume first; two directories with one identity would fight for its partitions"
            for worker in self.workers
            if worker.volume == volume
        )


async def look(target: Target, store: str) -> ClusterView | None:
    """Ask the cluster about *store*; None when it has no stream of ours.

    Raises:
        LogUnavailableError: no node answered.
        BackupError: the stream is none of fiq's.
    """
    async with connected(target.settings) as connection:
        info = await JetStreamApi(connection).stream_info(STREAM)
        if info is None:
            return None
        stream = read_stream(info)
        if not stream.partitions:
            raise BackupError(f"stream {STREAM} was not made by fiq: it names no number of partitions")
        settings = replace(target.settings, store=store, partitions=stream.partitions)
        placements = Placements(connection, settings)
        found = await _placed(placements)
        every = range(stream.partitions)
        history = await asyncio.gather(*(placements.history(partition) for partition in every))
        workers = await ask_workers(connection, target.state)
    return ClusterView(
        created=stream.created,
        partitions=stream.partitions,
        first=max(1, stream.first_sequence),
        last=stream.last_sequence,
        holes=int(info["state"].get("num_deleted", 0)),
        placed=found.partitions,
        history=dict(zip(every, history, strict=True)),
        workers=tuple(workers),
    )


async def _placed(placements: Placements) -> StorePlacement:
    """Return where partitions live; the bucket may be electing its leader just now."""
    end = time.monotonic() + ELECTION_SECONDS
    while True:
        try:
            return await placements.read()
        except LogUnavailableError:
            if time.monotonic() >= end:
                raise
        await asyncio.sleep(0.5)


async def other_stores(target: Target) -> tuple[str, ...]:
    """Return the names of the other stores that have partitions, and so copies of their own.

    Raises LogUnavailableError: no node answered.
    """
    async with connected(target.settings) as connection:
        return tuple(name for name in await read_stores(connection) if name != target.settings.store)


async def fence(target: Target, store: str, wanted: Iterable[Placement], seen: ClusterView) -> None:
    """Place partitions once more: files of older epochs are refused from now on, and what is not committed is kept.

    What is trimmed by keys that were read before is gone when this returns: look at the stream once more.

    Args:
        target: the cluster.
        store: the volume's store.
        wanted: where they live, with the epochs that they get, and with what the files will have that are put there.
        seen: the cluster as it was.

    Raises RestoreRefusedError: the broker did not take one, or it changed meanwhile; those before it have theirs.
    """
    async with connected(target.settings) as connection:
        placements = Placements(connection, replace(target.settings, store=store))
        for one in sorted(wanted, key=lambda placement: placement.partition):
            known = seen.placed.get(one.partition)
            try:
                if known is not None:
                    from_now_on = replace(one, revision=known.revision)
                    await placements.renew(from_now_on, epoch=one.epoch, committed=one.committed)
                elif (found := await placements.place(one)).volume != one.volume:
                    raise PlacementError(f"volume {found.volume} has taken it")
            except (LogUnavailableError, LogRefusedError, PlacementError) as error:
                raise RestoreRefusedError(
                    f"partition {partition_name(one.partition)} could not be placed anew in bucket {BUCKET} ({error}), "
                    "so the old directory might run beside the new one, and events be trimmed that the new one lacks: "
                    "nothing was put there. Use the NATS user `ops`, and try again"
                ) from error
    await asyncio.sleep(FENCE_SECONDS)
