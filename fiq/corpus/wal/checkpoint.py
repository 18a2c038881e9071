"""Checkpoints and compactions: the two ways to shorten a journal. Both run in a thread while commits are appended.

A **checkpoint** copies the newest image of every sector from the records that are live when it begins into the
partition file. It alone changes that file, and it holds the file's exclusive lock from the first byte to the last, so
no stock reader sees a half copied state. Only after the copy is durable do the file's state and the journal's slot say
so.

A **compaction** rewrites a journal that outgrows its limit while a reader holds checkpoints back. The new journal has
one record with the newest image of every sector, and one more with what was committed meanwhile. It replaces the old
one by a rename: a crash finds the one or the other, whole. Readers that have the old one open keep reading it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Generic, TypeVar
from uuid import UUID

from fiq.corpus.errors import CorpusError, CorpusFormatError, CorpusIOError
from fiq.corpus.wal.journal import (
    RECORDS_START,
    AbsorbedState,
    JournalRecord,
    LiveRecords,
    RecordPosition,
    SectorIndex,
    empty_journal,
    write_record,
    write_start,
    write_state,
)
from fiq.corpus.wal.storage import FILE_MODE, LOCK_WAIT, StorageIO, lock, system_errors, try_lock, unlock, write_all

#: reasons for which a checkpoint is deferred
READER = "a reader has the file open"
NO_ROOM = "the disk has no room for it"
#: bytes that are copied between two syncs: a commit's own sync must not wait for all of them
_SYNC_BYTES = 1 << 20

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """A piece of work in a thread, and its result.

    Args:
        name: of the thread, and for messages.
        work: what to do; raises the corpus's errors.
        thread: whether it runs in a thread; otherwise it is done when the constructor returns.

    Raises CorpusIOError: the system refused a thread; nothing was done.
    """

    def __init__(self, name: str, work: Callable[[], T], *, thread: bool = True) -> None:
        self._name = name
        self._work = work
        self._result: list[T] = []
        self._error: CorpusError | None = None
        #: how long it took
        self.seconds = 0.0
        self._thread = Thread(target=self._run, name=name) if thread else None
        if self._thread is None:
            self._run()
            return
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:
            raise CorpusIOError(f"cannot {name}: {str(error) or 'out of memory'}") from error

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> T:
        """Wait for the end and return what the work returned. Raises CorpusError: it failed."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result[0]

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._result.append(self._work())
        except CorpusError as error:
            self._error = error
        except MemoryError as error:
            self._error = CorpusIOError(f"cannot {self._name}: out of memory")
            self._error.__cause__ = error
        except Exception as error:  # noqa: BLE001 - a thread's error must not be lost, whatever it is
            self._error = CorpusFormatError(f"{self._name} failed: {type(error).__name__}")
            self._error.__cause__ = error
        self.seconds = time.monotonic() - started


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint of a partition file, which is exclusively locked."""

    io: StorageIO  #: the seam for every write
    name: str  #: of the partition file, for messages
    uuid: UUID  #: of the pair
    file: int  #: descriptor of the partition file
    journal: int  #: descriptor of the journal
    records: Sequence[JournalRecord]  #: the records to copy, oldest first, at least one
    state: AbsorbedState  #: what the partition file says
    generation: int  #: of the journal's valid slot

    @property
    def state_after(self) -> AbsorbedState:
        """What the partition file says afterwards."""
        end = self.records[-1].next_position
        return AbsorbedState(self.state.generation + 2, end.number, end.number, end.link)

    def run(self) -> bool:
        """Copy, and go back to the shared lock; after an error the exclusive one stays, so that no reader sees half a
        copy.

        Returns:
            False, with the file as it was, when the disk has no room for its growth.

        Raises CorpusError: the system refused in the middle; the journal still holds everything.
        """
        with system_errors(f"checkpoint {self.name}"):
            done = self._copy()
        leave_exclusive_lock(self.file, self.name)
        return done

    def _copy(self) -> bool:
        io, fd, size = self.io, self.file, self.records[-1].file_size
        if not self._has_room(size):
            return False
        after, before = self.state_after, self.state
        write_state(io, fd, AbsorbedState(before.generation + 1, before.absorbed, after.target, before.link))
        io.fdatasync(fd)
        self._copy_images()
        if os.fstat(fd).st_size != size:
            io.truncate(fd, size)
        io.fsync(fd)
        # only now may the state say so: the copy must be durable first
        write_state(io, fd, after)
        io.fdatasync(fd)
        write_start(io, self.journal, self.uuid, self.generation + 1, self.records[-1].next_position)
        io.fdatasync(self.journal)
        return True

    def _copy_images(self) -> None:
        unsynced = 0
        for offset, content in SectorIndex.of([record.extents for record in self.records]).runs(self.journal):
            write_all(self.io, self.file, content, offset)
            unsynced += len(content)
            if unsynced >= _SYNC_BYTES:
                self.io.fdatasync(self.file)
                unsynced = 0

    def _has_room(self, size: int) -> bool:
        """Reserve the growth before the first byte changes, so that a full disk leaves the file as it was."""
        held = os.fstat(self.file).st_size
        if size <= held:
            return True
        try:
            self.io.allocate(self.file, held, size - held)
        except OSError:
            # a truncation frees what commits have reserved after the end: only if there is something to take back
            if os.fstat(self.file).st_size != held:
                self.io.truncate(self.file, held)
            return False
        return True


def take_exclusive_lock(file: int, name: str) -> bool:
    """Convert the shared lock of a partition file; return False, with the shared one, if a reader holds the file.

    Raises CorpusError: another program writes to the file.
    """
    if try_lock(file, exclusive=True):
        return True
    _take_shared_lock_again(file, name)
    return False


def leave_exclusive_lock(file: int, name: str) -> None:
    """Go back to the shared lock. Raises as :func:`take_exclusive_lock`."""
    if not try_lock(file, exclusive=False):
        _take_shared_lock_again(file, name)


def _take_shared_lock_again(file: int, name: str) -> None:
    """Repair what a failed conversion leaves: no lock at all (flock(2))."""
    before = os.fstat(file)
    refusal = f"another program opened {name} for writing; close it there"
    lock(file, exclusive=False, timeout=LOCK_WAIT, refusal=refusal)
    after = os.fstat(file)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CorpusFormatError(f"{name} was changed by another program between two locks; restore it from a backup")


class Compaction:
    """A new journal that is going to replace the old one.

    Args:
        path: the journal.
        old: its descriptor.
        generation: of its valid slot.
        state: what the partition file has absorbed.
    """

    def __init__(
        self, io: StorageIO, path: Path, old: int, uuid: UUID, *, generation: int, state: AbsorbedState
    ) -> None:
        self._io = io
        self._path = path
        self._old = old
        self._uuid = uuid
        self._temporary = _temporary(path)
        self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
        start = RecordPosition(state.absorbed, state.link, RECORDS_START)
        # an odd generation: an empty journal has the second slot
        self.live = LiveRecords(generation + 2 - (generation + 1) % 2, start, [])

    def add(self, records: Sequence[JournalRecord]) -> None:
        """Write one record that stands for *records* of the old journal, without those that the file has absorbed.

        Raises OSError: the system refused.
        """
        records = [record for record in records if record.number >= self.live.start.number]
        if not records:
            return
        at, last = self.live.next, records[-1]
        index = SectorIndex.of([record.extents for record in records])
        images = (content for _, content in index.runs(self._old))
        count = last.number + last.count - at.number
        new = write_record(self._io, self.fd, self._uuid, at, last.file_size, index.table(), images, count=count)
        self.live.records.append(new)

    def prepare(self) -> None:
        """Make the new journal durable, and lock it for the writer. Raises OSError: the system refused."""
        generation, start, *_ = self.live
        head = empty_journal(self._uuid, generation=generation, number=start.number, link=start.link)
        write_all(self._io, self.fd, head, 0)
        self._io.fsync(self.fd)
        if not try_lock(self.fd, exclusive=True):
            raise BlockingIOError(f"another process has locked {self._temporary.name}")

    def install(self) -> None:
        """Put the new journal into the old one's place.

        Raises OSError: the system refused; which of the two will be found is open.
        """
        self._io.rename(self._temporary, self._path)
        self._io.sync_directory(self._path.parent)

    def give_up(self) -> None:
        """Close the new journal, and remove it unless it has replaced the old one already."""
        # if it cannot be removed now, the next open removes it
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        unlock(self.fd)
        os.close(self.fd)


def remove_leftover(path: Path) -> None:
    """Remove what a crash left of a compaction of the journal at *path*; the caller holds the journal's lock."""
    _temporary(path).unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".new")
