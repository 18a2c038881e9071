"""What the cluster knows of a volume: where its partitions live, how far the stream reaches, who is at work on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.cli.backup.manifest import Manifest
from services.cli.errors import BackupError, RestoreRefusedError
from services.cli.overview import Worker, ask_workers
from services.cli.target import Target, connected
from services.eventlog.errors import LogUnavailableError
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.names import STREAM, consumer_name
from services.eventlog.jetstream.placement import Placement, Placements
from services.eventlog.jetstream.report import read_stream


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
        placed = await Placements(connection, settings).read()
        workers = await ask_workers(connection, target.state)
    return ClusterView(
        created=stream.created,
        partitions=stream.partitions,
        first=max(1, stream.first_sequence),
        last=stream.last_sequence,
        placed=placed,
        workers=tuple(workers),
    )


async def hold_trim(target: Target, manifest: Manifest, seen: ClusterView) -> None:
    """Set the consumers of the volume's partitions back to where the backup ends, so that nothing it lacks is trimmed.

    A trim deletes what every consumer has acknowledged, and those of a lost volume had acknowledged more than the
    backup holds: until its persisters run again, another volume's process could delete what they need.

    Raises:
        RestoreRefusedError: the broker did not take a reset.
    """
    reached = {entry.partition: entry.committed for entry in manifest.contents}
    async with connected(target.settings) as connection:
        api = JetStreamApi(connection)
        for partition, place in sorted(seen.placed.items()):
            sequence = reached.get(partition, 0) + 1
            # a reset beyond the end is taken and then delivers nothing
            if place.volume != manifest.volume or sequence > seen.last + 1:
                continue
            name = consumer_name(manifest.store, partition)
            try:
                await api.reset_consumer(STREAM, name, sequence)
            except LogUnavailableError as error:
                raise RestoreRefusedError(
                    f"consumer {name} could not be set back to sequence {sequence} ({error}), so a trim might delete "
                    "what the backup lacks: use the NATS user `ops`, or --offline"
                ) from error
