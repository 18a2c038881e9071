"""The live processes of one volume, and which of them runs which partition.

Each process holds a lock on a file of its own in ``<data>/workers/``. The lock goes with the process, however it ends,
so the list is never wrong for longer than a look; it needs no broker (ADR 0002). Partitions are shared by rendezvous
hashing with an equal limit for each member, so that a member's coming or going moves little more than its own share.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path


class Members:
    """This process's membership, and a view of the others.

    Args:
        directory: the volume's ``workers`` directory; made when it is missing.
        name: unique among the volume's processes, past ones too.
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
            # between the two calls another member may have taken the file for a dead one's and removed it
            if _inode(path) == os.fstat(descriptor).st_ino:
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def alive(self) -> list[str]:
        """Return the names of the live members, this one included, sorted; remove the files of dead ones."""
        names = {self.name}
        for path in self._directory.glob("*.lock"):
            if path.stem != self.name and self._is_alive(path):
                names.add(path.stem)
        return sorted(names)

    def leave(self) -> None:
        """Disappear."""
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


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def share(partitions: Iterable[int], members: Collection[str]) -> dict[int, str]:
    """Return which member runs each partition; everybody who sees the same members gets the same answer.

    Rendezvous hashing (Thaler and Ravishankar, 1998) among the members that have room for one more: without that limit
    two members often share 16 partitions as 11 and 5.

    Args:
        partitions: what is to be shared.
        members: at least one.
    """
    ordered = sorted(partitions)
    room = Counter(dict.fromkeys(members, math.ceil(len(ordered) / len(members))))
    owners = {}
    for partition in ordered:
        candidates = [name for name, left in room.items() if left]
        owners[partition] = max(candidates, key=lambda name: _weight(name, partition))
        room[owners[partition]] -= 1
    return owners


def _weight(member: str, partition: int) -> bytes:
    return hashlib.sha256(f"{member}/{partition}".encode()).digest()
