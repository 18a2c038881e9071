"""Which partitions this process runs: placement on the volume first, then its share among the volume's processes.

A volume takes unplaced partitions until it has its quota, ``ceil(partitions / volumes)``. Exactly one volume wins each
(the broker decides), and only one process of a volume claims at a time (``volume.lock``), so a quota is never exceeded.

The file of a partition is made before the claim, and is the mark that it was made: a placed partition without a file
has lost it, and stops, because an empty file in its place would split the history. A claim that another volume won
leaves an empty file, which is removed. When all partitions are placed the store is *formed*. After that, or when a key
was deleted, a partition without a key stops on every volume until an operator says where it is (``fiq place``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fiq.corpus import (
    CorpusError,
    EventStore,
    Identity,
    StorageIO,
    StoreOptions,
    TransientCorpusError,
    open_corpus,
    write_index,
)
from fiq.corpus.format import check_identity
from fiq.corpus.wal.recovery import journal_path
from services.core.logs import get_logger
from services.log.errors import LogMismatchError, PlacementError
from services.log.partitions import partition_name
from services.log.protocol import LogIdentity, Placements
from services.log.settings import LogSettings
from services.log.status import Placement, StorePlacement
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
        refused: partitions that nobody may run, or not from this volume, and why.
    """

    here: Mapping[int, Placement]
    refused: Mapping[int, str]


async def place(deployment: Deployment, placements: Placements) -> Placed:
    """Claim partitions until the volume has its quota or none is left.

    Raises:
        LogUnavailableError: the broker did not answer; call again.
        LogMismatchError: the stream is another one than at the start; nothing was claimed.
        PlacementError: there is no bucket.
        VolumeError: the volume's identity is gone.
        OSError: the data directory cannot be written.
        VolumeBusyError: another process of the volume does not let go of the claim lock; call again.
    """
    volume = deployment.volume
    seen = await placements.read()
    if seen.stream_created != deployment.identity.created:
        raise LogMismatchError(
            f"stream {deployment.identity.name} is not the one created at {deployment.identity.created} that this "
            "process began with: it was deleted or created anew; no partition is claimed on it"
        )
    formed = await asyncio.to_thread(volume.formed_in)
    claims = _may_claim(deployment, seen.partitions, seen, formed)
    if not (claims or _to_note(deployment, seen, formed)):
        return _placed(
            deployment, placements, seen, formed, {}
        )  # as nearly always: a silent broker must not keep the lock busy
    if claims and not (seen.partitions or seen.deleted) and await placements.begin():
        await asyncio.sleep(placements.fence_seconds)  # another store may still trim what the files are about to claim
    async with volume.claiming():
        return await _claim(deployment, placements)


async def _claim(deployment: Deployment, placements: Placements) -> Placed:
    """Claim one partition after the other; the caller holds the claim lock."""
    volume = deployment.volume
    refused: dict[int, str] = {}
    seen = await placements.read()
    await asyncio.to_thread(_remove_unused, deployment, seen)
    formed = volume.formed_in()
    placed = dict(seen.partitions)
    unplaced = set(range(deployment.log.partitions)) - placed.keys() - seen.deleted
    if reason := await asyncio.to_thread(_stale, volume, placed):
        return _placed(deployment, placements, seen, formed, dict.fromkeys(unplaced, reason))
    for partition in _preference(deployment, unplaced):
        if not _may_claim(deployment, placed, seen, formed):
            break
        try:
            begins = await asyncio.to_thread(_make_file, deployment, placements, partition, seen.first_sequence)
        except (CorpusError, PlacementError) as error:
            refused[partition] = str(error)
            continue
        placed[partition] = await placements.claim(partition, volume.uuid, FIRST_EPOCH, begins=begins)
    seen = await placements.read()
    await asyncio.to_thread(_remove_unused, deployment, seen)  # of the claims that another volume won
    if not seen.formed and len(seen.partitions) == deployment.log.partitions:
        await placements.form({found.volume for found in seen.partitions.values()})
        seen = await placements.read()
    if seen.formed and formed != seen.stream_created:
        formed = seen.stream_created
        await asyncio.to_thread(volume.note_formed, formed)
    return _placed(deployment, placements, seen, formed, refused)


def _may_claim(deployment: Deployment, placed: Mapping[int, Placement], seen: StorePlacement, formed: str) -> bool:
    if seen.formed or formed:
        return False
    ours = sum(found.volume == deployment.volume.uuid for found in placed.values())
    return len(placed) < deployment.log.partitions and ours < deployment.quota


def _to_note(deployment: Deployment, seen: StorePlacement, formed: str) -> bool:
    """Whether something is to be tidied up: a lost claim's file, or what is to be noted of the store's formation."""
    complete = len(seen.partitions) == deployment.log.partitions
    noted = formed == seen.stream_created if seen.formed else not complete
    return not noted or bool(_foreign_files(deployment.volume, seen))


