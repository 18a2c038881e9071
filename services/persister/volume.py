"""A volume: one data directory on one host, the partitions that it has, and the processes that share them.

::

    <data>/volume.json   identity: a UUID, the store it belongs to, and whether the store was formed
    <data>/volume.lock   held while one of the volume's processes claims partitions
    <data>/<pp>.h5       a partition file, with its journal <pp>.h5.wal; created before the partition is claimed
    <data>/corpus.h5     links to all of them
    <data>/backup.json   when the newest backup was made
    <data>/verified.json  when `fiq verify` ran last, and what it found
    <data>/workers/      a lock file for each live process

A process runs its share of what is placed on its volume. A volume claims unplaced partitions until it has its quota,
``ceil(partitions / volumes)``. The log lets exactly one volume win each claim, and only one process of a volume claims
at a time (``volume.lock``), so that the quota holds.

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
import json
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

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
from fiq.corpus.wal.storage import ephemeral_file_system
from services.core.logs import get_logger
from services.log.errors import LogMismatchError, PlacementError
from services.log.partitions import partition_name
from services.log.protocol import LogIdentity, Placements
from services.log.settings import LogSettings
from services.log.status import Placement, StorePlacement, Verified, read_verified
from services.persister.errors import VolumeBusyError, VolumeError

_IDENTITY = "volume.json"
#: name of the file with the time of the newest backup; `fiq backup` writes it
BACKUP_NOTE = "backup.json"
#: name of the file with what the last verification found; `fiq verify` writes it
VERIFY_NOTE = "verified.json"
#: version of ``volume.json``
FORMAT = 1
#: epoch of a partition's first placement
FIRST_EPOCH = 1
#: how long to wait for another process of the volume that is claiming partitions, seconds
LOCK_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory that holds partition files of one store.

    Attributes:
        directory: where it is.
        uuid: made when the volume was first used; the partitions' records and files contain it.
        store: the store it belongs to.
    """

    directory: Path
    uuid: str
    store: str

    @classmethod
    def open(cls, directory: Path, store: str) -> Volume:
        """Open the volume in *directory*; create the directory and its identity if it is empty.

        Raises VolumeError: it belongs to another store, has partition files but no identity, or cannot be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            with _locked(directory / "volume.lock"):
                return cls(directory, _check_identity(directory, store), store)
        except OSError as error:
            raise VolumeError(f"cannot use the data directory {directory}: {error.strerror}") from error

    def file(self, partition: int) -> Path:
        """Return the path of a partition's file."""
        return self.directory / f"{partition_name(partition)}.h5"

    def room(self) -> tuple[int, int]:
        """Return the free bytes of the volume's file system for this process, and its size in bytes.

        Raises OSError: the directory cannot be reached.
        """
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    @property
    def workers(self) -> Path:
        """The directory of the live processes' lock files."""
        return self.directory / "workers"

    @asynccontextmanager
    async def claiming(self) -> AsyncIterator[None]:
        """Exclude other processes of the volume from claiming partitions.

        Raises VolumeBusyError: another process has been claiming for longer than it can take.
        """
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, _locked(self.directory / "volume.lock"))
            yield

    def formed_in(self) -> str:
        """Return the creation time of the stream in which the store was formed; empty if it was not.

        It is kept here in case the log's records get lost: a formed store must not begin again.

        Raises VolumeError: ``volume.json`` is gone or damaged.
        """
        return str(_read_identity(self.directory / _IDENTITY).get("formed", ""))

    def note_formed(self, stream_created: str) -> None:
        """Record that the store was formed; the caller holds the claim lock.

        Raises VolumeError: ``volume.json`` is gone or damaged.
        """
        path = self.directory / _IDENTITY
        _write_durably(path, _document({**_read_identity(path), "formed": stream_created}))


def check_durable(directory: Path) -> None:
    """Check that files in *directory*, which may be missing yet, survive a restart of the machine or the container.

    Raises VolumeError: they do not; the message names the file system.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if kind := ephemeral_file_system(existing):
        raise VolumeError(
            f"the data directory {directory} is on {kind}: its files are lost when the machine restarts or the "
            "container is removed. Set FI_DATA_DIR to a directory on a disk, in a container to one on a volume; "
            "FI_ALLOW_EPHEMERAL=1 allows it, for tests and demos"
        )


def identity_document(volume: str, store: str) -> str:
    """Return the content of the ``volume.json`` of a new volume."""
    return _document({"format": FORMAT, "volume": volume, "store": store})


def _document(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        uuid.UUID(found["volume"])
        return {**found, "store": str(found["store"]), "format": found["format"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VolumeError(
            f"{path} is gone or damaged: restore it; `fiq status` shows the volume of each partition"
        ) from error


def _check_identity(directory: Path, store: str) -> str:
    path = directory / _IDENTITY
    if not path.exists():
        if any(directory.glob("[0-9][0-9].h5")):
            raise VolumeError(
                f"{directory} has partition files but no volume.json: put the volume.json that belongs to them back; "
                "a new identity would orphan them"
            )
        _write_durably(path, identity_document(str(uuid.uuid4()), store))
    found = _read_identity(path)
    owner, volume, version = found["store"], str(uuid.UUID(found["volume"])), found["format"]
    if version != FORMAT:
        raise VolumeError(f"{path} has format {version!r}; this version of fiq reads format {FORMAT}")
    if owner != store:
        raise VolumeError(f"{directory} is a volume of store {owner!r}, not {store!r}: set FI_STORE or FI_DATA_DIR")
    return volume


def _write_durably(path: Path, content: str) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    StorageIO().sync_directory(path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise VolumeBusyError(
                        f"another process has held {path} for {LOCK_TIMEOUT_SECONDS:.0f} s: is it stopped or hanging?"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def backed_up_at(directory: Path) -> float:
    """Return when the newest backup of the volume in *directory* was made, Unix time; 0 for never."""
    try:
        return datetime.fromisoformat(json.loads((directory / BACKUP_NOTE).read_text())["made"]).timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def note_backup(directory: Path, made: str) -> None:
    """Record that a backup of the volume in *directory* was *made*, RFC 3339, for metrics and ``fiq doctor``.

    Raises OSError: it cannot be written there.
    """
    _write_note(directory, BACKUP_NOTE, {"made": made})


def verified(directory: Path) -> Verified | None:
    """Return what the last verification of the volume in *directory* found; None for never."""
    try:
        return read_verified((directory / VERIFY_NOTE).read_text())
    except OSError:
        return None


def note_verified(directory: Path, found: Verified) -> None:
    """Record what a verification of the volume in *directory* found. Raises OSError: it cannot be written there."""
    _write_note(directory, VERIFY_NOTE, asdict(found))


def is_volume(directory: Path) -> bool:
    """Return whether *directory* is a volume that a persister has used, and no backup of one."""
    return (directory / _IDENTITY).exists() and (directory / "workers").is_dir()


def _write_note(directory: Path, name: str, values: Mapping[str, object]) -> None:
    temporary = directory / f"{name}.new"
    temporary.write_text(json.dumps(values))
    temporary.replace(directory / name)


# -- its partitions ---------------------------------------------------------------------------------------------------

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
            "(from a backup: a NATS stream brings what is missing); an empty one would split the history"
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
