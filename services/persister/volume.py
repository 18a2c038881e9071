"""A volume: one data directory on one host.

::

    <data>/volume.json   who the volume is: a UUID made once, and the store it belongs to
    <data>/volume.lock   held while one of the volume's processes claims partitions
    <data>/<pp>.h5       a partition file, with its journal <pp>.h5.wal
    <data>/<pp>.claim    a claim that is under way: its file may still be missing
    <data>/corpus.h5     opens all of them together
    <data>/workers/      a lock file for each live process
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.eventlog.partitions import partition_name
from services.persister.errors import VolumeBusyError, VolumeError

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
        uuid: made when the volume was first used; consumers and partition files name it.
        store: the store it belongs to.
    """

    directory: Path
    uuid: str
    store: str

    @classmethod
    def open(cls, directory: Path, store: str) -> Volume:
        """Open the volume in *directory*; make the directory and its identity when it is empty.

        Raises:
            VolumeError: it belongs to another store, has partition files but no identity, or cannot be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o750)
            with _locked(directory / "volume.lock"):
                return cls(directory, _identity(directory, store), store)
        except OSError as error:
            raise VolumeError(f"cannot use the data directory {directory}: {error.strerror}") from error

    def file(self, partition: int) -> Path:
        """Return the path of a partition's file."""
        return self.directory / f"{partition_name(partition)}.h5"

    def room(self) -> tuple[int, int]:
        """Return how many bytes this process may still write on the volume's file system, and that one's size.

        Raises:
            OSError: the directory cannot be reached.
        """
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    @property
    def workers(self) -> Path:
        """The directory of the live processes' lock files."""
        return self.directory / "workers"

    @asynccontextmanager
    async def claiming(self) -> AsyncIterator[None]:
        """Be the only process of the volume that claims partitions.

        Raises:
            VolumeBusyError: another process has been claiming for longer than it can take.
        """
        with ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, _locked(self.directory / "volume.lock"))
            yield

    def mark_claim(self, partition: int, epoch: int) -> None:
        """Note durably that *partition* is about to be claimed with *epoch*, so that a missing file is no loss yet."""
        marker = self._marker(partition)
        with open(marker, "w", encoding="ascii") as file:
            file.write(claim_marker(self.uuid, epoch))
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(self.directory)

    def claim_marked(self, partition: int) -> bool:
        """Whether a claim of *partition* is under way."""
        return self._marker(partition).exists()

    def claimed_epoch(self, partition: int) -> int | None:
        """Return the epoch with which a claim of *partition* is under way; None when none is."""
        try:
            written = self._marker(partition).read_text(encoding="ascii").split()
        except FileNotFoundError:
            return None
        return int(written[1]) if len(written) > 1 else FIRST_EPOCH

    def clear_claim(self, partition: int) -> None:
        """Note durably that the partition's file exists, or that another volume won: before anything is written."""
        marker = self._marker(partition)
        if marker.exists():
            marker.unlink()
            _sync_directory(self.directory)

    def _marker(self, partition: int) -> Path:
        return self.directory / f"{partition_name(partition)}.claim"


def claim_marker(volume: str, epoch: int) -> str:
    """Return what ``<pp>.claim`` contains: who claims, and with which epoch."""
    return f"{volume}\n{epoch}\n"


def _identity(directory: Path, store: str) -> str:
    path = directory / "volume.json"
    if not path.exists():
        if any(directory.glob("[0-9][0-9].h5")):
            raise VolumeError(
                f"{directory} has partition files but no volume.json: put the volume.json that belongs to them back; "
                "a new identity would orphan them"
            )
        identity = {"format": FORMAT, "volume": str(uuid.uuid4()), "store": store}
        _write_durably(path, json.dumps(identity, indent=2) + "\n")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        owner, volume, version = found["store"], str(uuid.UUID(found["volume"])), found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise VolumeError(f"{path} is damaged: restore it; the consumers' metadata name the volume") from error
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
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        _wait_for_lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise VolumeBusyError(
                    f"another process has held {path} for {LOCK_TIMEOUT_SECONDS:.0f} s: is it stopped or hanging?"
                ) from None
            time.sleep(0.02)
        else:
            return
