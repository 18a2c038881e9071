"""One checkpoint: copies the sealed part of a journal into the partition file, while commits append behind it.

It runs in a thread of its own. What it touches is nobody else's at that time: the partition file, which only it
changes; the part of the journal that is sealed, which it reads; the journal's slots, which it writes. It holds the
exclusive lock of the file from the first byte to the last, so no stock reader sees a half copied state.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from services.corpus.errors import CorpusFormatError, CorpusIOError, system_errors
from services.corpus.journal import write_start
from services.corpus.journal_records import JournalRecord, Position
from services.corpus.overlay import Beside
from services.corpus.pair import State, write_state
from services.corpus.sectors import SectorIndex
from services.corpus.storage import LOCK_WAIT, StorageIO, lock, try_lock, write_all

#: reasons for which a checkpoint waits
READER = "a reader has the file open"
NO_ROOM = "the disk has no room for it"
#: bytes that are copied between two syncs: a commit's own sync must not queue behind all of them
_SYNC_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Pair:
    """What a checkpoint needs of the files.

    Attributes:
        io: the seam for every write.
        uuid: of the pair.
        file: descriptor of the partition file, exclusively locked.
        journal: descriptor of the journal.
    """

    io: StorageIO
    uuid: UUID
    file: int
    journal: int


@dataclass(frozen=True, slots=True)
class Sealed:
    """The part of a journal that is copied.

    Attributes:
        records: its records, oldest first, at least one.
        state: what the partition file says.
        turn: the journal's newest slot.
    """

    records: Sequence[JournalRecord]
    state: State
    turn: int

    @property
    def size(self) -> int:
        """Size of the partition file afterwards, bytes."""
        return self.records[-1].file_size

    @property
    def behind(self) -> Position:
        """Where the records begin that are left."""
        return self.records[-1].behind

    @property
    def copying(self) -> State:
        """What the file says while it is copied to."""
        return State(self.state.turn + 1, self.state.absorbed, self.behind.number, self.state.link)

    @property
    def copied(self) -> State:
        """What the file says afterwards."""
        number = self.behind.number
        return State(self.state.turn + 2, number, number, self.behind.link)


def copy_sealed(pair: Pair, sealed: Sealed) -> bool:
    """Copy what *sealed* holds and make it durable, then move the journal's start behind it.

    Returns:
        False, with the file as it was, when the disk has no room for its growth.

    Raises:
        OSError: the system refused in the middle; the journal still holds everything.
    """
    io, fd = pair.io, pair.file
    if not _room_for(pair, sealed.size):
        return False
    write_state(io, fd, sealed.copying)
    io.fdatasync(fd)
    _copy_images(pair, sealed)
    if os.fstat(fd).st_size != sealed.size:
        io.truncate(fd, sealed.size)
    io.fsync(fd)
    # only now may the state say so: the copy must be durable first
    write_state(io, fd, sealed.copied)
    io.fdatasync(fd)
    write_start(io, pair.journal, pair.uuid, sealed.turn + 1, sealed.behind)
    io.fdatasync(pair.journal)
    return True


def _copy_images(pair: Pair, sealed: Sealed) -> None:
    index = SectorIndex.of([record.extents for record in sealed.records])
    unsynced = 0
    for offset, content in index.runs(pair.journal):
        write_all(pair.io, pair.file, content, offset)
        unsynced += len(content)
        if unsynced >= _SYNC_BYTES:
            pair.io.fdatasync(pair.file)
            unsynced = 0


def _room_for(pair: Pair, size: int) -> bool:
    """Reserve the growth before the first byte changes, so that a full disk finds the file as it was."""
    held = os.fstat(pair.file).st_size
    if size <= held:
        return True
    try:
        pair.io.allocate(pair.file, held, size - held)
    except OSError:
        # a truncation frees what commits have reserved behind the end: only where there is something to take back
        if os.fstat(pair.file).st_size != held:
            pair.io.truncate(pair.file, held)
        return False
    return True


class Checkpointer:
    """Makes the checkpoints of one partition file.

    Args:
        path: the partition file.
        pair: its descriptors; the file is locked shared.
    """

    def __init__(self, path: Path, pair: Pair) -> None:
        self.pair = pair
        self._path = path

    def take_lock(self) -> bool:
        """Take the exclusive lock; False when a reader holds the file.

        Raises:
            CorpusError: another program writes to the file.
        """
        if try_lock(self.pair.file, exclusive=True):
            return True
        self._take_shared_lock_again()
        return False

    def begin(self, sealed: Sealed, *, thread: bool) -> Beside[bool]:
        """Copy *sealed*; the lock is held.

        Returns:
            The work, which tells whether there was room. After an error the exclusive lock stays, so that nobody sees
            what is half copied.

        Raises:
            CorpusIOError: the system refuses a thread; nothing is copied, and the lock is a shared one again.
        """

        def copy() -> bool:
            with system_errors(f"checkpoint {self._path.name}"):
                done = copy_sealed(self.pair, sealed)
            self._leave_exclusive_lock()
            return done

        try:
            return Beside(f"checkpoint {self._path.name}", copy, thread=thread)
        except CorpusIOError:
            self._leave_exclusive_lock()
            raise

    def _leave_exclusive_lock(self) -> None:
        if not try_lock(self.pair.file, exclusive=False):
            self._take_shared_lock_again()

    def _take_shared_lock_again(self) -> None:
        """Repair what a failed conversion leaves: no lock at all (flock(2))."""
        before = os.fstat(self.pair.file)
        refusal = f"another program opened {self._path.name} for writing; close it there"
        lock(self.pair.file, exclusive=False, timeout=LOCK_WAIT, refusal=refusal)
        after = os.fstat(self.pair.file)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CorpusFormatError(
                f"{self._path.name} was changed by another program between two locks; restore it from a backup"
            )
