"""What the cluster knows of a volume: where its partitions live, how far the stream reaches, who is at work on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.cli.errors import BackupError, RestoreRefusedError
from services.cli.overview import Worker, ask_workers
from services.cli.target import Target, connected
from services.eventlog.errors import LogRefusedError, LogUnavailableError, PlacementError
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.names import STREAM, consumer_name
from services.eventlog.jetstream.placement import Placement, Placements
from services.eventlog.jetstream.report import read_stream, store_reports
from services.eventlog.partitions import partition_name

#: the consumers get so long to have leaders, seconds
ELECTION_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The cluster as a backup or a restore needs it.

    Attributes:
        created: when the stream was created, as the broker states it.
        partitions: how many the stream has.
        first: sequence of the oldest message; one above *last* when the stream is empty.
        last: sequence of the youngest message that there ever was.
        placed: where the store's partitions live.
        workers: the persisters that answer, of all volumes.
    """

    created: str
    partitions: int
    first: int
    last: int
    placed: Mapping[int, Placement]
    workers: tuple[Worker, ...]

    def placed_on(self, volume: str) -> tuple[int, ...]:
        """Return the partitions that live on *volume*, by number."""
        return tuple(partition for partition, place in sorted(self.placed.items()) if place.volume == volume)

    def next_epochs(self, volume: str, held: Mapping[int, int]) -> dict[int, int]:
        """Return for each partition that lives on *volume* an epoch above its own and that of the file *held* of it."""
        return {p: max(self.placed[p].epoch, held.get(p, 0)) + 1 for p in self.placed_on(volume)}

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
        placed = await _placed(Placements(connection, settings))
        workers = await ask_workers(connection, target.state)
    return ClusterView(
        created=stream.created,
        partitions=stream.partitions,
        first=max(1, stream.first_sequence),
        last=stream.last_sequence,
        placed=placed,
        workers=tuple(workers),
    )


async def _placed(placements: Placements) -> Mapping[int, Placement]:
    """Return where partitions live; one consumer that elects its leader just now keeps all from being told."""
    end = time.monotonic() + ELECTION_SECONDS
    while True:
        try:
            return await placements.read()
        except LogUnavailableError:
            if time.monotonic() >= end:
                raise
        await asyncio.sleep(0.5)


async def other_stores(target: Target, seen: ClusterView) -> tuple[str, ...]:
    """Return the names of the other stores that have consumers, and so copies of their own.

    Raises:
        LogUnavailableError: no node answered.
    """
    store = target.settings.store
    async with connected(target.settings) as connection:
        found = await store_reports(JetStreamApi(connection), seen.partitions, store)
    return tuple(name for name in found if name != store)


async def renew_places(target: Target, store: str, volume: str, epochs: Mapping[int, int]) -> None:
    """Place partitions of the volume there once more, so that what is left of it elsewhere is refused from now on.

    Args:
        target: the cluster.
        store: the volume's store.
        volume: its UUID.
        epochs: the partitions and the epochs that they get.

    Raises:
        RestoreRefusedError: the broker did not take one, or it is out of date; those before it have theirs.
    """
    async with connected(target.settings) as connection:
        placements = Placements(connection, replace(target.settings, store=store))
        for partition, epoch in sorted(epochs.items()):
            try:
                await placements.renew(partition, volume, epoch)
            except (LogUnavailableError, LogRefusedError, PlacementError) as error:
                raise RestoreRefusedError(
                    f"partition {partition_name(partition)} could not be placed anew ({error}), so the old directory "
                    "might run beside the new one: nothing was put there. Use the NATS user `ops`, and try again"
                ) from error


async def hold_trim(target: Target, store: str, volume: str, reached: Mapping[int, int], seen: ClusterView) -> None:
    """Set the consumers of the volume's partitions back to where its files end, so that nothing they lack is trimmed.

    A trim deletes what every consumer has acknowledged, and those of a lost volume had acknowledged more than what is
    put in its place: until its persisters run again, another volume's process could delete what they need.

    Args:
        target: the cluster.
        store: the volume's store.
        volume: its UUID.
        reached: sequence up to which each partition will be there; 0 for those that are missing.
        seen: the cluster as it was.

    Raises:
        RestoreRefusedError: the broker did not take a reset.
    """
    async with connected(target.settings) as connection:
        api = JetStreamApi(connection)
        for partition in seen.placed_on(volume):
            sequence = reached.get(partition, 0) + 1
            # a reset beyond the end is taken and then delivers nothing
            if sequence > seen.last + 1:
                continue
            name = consumer_name(store, partition)
            try:
                await api.reset_consumer(STREAM, name, sequence)
            except LogUnavailableError as error:
                raise RestoreRefusedError(
                    f"consumer {name} could not be set back to sequence {sequence} ({error}), so a trim might delete "
                    "what the volume lacks: use the NATS user `ops`, or --offline for a backup"
                ) from error
