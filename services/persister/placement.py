"""Which partitions this process runs: first what is placed on its volume, then its share among the volume's processes.

A volume claims unplaced partitions until it has its quota, ``ceil(partitions / volumes)``. The log lets exactly one
volume win each claim, and only one process of a volume claims at a time (``volume.lock``), so that the quota holds.

The file of a partition is created before the claim and proves that it was created: a placed partition without a file
has lost it and stops, because an empty file in its place would split the history. A volume that loses a claim removes
its empty file. When all partitions are placed the store is *formed*. From then on, and when a record was deleted, a
partition without a record stops on every volume until an operator says where it is (``fiq place``).

The processes of a volume find each other without the log (ADR 0002): each holds a lock on a file of its own in
``<data>/workers/``, which the kernel releases when the process ends. :func:`owners` divides the partitions among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
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
from fiq.corpus.wal.journal import journal_path
from services.core.logs import get_logger
from services.log.errors import LogMismatchError, PlacementError
from services.log.partitions import partition_name
from services.log.protocol import LogIdentity, Placements
from services.log.settings import LogSettings
from services.log.status import Placement, StorePlacement
from services.persister.volume import FIRST_EPOCH, Volume

_FOREIGN = "its file is in this volume, but another volume has the partition: move the file back to that one"


@dataclass(frozen=True, slots=True)
class VolumeContext:
    """What the processes of a volume have in common.

    Attributes:
        volume: where the files are.
        volumes: how many volumes the store is meant to have.
        log: settings of the log.
        identity: the log that this process writes from.
    """

    volume: Volume
    volumes: int
    log: LogSettings
    identity: LogIdentity

    @property
    def quota(self) -> int:
        """How many partitions the volume takes."""
        return math.ceil(self.log.partitions / self.volumes)

    def expected(self, partition: int, epoch: int) -> Identity:
        """Return the identity that the file of *partition* must have."""
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
class Assignment:
    """The partitions of a volume.

    Attributes:
        placed: those that are placed on it.
        blocked: those that no process may run, or not from this volume, and why.
    """

    placed: Mapping[int, Placement]
    blocked: Mapping[int, str]


# -- claiming partitions for the volume -------------------------------------------------------------------------------


async def claim_partitions(context: VolumeContext, placements: Placements) -> Assignment:
    """Claim partitions until the volume has its quota or none is left; return what the volume has.

    Raises:
        LogUnavailableError: the log did not answer; call again.
        LogMismatchError: the log is not the one of the start; nothing was claimed.
        PlacementError: there are no records.
        VolumeError: the volume's identity is gone.
        OSError: the data directory cannot be written.
        VolumeBusyError: another process of the volume does not release the claim lock; call again.
    """
    volume = context.volume
    seen = await placements.read()
    if seen.stream_created != context.identity.created:
        raise LogMismatchError(
            f"stream {context.identity.name} is not the one created at {context.identity.created} that this "
            "process started with: it was deleted or created anew; no partition is claimed on it"
        )
    formed = await asyncio.to_thread(volume.formed_in)
    claims = _may_claim(context, seen.partitions, seen, formed)
    if not claims and not _has_chores(context, seen, formed):
        # nearly always: the lock is not held while a slow log is waited for
        return _assignment(context, placements, seen, formed, {})
    if claims and not (seen.partitions or seen.deleted) and await placements.begin():
        await asyncio.sleep(placements.fence_seconds)  # trim for another store may still delete what is claimed here
    async with volume.claiming():
        return await _claim(context, placements)


async def _claim(context: VolumeContext, placements: Placements) -> Assignment:
    """Claim one partition after the other; the caller holds the claim lock."""
    volume = context.volume
    blocked: dict[int, str] = {}
    seen = await placements.read()
    await asyncio.to_thread(_remove_unused, context, seen)
    formed = volume.formed_in()
    placed = dict(seen.partitions)
    unplaced = set(range(context.log.partitions)) - placed.keys() - seen.deleted
    if reason := await asyncio.to_thread(_stale, volume, placed):
        return _assignment(context, placements, seen, formed, dict.fromkeys(unplaced, reason))
    for partition in _in_order(context, unplaced):
        if not _may_claim(context, placed, seen, formed):
            break
        try:
            record = placements.record_of(partition)
            begins = await asyncio.to_thread(_create_file, context, partition, seen.first_sequence, record)
        except (CorpusError, PlacementError) as error:
            blocked[partition] = str(error)
            continue
        placed[partition] = await placements.claim(partition, volume.uuid, FIRST_EPOCH, begins=begins)
    seen = await placements.read()
    await asyncio.to_thread(_remove_unused, context, seen)  # of the claims that another volume won
    if not seen.formed and len(seen.partitions) == context.log.partitions:
        await placements.form({found.volume for found in seen.partitions.values()})
        seen = await placements.read()
    if seen.formed and formed != seen.stream_created:
        formed = seen.stream_created
        await asyncio.to_thread(volume.note_formed, formed)
    return _assignment(context, placements, seen, formed, blocked)


def _may_claim(context: VolumeContext, placed: Mapping[int, Placement], seen: StorePlacement, formed: str) -> bool:
    if seen.formed or formed:
        return False
    ours = sum(found.volume == context.volume.uuid for found in placed.values())
    return len(placed) < context.log.partitions and ours < context.quota


def _has_chores(context: VolumeContext, seen: StorePlacement, formed: str) -> bool:
    """Return whether the store's formation is to be noted, or the file of a lost claim removed."""
    complete = len(seen.partitions) == context.log.partitions
    noted = formed == seen.stream_created if seen.formed else not complete
    return not noted or bool(_foreign_files(context.volume, seen))


