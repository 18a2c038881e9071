"""Which partitions this process runs: placement on the volume first, then its share among the volume's processes.

A volume takes unplaced partitions until it has its quota, ``ceil(partitions / volumes)``. Exactly one volume wins each
(the broker decides), and only one process of a volume claims at a time (``volume.lock``), so a quota is never exceeded.
A claim leaves a marker beside the partition files until the new file exists. So a placed partition without a file
and without a marker has lost its file: it stops, because an empty file in its place would split the history.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from services.contract.logs import get_logger
from services.corpus import (
    CorpusError,
    CorpusExistsError,
    EventStore,
    Identity,
    StoreOptions,
    TransientCorpusError,
    open_corpus,
    write_index,
)
from services.corpus.records import check_identity
from services.eventlog.errors import PlacementError
from services.eventlog.jetstream.placement import Placement, Placements
from services.eventlog.partitions import partition_name
from services.eventlog.protocol import LogIdentity
from services.eventlog.settings import LogSettings
from services.persister.volume import FIRST_EPOCH, Volume

_FOREIGN = "its file lies in this volume, but another volume has the partition: move the file back where it belongs"


@dataclass(frozen=True, slots=True)
class Deployment:
    """What the claims of one process agree on.

    Attributes:
        volume: where the files go.
        volumes: how many volumes the store is meant to have.
        log: settings of the log.
        identity: the stream that this process writes from.
    """

    volume: Volume
    volumes: int
    log: LogSettings
    identity: LogIdentity

    @property
    def quota(self) -> int:
        """Partitions that the volume takes at most."""
        return math.ceil(self.log.partitions / self.volumes)

    def expected(self, partition: int, epoch: int) -> Identity:
        """Return what the file of *partition* must say of itself."""
        return Identity(
            store=self.log.store,
            volume=self.volume.uuid,
            epoch=epoch,
            partition=partition,
            partitions=self.log.partitions,
            stream=self.identity.name,
            stream_created=self.identity.created,
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """What lives on the volume.

    Attributes:
        here: the partitions that are placed on it.
        refused: partitions that it could not claim because of the file that lies there, and why.
    """

    here: dict[int, Placement]
    refused: dict[int, str]


async def place(deployment: Deployment, placements: Placements) -> Placed:
    """Claim partitions until the volume has its quota or none is left.

    Raises:
        LogUnavailableError: the broker did not answer; call again.
        LogMismatchError: the stream is another one than at the start; nothing was claimed.
        OSError: the data directory refuses a marker.
        VolumeBusyError: another process of the volume does not let go of the claim lock; call again.
    """
    volume = deployment.volume
    placed = await placements.read()
    _settle_markers(volume, placed)
    if not _may_claim(deployment, placed):  # as it is nearly always: a silent broker must not keep the lock busy
        return _placed(volume, placed, {})
    await placements.check_log(deployment.identity)
    async with volume.claiming():
        return await _claim(deployment, placements)


async def _claim(deployment: Deployment, placements: Placements) -> Placed:
    """Claim one partition after the other; the caller holds the claim lock."""
    volume = deployment.volume
    refused: dict[int, str] = {}
    placed = await placements.read()
    _settle_markers(volume, placed)
    unplaced = set(range(deployment.log.partitions)) - placed.keys()
    if reason := await asyncio.to_thread(_stale, volume, placed):
        return _placed(volume, placed, dict.fromkeys(unplaced, reason))
    for partition in _preference(deployment, unplaced):
        if not _may_claim(deployment, placed):
            break
        try:
            epoch = await asyncio.to_thread(_epoch_of, deployment, partition)
        except CorpusError as error:
            refused[partition] = str(error)
            continue
        await asyncio.to_thread(volume.mark_claim, partition, epoch)
        found = placed[partition] = await placements.claim(partition, volume.uuid, epoch)
        if found.volume != volume.uuid:
            await asyncio.to_thread(volume.clear_claim, partition)
    return _placed(volume, placed, refused)


def _may_claim(deployment: Deployment, placed: dict[int, Placement]) -> bool:
    ours = sum(found.volume == deployment.volume.uuid for found in placed.values())
    return len(placed) < deployment.log.partitions and ours < deployment.quota


def _placed(volume: Volume, placed: dict[int, Placement], refused: dict[int, str]) -> Placed:
    here = {p: found for p, found in placed.items() if found.volume == volume.uuid}
    return Placed(here, refused | dict.fromkeys(_foreign_files(volume, placed), _FOREIGN))


def open_store(deployment: Deployment, placement: Placement, options: StoreOptions) -> EventStore:
    """Open the file of a partition that is placed on this volume; create it when it was just claimed.

    Raises:
        PlacementError: the file is gone.
        CorpusError: another process has it, it is another one's, or it is damaged.
    """
    volume, partition = deployment.volume, placement.partition
    expected = deployment.expected(partition, placement.epoch)
    path = volume.file(partition)
    # the mark before the file: whoever else is creating the file removes the mark only when the file is there
    claimed = volume.claimed_epoch(partition)
    if path.exists():
        store = EventStore.open(path, expected=expected, options=options)
    elif claimed is not None:
        # a new file must say what its claim says, not what the placement has become since
        check_identity(f"{partition_name(partition)}.claim", expected, replace(expected, epoch=claimed))
        store = _create(path, expected, options)
    else:
        raise PlacementError(
            f"partition {partition_name(partition)} lives on this volume but its file {path} is gone: put it back "
            "(from a backup: the stream brings what is missing); an empty one would split the history"
        )
    try:
        volume.clear_claim(partition)
        _link(volume)
    except BaseException:
        store.abandon()
        raise
    return store


def _create(path: Path, identity: Identity, options: StoreOptions) -> EventStore:
    try:
        return EventStore.create(path, identity, options)
    except CorpusExistsError:  # another process of the volume was faster
        return EventStore.open(path, expected=identity, options=options)


def _link(volume: Volume) -> None:
    try:
        write_index(volume.directory)
    except TransientCorpusError as error:  # a full disk: the partition goes on, and the next one that opens tries again
        get_logger("assignment").warning("INDEX_NOT_WRITTEN", reason=str(error))


def _settle_markers(volume: Volume, placed: dict[int, Placement]) -> None:
    """Remove the markers of claims that another volume won."""
    for partition, found in placed.items():
        if found.volume != volume.uuid and volume.claim_marked(partition):
            volume.clear_claim(partition)


def _stale(volume: Volume, placed: dict[int, Placement]) -> str:
    """Return why this directory is not the volume's newest, so that its twin alone may claim; nothing when it is."""
    for partition, found in placed.items():
        if found.volume == volume.uuid and (held := _held_epoch(volume, partition)) not in (None, found.epoch):
            return (
                f"not claimed, since partition {partition_name(partition)} is of epoch {held} here and was placed anew "
                f"as epoch {found.epoch}: this directory is a stale copy of its volume"
            )
    return ""


