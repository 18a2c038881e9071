"""A volume: one data directory on one host.

::

    <data>/volume.json   identity: a UUID, the store it belongs to, and whether the store was formed
    <data>/volume.lock   held while one of the volume's processes claims partitions
    <data>/<pp>.h5       a partition file, with its journal <pp>.h5.wal; created before the partition is claimed
    <data>/corpus.h5     links to all of them
    <data>/backup.json   when the newest backup was made
    <data>/verified.json  when `fiq verify` ran last, and what it found
    <data>/workers/      a lock file for each live process
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fiq.corpus import StorageIO
from fiq.corpus.wal.storage import ephemeral_file_system
from services.log.partitions import partition_name
from services.log.status import Verified, read_verified
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