def _assignment(
    context: VolumeContext, placements: Placements, seen: StorePlacement, formed: str, blocked: dict[int, str]
) -> Assignment:
    volume = context.volume
    blocked |= dict.fromkeys(_foreign_files(volume, seen), _FOREIGN)
    for partition in set(range(context.log.partitions)) - seen.partitions.keys():
        if formed and formed != seen.stream_created:
            blocked[partition] = (
                f"the stream was deleted and created anew: this directory belongs to the one created at {formed}, the "
                f"present one was created at {seen.stream_created}. Use a new data directory; docs/operations.md, "
                "`A lost stream`"
            )
        elif seen.formed or formed or partition in seen.deleted:
            blocked[partition] = (
                f"{placements.record_of(partition)} is gone, so it is not known which volume has the partition, and no "
                "volume takes it: run `fiq place` on the data directory that has the newest "
                f"{partition_name(partition)}.h5; docs/operations.md, `A lost key`"
            )
    return Assignment({p: found for p, found in seen.partitions.items() if found.volume == volume.uuid}, blocked)


def _create_file(context: VolumeContext, partition: int, first: int, record: str) -> int:
    """Create the file of a partition that is about to be claimed; return the sequence at which it begins.

    Raises:
        PlacementError: the existing file holds commits: it was placed before, and *record* was lost.
        CorpusError: the existing file must not be used: another stream's, another volume's, locked, damaged.
    """
    path = context.volume.file(partition)
    if path.exists():  # a process was killed, or lost the log, before it knew the outcome of its claim
        if (begins := _unused_from(context, partition)) is None:
            raise PlacementError(
                f"{path.name} holds commits, but {record} is gone: run `fiq place` on the data directory that has the "
                "newest one"
            )
        if begins >= first:
            return begins
        _remove(path)
    EventStore.create(path, context.expected(partition, FIRST_EPOCH), begins=first).close()
    return first


def _unused_from(context: VolumeContext, partition: int) -> int | None:
    """Return where the partition's file begins if it was created for a claim and holds no commit; None otherwise.

    Raises CorpusError: it is another one's, locked, or damaged.
    """
    path = context.volume.file(partition)
    with EventStore.open(path, expected=None) as store:
        found, begins, unused = store.identity, store.begins, store.committed < store.begins
    check_identity(path.name, context.expected(partition, found.epoch), found)
    return begins if unused and found.epoch == FIRST_EPOCH else None


def _foreign_files(volume: Volume, seen: StorePlacement) -> list[int]:
    """Return the partitions of other volumes that have a file here, perhaps one that was created for a claim."""
    return [p for p, found in seen.partitions.items() if found.volume != volume.uuid and volume.file(p).exists()]


def _remove_unused(context: VolumeContext, seen: StorePlacement) -> None:
    """Remove the empty files of claims that another volume won; the caller holds the claim lock."""
    for partition in _foreign_files(context.volume, seen):
        with contextlib.suppress(CorpusError):  # it stays, and readiness shows it
            if _unused_from(context, partition) is not None:
                _remove(context.volume.file(partition))


def _remove(path: Path) -> None:
    # after a crash in between a journal without commits is left; the next creation replaces it
    path.unlink()
    journal_path(path).unlink(missing_ok=True)
    StorageIO().sync_directory(path.parent)