def _held_epoch(volume: Volume, partition: int) -> int | None:
    """Return the epoch of what the directory has of *partition*; None when that cannot be told."""
    if not volume.file(partition).exists():
        return volume.claimed_epoch(partition)
    try:
        with open_corpus(volume.file(partition)) as corpus:
            return corpus.partitions[0].identity.epoch
    except CorpusError:  # its runner shows it
        return None


def _preference(deployment: Deployment, unplaced: set[int]) -> list[int]:
    """Order *unplaced*: those whose file is here already, then an order of the volume's own against needless races."""

    def rank(partition: int) -> tuple[bool, bytes]:
        name = f"{deployment.volume.uuid}/{partition}"
        return not deployment.volume.file(partition).exists(), hashlib.sha256(name.encode()).digest()

    return sorted(unplaced, key=rank)


def _foreign_files(volume: Volume, placed: dict[int, Placement]) -> list[int]:
    """Return the partitions whose files lie here although another volume has them."""
    return [p for p, found in placed.items() if found.volume != volume.uuid and volume.file(p).exists()]


def _epoch_of(deployment: Deployment, partition: int) -> int:
    """Return the epoch to claim an unplaced *partition* with.

    A file without a consumer means that the consumer was deleted, which a new claim with the file's epoch heals, or
    that the stream is another one, which only an operator can resolve.

    Raises:
        CorpusError: the file that lies here must not be used: another stream's, another volume's, locked, damaged.
    """
    path = deployment.volume.file(partition)
    if not path.exists():
        return FIRST_EPOCH
    store = EventStore.open(path, expected=None)
    try:
        found = store.identity
    finally:
        store.close()
    check_identity(path.name, deployment.expected(partition, found.epoch), found)
    return found.epoch
