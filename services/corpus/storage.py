"""Every byte that the atomic file writes, syncs or truncates goes through this one seam.

Tests replace it to refuse a write, to fail a sync, or to record all of them and build the states that a power cut may
leave behind.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

#: what can be written
Buffer = bytes | bytearray | memoryview

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of linux/falloc.h
#: the file mode of everything that is created: analysts read through their group, nobody else does
FILE_MODE = 0o640


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
        """Reserve room on the disk without a change of the file's size; nothing where the file system cannot."""
        reserve_blocks(fd, offset, length)

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


def write_all(io: StorageIO, fd: int, data: Buffer, offset: int) -> int:
    """Write the whole of *data* at *offset*, however often the system stops short; return the offset behind it."""
    view = memoryview(data).cast("B")
    while view:
        written = io.pwrite(fd, view, offset)
        offset += written
        view = view[written:]
    return offset


def read_into(fd: int, out: memoryview, offset: int) -> None:
    """Fill *out* with the bytes at *offset*; what lies past the end of the file reads as zeros."""
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


def reserve_blocks(fd: int, offset: int, length: int) -> None:
    """Call fallocate(2) so that the file keeps its size.

    Raises:
        OSError: the disk lacks the room. A file system that knows no such call is none.
    """
    call = _fallocate()
    if call is not None and call(fd, _KEEP_SIZE, offset, length) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))


@cache
def _fallocate() -> Any:
    """Return the C library's function; None where there is none (it is Linux's)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return call