def _placed(
    deployment: Deployment, placements: Placements, seen: StorePlacement, formed: str, refused: dict[int, str]
) -> Placed:
    volume = deployment.volume
    here = {p: found for p, found in seen.partitions.items() if found.volume == volume.uuid}
    refused |= dict.fromkeys(_foreign_files(volume, seen), _FOREIGN)
    for partition in set(range(deployment.log.partitions)) - seen.partitions.keys():
        if seen.formed or formed or partition in seen.deleted:
            refused[partition] = _without_key(placements, seen, formed, partition)
    return Placed(here, refused)


def _without_key(placements: Placements, seen: StorePlacement, formed: str, partition: int) -> str:
    if formed and formed != seen.stream_created:
        return (
            f"the stream was deleted and created anew: this directory belongs to the one created at {formed}, the "
            f"present one was created at {seen.stream_created}. Begin a new data directory; docs/operations.md, "
            "`A lost stream`"
        )
    return (
        f"{placements.record_of(partition)} is gone: it is not known where the partition is, and no volume takes it: "
        f"run `fiq place` on the data directory that has the newest {partition_name(partition)}.h5; "
        "docs/operations.md, `A lost key`"
    )


def _make_file(deployment: Deployment, placements: Placements, partition: int, first: int) -> int:
    """Make the file of a partition that is about to be claimed; return the stream sequence at which it begins.

    Raises:
        PlacementError: the file that lies here holds commits, and so was placed before and has lost its key.
        CorpusError: it must not be used: another stream's, another volume's, locked, damaged.
    """
    path = deployment.volume.file(partition)
    if path.exists():  # a process was killed, or lost the broker, before it knew the outcome of its claim
        if (begins := _unused(deployment, partition)) is None:
            raise PlacementError(
                f"{path.name} holds commits, but {placements.record_of(partition)} is gone: run `fiq place` on the "
                "data directory that has the newest one"
            )
        if begins >= first:
            return begins
        _remove(path)
    EventStore.create(path, deployment.expected(partition, FIRST_EPOCH), begins=first).close()
    return first


def _unused(deployment: Deployment, partition: int) -> int | None:
    """Return where the partition's file begins when it was made for a claim and holds no commit; None when it does.

    Raises CorpusError: it is another one's, locked, or damaged.
    """
    path = deployment.volume.file(partition)
    with EventStore.open(path, expected=None) as store:
        found, begins, unused = store.identity, store.begins, store.committed < store.begins
    check_identity(path.name, deployment.expected(partition, found.epoch), found)
    return begins if unused and found.epoch == FIRST_EPOCH else None


def _foreign_files(volume: Volume, seen: StorePlacement) -> list[int]:
    """Return the partitions that another volume has although a file is here: perhaps one that was made for a claim."""
    return [p for p, found in seen.partitions.items() if found.volume != volume.uuid and volume.file(p).exists()]


def _remove_unused(deployment: Deployment, seen: StorePlacement) -> None:
    """Remove the empty files of claims that another volume won; the caller holds the claim lock."""
    for partition in _foreign_files(deployment.volume, seen):
        with contextlib.suppress(CorpusError):  # then it stays, and readiness tells of it
            if _unused(deployment, partition) is not None:
                _remove(deployment.volume.file(partition))


def _remove(path: Path) -> None:
    # a journal without commits may stand alone for a moment: the next creation replaces it
    path.unlink()
    journal_path(path).unlink(missing_ok=True)
    StorageIO().sync_directory(path.parent)


def open_store(deployment: Deployment, placement: Placement, options: StoreOptions) -> EventStore:
    """Open the file of a partition that is placed on this volume.

    Raises:
        PlacementError: the file is gone.
        CorpusError: another process has it, it is another one's, or it is damaged.
    """
    volume, partition = deployment.volume, placement.partition
    path = volume.file(partition)
    if not path.exists():
        raise PlacementError(
            f"partition {partition_name(partition)} lives on this volume but its file {path} is gone: put it back "
            "(from a backup: the stream brings what is missing); an empty one would split the history"
        )
    store = EventStore.open(path, expected=deployment.expected(partition, placement.epoch), options=options)
    try:
        _link(volume)
    except BaseException:
        store.abandon()
        raise
    return store


def _link(volume: Volume) -> None:
    try:
        write_index(volume.directory)
    except TransientCorpusError as error:  # a full disk: the partition goes on, and the next one that opens tries again
        get_logger("assignment").warning("INDEX_NOT_WRITTEN", reason=str(error))


def _stale(volume: Volume, placed: Mapping[int, Placement]) -> str:
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
        return None
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
