"""Replacements of the corpus's I/O seam: one that fails on purpose, one that records what a power cut may undo."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fiq.corpus import StorageIO
from fiq.corpus.wal.storage import Buffer

_SECTOR = 512


class FailingIO(StorageIO):
    """Lets some calls through, then fails the next of a kind, once.

    Args:
        kind: ``pwrite``, ``fdatasync``, ``fsync``, ``truncate``, ``allocate``, ``reserve``, ``rename`` or
            ``sync_directory``.
        after: how many calls of that kind succeed first.
        code: the ``errno``.
        partly: whether a failing write leaves its first half behind.
    """

    def __init__(self, kind: str, after: int, code: int, *, partly: bool = False) -> None:
        self._kind = kind
        self._left = after
        self._code = code
        self._partly = partly
        self._times = 1
        self.failed = False

    def fail_after(self, calls: int, *, times: int = 1) -> None:
        """Let *calls* more of the kind through, then fail *times* of them."""
        self._left, self._times, self.failed = calls, times, False

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        if self._is_due("pwrite"):
            if self._partly:
                super().pwrite(fd, bytes(data)[: len(data) // 2], offset)
            self._fail()
        return super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self._pass("fdatasync")
        super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        self._pass("fsync")
        super().fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        self._pass("truncate")
        super().truncate(fd, size)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        self._pass("allocate")
        super().allocate(fd, offset, length)

    def reserve(self, fd: int, offset: int, length: int) -> None:
        self._pass("reserve")
        super().reserve(fd, offset, length)

    def rename(self, source: Path, target: Path) -> None:
        self._pass("rename")
        super().rename(source, target)

    def sync_directory(self, directory: Path) -> None:
        self._pass("sync_directory")
        super().sync_directory(directory)

    def _pass(self, kind: str) -> None:
        if self._is_due(kind):
            self._fail()

    def _is_due(self, kind: str) -> bool:
        if kind != self._kind or self._times == 0:
            return False
        self._left -= 1
        return self._left < 0

    def _fail(self) -> None:
        self.failed = True
        self._times -= 1
        raise OSError(self._code, os.strerror(self._code))


#: what a change does to the content of a file; torn when chance is given
_Change = Callable[[bytearray, random.Random | None], None]
#: stands for the directory among the files that are synced
_DIRECTORY = 0


@dataclass(frozen=True, slots=True)
class _Step:
    #: inode number
    file: int
    acknowledged: int
    change: _Change | None = None
    #: of a rename: the name that the file gets
    name: str = ""
    #: of a sync: how many steps there were when it began; what came before them is durable
    covers: int = 0


class RecordingIO(StorageIO):
    """Logs every change and sync of files and renames, so that the states that a power cut may leave can be built.

    Several threads may use it. A change is logged before it is done, a sync when it is done: what overlaps a sync is
    not taken for durable.

    Args:
        files: those that exist when the recording begins, in one directory.
        deaf: name of a file whose syncs are left out, to show that the states found then are bad ones.
    """

    def __init__(self, files: Sequence[Path], deaf: str = "") -> None:
        self._names = {file.name: file.stat().st_ino for file in files}
        self._start = {file.stat().st_ino: file.read_bytes() for file in files}
        self._deaf = self._names.get(deaf, -1)
        self._steps: list[_Step] = []
        # while they are open, no other file gets their inode numbers
        self._held = {number: os.open(file, os.O_RDONLY) for number, file in zip(self._start, files, strict=True)}
        #: the last sequence that a caller was told to be committed; kept by the test
        self.acknowledged = 0

    def __len__(self) -> int:
        return len(self._steps)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        content = bytes(data)
        self._changed(fd, lambda image, torn: _write(image, content, offset, torn))
        return super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        covers = len(self._steps)
        super().fdatasync(fd)
        self._synced(os.fstat(fd).st_ino, covers)

    def fsync(self, fd: int) -> None:
        covers = len(self._steps)
        super().fsync(fd)
        self._synced(os.fstat(fd).st_ino, covers)

    def truncate(self, fd: int, size: int) -> None:
        self._changed(fd, lambda image, _: _resize(image, size))
        super().truncate(fd, size)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        self._changed(fd, lambda image, _: _resize(image, max(len(image), offset + length)))
        super().allocate(fd, offset, length)

    def rename(self, source: Path, target: Path) -> None:
        self._steps.append(_Step(source.stat().st_ino, self.acknowledged, name=target.name))
        super().rename(source, target)

    def sync_directory(self, directory: Path) -> None:
        covers = len(self._steps)
        super().sync_directory(directory)
        self._synced(_DIRECTORY, covers)

    def crash_state(self, steps: int, chance: random.Random) -> tuple[dict[str, bytes], int]:
        """Build a state that a power cut after *steps* steps may leave.

        What a sync made durable is there. Of the rest each change is there, missing, or torn: some sectors of a torn
        write are there, some are not, one is garbage. A rename is done or not.

        Returns:
            The files' content by name, and the sequence that was acknowledged by then.
        """
        images = {file: bytearray(content) for file, content in self._start.items()}
        names = dict(self._names)
        durable = self._durable(steps)
        for number, step in enumerate(self._steps[:steps]):
            image = images.setdefault(step.file, bytearray())
            if step.name:
                if number < durable.get(_DIRECTORY, 0) or chance.random() < 0.5:
                    names[step.name] = step.file
            elif step.change is not None:
                if number < durable.get(step.file, 0):
                    step.change(image, None)
                elif chance.random() < 0.6:
                    step.change(image, chance if chance.random() < 0.5 else None)
        acknowledged = self._steps[steps - 1].acknowledged if steps else 0
        return {name: bytes(images[file]) for name, file in names.items()}, acknowledged

    def _durable(self, steps: int) -> dict[int, int]:
        """Return for each file the number of steps of which everything is durable after *steps* steps."""
        durable: dict[int, int] = {}
        for step in self._steps[:steps]:
            durable[step.file] = max(durable.get(step.file, 0), step.covers)
        return durable

    def _changed(self, fd: int, change: _Change) -> None:
        file = os.fstat(fd).st_ino
        if file not in self._held:
            self._held[file] = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        self._steps.append(_Step(file, self.acknowledged, change))

    def __del__(self) -> None:
        for fd in self._held.values():
            os.close(fd)

    def _synced(self, file: int, covers: int) -> None:
        if file != self._deaf:
            self._steps.append(_Step(file, self.acknowledged, covers=covers))


def _write(image: bytearray, content: bytes, offset: int, torn: random.Random | None) -> None:
    _resize(image, max(len(image), offset + len(content)))
    if torn is None:
        image[offset : offset + len(content)] = content
        return
    end = offset + len(content)
    for start in range(offset - offset % _SECTOR, end, _SECTOR):
        low, high = max(start, offset), min(start + _SECTOR, end)
        if torn.random() < 0.5:
            image[low:high] = content[low - offset : high - offset]
    broken = torn.randrange(offset // _SECTOR, -(-end // _SECTOR)) * _SECTOR
    # a sector that was being written when the power went holds anything, also where the write did not reach
    stop = min(broken + _SECTOR, len(image))
    image[broken:stop] = torn.randbytes(stop - broken)


def _resize(image: bytearray, size: int) -> None:
    if size < len(image):
        del image[size:]
    else:
        image.extend(bytes(size - len(image)))