def _stale(volume: Volume, placed: Mapping[int, Placement]) -> str:
    """Return why this directory is an outdated copy of the volume, which must not claim; empty when it is not."""
    for partition, found in placed.items():
        if found.volume == volume.uuid and (held := _epoch_of_file(volume, partition)) not in (None, found.epoch):
            return (
                f"not claimed, because partition {partition_name(partition)} has epoch {held} here and was placed "
                f"again as epoch {found.epoch}: this directory is an outdated copy of its volume"
            )
    return ""


def _epoch_of_file(volume: Volume, partition: int) -> int | None:
    """Return the epoch of the file of *partition*; None when there is none or it cannot be read."""
    if not volume.file(partition).exists():
        return None
    try:
        with open_corpus(volume.file(partition)) as corpus:
            return corpus.partitions[0].identity.epoch
    except CorpusError:  # its runner shows it
        return None


def _in_order(context: VolumeContext, unplaced: set[int]) -> list[int]:
    """Sort *unplaced*: those with a file first, then in an order of the volume's own, so that volumes race less."""

    def rank(partition: int) -> tuple[bool, bytes]:
        return not context.volume.file(partition).exists(), _hash(context.volume.uuid, partition)

    return sorted(unplaced, key=rank)


def _hash(name: str, partition: int) -> bytes:
    return hashlib.sha256(f"{name}/{partition}".encode()).digest()


# -- the files of placed partitions -----------------------------------------------------------------------------------


def open_store(context: VolumeContext, placement: Placement, options: StoreOptions) -> EventStore:
    """Open the file of a partition that is placed on this volume.

    Raises:
        PlacementError: the file is gone.
        CorpusError: another process has it, it is another one's, or it is damaged.
    """
    volume, partition = context.volume, placement.partition
    path = volume.file(partition)
    if not path.exists():
        raise PlacementError(
            f"partition {partition_name(partition)} is placed on this volume but its file {path} is gone: put it back "
            "(from a backup: the stream brings what is missing); an empty one would split the history"
        )
    store = EventStore.open(path, expected=context.expected(partition, placement.epoch), options=options)
    try:
        write_index(volume.directory)
    except TransientCorpusError as error:  # a full disk: the partition runs, and the next one that opens tries again
        get_logger("assignment").warning("INDEX_NOT_WRITTEN", reason=str(error))
    except BaseException:
        store.abandon()
        raise
    return store


# -- sharing them among the volume's processes ------------------------------------------------------------------------


class Workers:
    """The live processes of a volume, this one among them.

    Args:
        directory: the volume's ``workers`` directory; created when it is missing.
        name: of this process; unique among the volume's processes, past ones included.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self._directory = directory
        self._descriptor: int | None = None

    def join(self) -> None:
        """Become visible to the others."""
        self._directory.mkdir(mode=0o750, exist_ok=True)
        path = self._path(self.name)
        while self._descriptor is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # between the two calls another process may have found the file without a lock and removed it
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    self._descriptor = descriptor
                    return
            os.close(descriptor)

    def alive(self) -> list[str]:
        """Return the names of the live processes, this one included, sorted; remove the files of dead ones."""
        names = {self.name}
        for path in self._directory.glob("*.lock"):
            if path.stem != self.name and self._is_alive(path):
                names.add(path.stem)
        return sorted(names)

    def leave(self) -> None:
        """Become invisible to the others."""
        if self._descriptor is not None:
            self._path(self.name).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.lock"

    @staticmethod
    def _is_alive(path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                return True
            finally:
                os.close(descriptor)
        return False


def owners(partitions: Iterable[int], workers: Collection[str]) -> dict[int, str]:
    """Return which worker runs each partition; all processes that see the same workers get the same result.

    Rendezvous hashing (Thaler and Ravishankar, 1998) among the workers that have room for one more: a worker that comes
    or goes moves little more than its own share, and without the limit two workers often share 16 partitions as 11 and
    5.

    Args:
        partitions: to be shared.
        workers: at least one.
    """
    ordered = sorted(partitions)
    room = Counter(dict.fromkeys(workers, math.ceil(len(ordered) / len(workers))))
    result = {}
    for partition in ordered:
        candidates = [name for name, left in room.items() if left]
        result[partition] = max(candidates, key=lambda name: _hash(name, partition))
        room[result[partition]] -= 1
    return result
