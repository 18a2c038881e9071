"""One checkpoint: copies the sealed part of a journal into the partition file, while commits append behind it.

It runs in a thread of its own. What it touches is nobody else's at that time: the partition file, which only it
changes; the part of the journal that is sealed, which it reads; the journal's slots, which it writes. It holds the
exclusive lock of the file from the first byte to the last, so no stock reader sees a half copied state.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from fiq.corpus.errors import CorpusFormatError, CorpusIOError, system_errors
from fiq.corpus.wal.journal import (
    HEADER_BYTES,
    RECORDS_START,
    JournalRecord,
    Position,
    padded_table,
    seal,
    slots,
    write_start,
)
from fiq.corpus.wal.overlay import Beside, SectorIndex
from fiq.corpus.wal.pair import State, write_state
from fiq.corpus.wal.storage import FILE_MODE, LOCK_WAIT, StorageIO, lock, try_lock, unlock, write_all

#: reasons for which a checkpoint waits
READER = "a reader has the file open"
NO_ROOM = "the disk has no room for it"
#: bytes that are copied between two syncs: a commit's own sync must not queue behind all of them
_SYNC_BYTES = 1 << 20


# -- Rewrites a journal that has outgrown its limit, while a reader holds checkpoints back ---------------------------
#
# The new journal has one record with the newest image of every sector, and one more with what was committed while
# that was written. It takes the old one's place by a rename: a crash finds the one or the other, whole. Readers that
# have the old one open go on reading it.


class Compaction:
    """A new journal, on its way to replace the old one.

    Args:
        path: the journal.
        old: its descriptor.
        turn: of its newest slot.
        number: number of the first record that the partition file lacks.
        link: header CRC of the record before that.
    """

    def __init__(self, io: StorageIO, path: Path, old: int, uuid: UUID, *, turn: int, number: int, link: int) -> None:
        self._io = io
        self._path = path
        self._old = old
        self._uuid = uuid
        self._temporary = path.with_name(path.name + ".new")
        self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
        #: the slot with an odd turn is the second one
        self.turn = turn + 2 - (turn + 1) % 2
        self.start = Position(number, link, RECORDS_START)
        self.records: list[JournalRecord] = []

    def add(self, records: list[JournalRecord]) -> None:
        """Write one record that stands for *records* of the old journal; those that the file has are left out.

        Raises OSError: the system refused.
        """
        records = [record for record in records if record.number >= self.start.number]
        if records:
            position = self.records[-1].behind if self.records else self.start
            index = SectorIndex.of([record.extents for record in records])
            self.records.append(self._write(position, index, records))

    def prepare(self) -> None:
        """Make the new journal durable, and lock it for the writer. Raises OSError: the system refused."""
        write_all(self._io, self.fd, slots(self._uuid, self.turn, self.start), 0)
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
        """Let go of the new journal, and remove it unless it has taken the old one's place already."""
        # what cannot be removed now is removed by the next open
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        unlock(self.fd)
        os.close(self.fd)

    def _write(self, position: Position, index: SectorIndex, records: list[JournalRecord]) -> JournalRecord:
        table = index.table()
        body = padded_table(table)
        crc = zlib.crc32(body)
        place = position.offset + HEADER_BYTES + len(body)
        for _, content in index.runs(self._old):
            crc = zlib.crc32(content, crc)
            place = write_all(self._io, self.fd, content, place)
        last = records[-1]
        count = last.number + last.count - position.number
        header, record = seal(self._uuid, position, last.file_size, table, len(index), crc, count=count)
        write_all(self._io, self.fd, header + body, position.offset)
        write_all(self._io, self.fd, bytes(record.end - place), place)
        return record


def remove_leftover(path: Path) -> None:
    """Remove what a crash left of a compaction; the caller holds the journal's lock."""
    path.with_name(path.name + ".new").unlink(missing_ok=True)


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

    Raises OSError: the system refused in the middle; the journal still holds everything.
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

        Raises CorpusError: another program writes to the file.
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

        Raises CorpusIOError: the system refuses a thread; nothing is copied, and the lock is a shared one again.
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
