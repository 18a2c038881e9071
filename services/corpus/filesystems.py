"""Refuses remote file systems: their locks and syncs do not keep what the atomic file relies on."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from services.corpus.errors import UnsupportedFileSystemError

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


def check_file_system(directory: Path) -> None:
    """Refuse a *directory* on a file system that is known to be remote.

    What cannot be told (FUSE, or a system other than Linux) is accepted.

    Raises:
        UnsupportedFileSystemError: it is a remote one; the message names its type.
    """
    kind = _REMOTE.get(_file_system_type(directory))
    if kind is not None:
        raise UnsupportedFileSystemError(
            f"{directory} is on a {kind} file system: a corpus needs a local POSIX file system (ext4, XFS, btrfs, …), "
            "since its commits rely on flock and fdatasync; move the data directory to a local disk"
        )


def _file_system_type(directory: Path) -> int:
    """Return ``f_type``, the first word of ``struct statfs`` on Linux; 0 when it cannot be told."""
    if not sys.platform.startswith("linux"):
        return 0
    buffer = ctypes.create_string_buffer(512)  # struct statfs is 120 bytes on 64-bit systems
    if ctypes.CDLL(None).statfs(os.fsencode(directory), buffer) != 0:
        return 0
    return ctypes.c_uint32.from_buffer(buffer).value if sys.byteorder == "little" else 0
