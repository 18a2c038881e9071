"""The system calls under the write-ahead log: writes, syncs, locks, and files that appear in one step.

Every byte that is written, synced or truncated goes through :class:`StorageIO`. Tests replace it to refuse a write, to
fail a sync, or to record all of them and build the states that a power cut may leave.

Advisory locks (``flock``) on the files of a partition:

``<pp>.h5.wal``
    exclusive, held by the writer for life: there is one writer.
``<pp>.h5``
    shared, held by the writer and by every reader: HDF5 itself takes it, so stock readers open the file while the
    writer lives, and a stock ``r+`` is refused. A checkpoint holds it exclusively while it copies, 0.05 to 0.2 s.
directory
    exclusive, held while files are created.

Every wait for a lock is bounded.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from fiq.corpus.errors import CorpusIOError, CorpusLockedError, CorpusNotFoundError, UnsupportedFileSystemError

#: how long an open waits for a lock that is held only for moments, seconds
LOCK_WAIT = 5.0
#: how long a creation waits for another one in the same directory, seconds
_DIRECTORY_WAIT = 10.0
_POLL_SECONDS = 0.02
#: mode of every file that is created: the owner writes, the group (analysts) reads
FILE_MODE = 0o640
#: what can be written
Buffer = bytes | bytearray | memoryview

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of linux/falloc.h
#: ``f_type`` of statfs(2), from linux/magic.h and the file systems' own sources
_REMOTE = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x01021997: "9p",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x6B414653: "kAFS",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x7461636F: "OCFS2",
    0x01161970: "GFS2",
    0x786F4256: "vboxsf",
}
_FUSE = 0x65735546
_EPHEMERAL = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x794C7630: "overlay"}


class StorageIO:
    """The system calls that change files, as methods; each raises ``OSError``."""

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        """Write *data* at *offset*; return how many bytes were written, which may be fewer."""
        return os.pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        """Make the content and the size durable."""
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Make the content and all metadata durable."""
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        """Set the size of the file."""
        os.ftruncate(fd, size)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Reserve room on the disk, growing the file with zeros, so that a later write there cannot lack it."""
        os.posix_fallocate(fd, offset, length)

    def reserve(self, fd: int, offset: int, length: int) -> None:
        """Reserve room on the disk and keep the file's size; does nothing on file systems without fallocate(2)."""
        call = _fallocate()
        if call is not None and call(fd, _KEEP_SIZE, offset, length) != 0:
            code = ctypes.get_errno()
            if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(code, os.strerror(code))

    def rename(self, source: Path, target: Path) -> None:
        """Move *source* over *target* in one step."""
        source.replace(target)

    def sync_directory(self, directory: Path) -> None:
        """Make the directory's entries durable."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@cache
def _fallocate() -> Any:
    """Return the C library's function; None where there is none (it is Linux's)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return call


def write_all(io: StorageIO, fd: int, data: Buffer, offset: int) -> int:
    """Write the whole of *data* at *offset*, in several calls if needed; return the offset of its end."""
    view = memoryview(data).cast("B")
    while view:
        written = io.pwrite(fd, view, offset)
        offset += written
        view = view[written:]
    return offset


def read_into(fd: int, out: memoryview, offset: int) -> None:
    """Fill *out* with the bytes at *offset*; bytes past the end of the file are zeros."""
    while out:
        count = os.preadv(fd, [out], offset)
        if not count:
            out[:] = bytes(len(out))
            return
        out, offset = out[count:], offset + count


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """Return *length* bytes at *offset*, as :func:`read_into` reads them."""
    data = bytearray(length)
    read_into(fd, memoryview(data), offset)
    return bytes(data)


def replace_file(path: Path, content: bytes, io: StorageIO) -> None:
    """Put a file with *content* at *path* in one durable step; the caller holds the directory's lock.

    Raises OSError: the system refused; *path* is as it was.
    """
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    try:
        try:
            write_all(io, fd, content, 0)
            io.fsync(fd)
        finally:
            os.close(fd)
        io.rename(temporary, path)
    except BaseException:
        # a full disk gets its room back
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    io.sync_directory(path.parent)


def check_file_system(directory: Path) -> None:
    """Refuse a *directory* on a file system that is known to be remote; FUSE and systems other than Linux pass.

    Raises UnsupportedFileSystemError: it is a remote one; the message names its type.
    """
    kind = _REMOTE.get(_file_system_type(directory))
    if kind is not None:
        raise UnsupportedFileSystemError(
            f"{directory} is on a {kind} file system: a corpus needs a local POSIX file system (ext4, XFS, btrfs, …), "
            "since its commits rely on flock and fdatasync; move the data directory to a local disk"
        )


def ephemeral_file_system(directory: Path) -> str:
    """Return the type of the file system of *directory* if files there are lost with the machine or the container.

    Empty if it is another one: a tmpfs and a ramfs are in memory, an overlay is usually the root of a container.
    """
    kind = _file_system_type(directory)
    if kind == _FUSE and "fuse-overlayfs" in _mounted_as(directory.stat().st_dev):  # rootless containers
        return "overlay"
    return _EPHEMERAL.get(kind, "")


def _mounted_as(device: int, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type and the source of the file system on *device*; empty when it is unknown."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((line.partition(" - ")[2] for line in lines if line.split()[2:3] == [number]), "")


def _file_system_type(directory: Path) -> int:
    """Return ``f_type``, the first word of ``struct statfs`` on Linux; 0 when it is unknown."""
    if not sys.platform.startswith("linux"):
        return 0
    buffer = ctypes.create_string_buffer(512)  # struct statfs is 120 bytes on 64-bit systems
    if ctypes.CDLL(None).statfs(os.fsencode(directory), buffer) != 0:
        return 0
    return ctypes.c_uint32.from_buffer(buffer).value if sys.byteorder == "little" else 0


def try_lock(fd: int, *, exclusive: bool) -> bool:
    """Take or convert the lock without waiting; return whether it was taken.

    A conversion that fails loses the lock held before (flock(2)): the caller must take it again.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock(fd: int, *, exclusive: bool, timeout: float, refusal: str) -> None:
    """Take the lock, waiting for at most *timeout* seconds.

    Raises CorpusLockedError: another process held it all the time; the message is *refusal*.
    """
    deadline = time.monotonic() + timeout
    while not try_lock(fd, exclusive=exclusive):
        if time.monotonic() >= deadline:
            raise CorpusLockedError(refusal)
        time.sleep(_POLL_SECONDS)


def unlock(fd: int) -> None:
    """Release the lock, even where a duplicate of the descriptor lives on in a forked child."""
    fcntl.flock(fd, fcntl.LOCK_UN)


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Hold the directory's lock: one creation at a time, so that its temporary files are its own.

    Raises CorpusLockedError: another process held it for 10 s; CorpusNotFoundError: there is no such directory.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusNotFoundError(f"there is no directory {directory}") from None
    try:
        lock(fd, exclusive=True, timeout=_DIRECTORY_WAIT, refusal=f"another process creates files in {directory}")
        yield
    finally:
        os.close(fd)


@contextmanager
def system_errors(operation: str) -> Iterator[None]:
    """Turn an ``OSError`` or ``MemoryError`` inside the block into a CorpusIOError that names the *operation*.

    Raises CorpusIOError: the block raised one of them.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        raise CorpusIOError(f"cannot {operation}: {reason_of(error)}") from error


def reason_of(error: OSError | MemoryError) -> str:
    """Return what the system said."""
    return "out of memory" if isinstance(error, MemoryError) else error.strerror or str(error)
