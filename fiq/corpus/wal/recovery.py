"""Opens a partition file with its journal, for writing or for reading, at the last commit; and creates the two.

The content as of the last commit is the file with the images of all live records of its journal laid over it. Finding
it writes nothing: a full disk, a read-only mount or an open reader cannot prevent it. The writer continues from there,
and copies the records into the file with a checkpoint when it can; a reader takes a :class:`Snapshot`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from fiq.corpus.errors import CorpusExistsError, CorpusLockedError, CorpusNotFoundError, JournalError
from fiq.corpus.wal.checkpoint import remove_leftover
from fiq.corpus.wal.journal import (
    RECORDS_START,
    USER_BLOCK,
    AbsorbedState,
    LiveRecords,
    RecordPosition,
    SectorIndex,
    empty_journal,
    is_plain,
    journal_path,
    new_user_block,
    read_journal,
    read_state,
    read_uuid,
)
from fiq.corpus.wal.storage import (
    LOCK_WAIT,
    Buffer,
    StorageIO,
    lock,
    locked_directory,
    read_into,
    replace_file,
    system_errors,
    try_lock,
    unlock,
)

#: how long an open waits for the lock of the partition file, seconds. With the journal's lock in hand no writer of ours
#: holds that one: a lock dies with its process, and a store closes the file first. So another program has it.
_FOREIGN_WAIT = 0.2


# -- Open for writing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenPair:
    """A partition file and its journal, open for writing."""

    file: int  #: descriptor of the partition file, locked shared
    journal: int  #: descriptor of its journal, locked exclusively
    uuid: UUID  #: of the pair
    state: AbsorbedState  #: what the file has absorbed
    live: LiveRecords  #: the live part of the journal
    size: int  #: size of the content, bytes


def open_pair(path: Path, io: StorageIO) -> OpenPair:
    """Open and lock a pair and find its last commit.

    Raises CorpusNotFoundError: the file is missing; CorpusLockedError: another process writes it, or another program
    has it open for writing; JournalError: the journal is missing, damaged, or of another file; CorpusFormatError: it is
    no partition file; CorpusIOError: the system refused.
    """
    name, journal = path.name, journal_path(path)
    with ExitStack() as undo, system_errors(f"open {name}"):
        wal = _open_journal(path)
        undo.callback(os.close, wal)
        if not try_lock(wal, exclusive=True):
            raise CorpusLockedError(f"another process writes {name}: it holds the lock of {journal.name}")
        if not journal.exists() or os.fstat(wal).st_ino != journal.stat().st_ino:
            raise CorpusLockedError(f"another process writes {name}: it has just replaced {journal.name}; try again")
        remove_leftover(journal)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CorpusNotFoundError(
                f"{name} is missing though its journal is there: restore the file from a backup taken with it"
            ) from None
        undo.callback(os.close, fd)
        refusal = f"{name} is open for writing in another program; close it there"
        lock(fd, exclusive=False, timeout=_FOREIGN_WAIT, refusal=refusal)
        uuid, state = read_uuid(fd, name), read_state(fd, name)
        # a record that a failed sync left in memory only must not be taken for a durable one
        io.fdatasync(wal)
        os.posix_fadvise(wal, 0, 0, os.POSIX_FADV_DONTNEED)
        live = read_journal(wal, uuid, state, journal.name)
        size = live.records[-1].file_size if live.records else os.fstat(fd).st_size
        undo.pop_all()
    return OpenPair(fd, wal, uuid, state, live, size)


def _open_journal(path: Path) -> int:
    try:
        return os.open(journal_path(path), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if not path.exists():
            raise CorpusNotFoundError(f"there is no partition file {path.name} in {path.parent}") from None
        raise missing_journal(path) from None


def missing_journal(path: Path) -> JournalError:
    """Return the error to raise when the partition file at *path* needs a journal and has none."""
    return JournalError(
        f"{path.name} has no journal {path.name}.wal: commits that only the journal held may be missing; "
        "put back the journal that belongs to the file"
    )


# -- Open for reading -------------------------------------------------------------------------------------------------


class Snapshot:
    """The content as of the last commit before the open: a file object for h5py's ``fileobj`` driver.

    While it is open it holds the shared lock that stock readers hold, so the file does not change; the writer keeps
    committing, but its checkpoints wait. Without the journal the content is that of the last checkpoint.

    Args:
        path: the partition file.

    Raises:
        CorpusNotFoundError: there is no such file.
        CorpusLockedError: a checkpoint took longer than 5 s, or a program has the file open for writing.
        CorpusFormatError: it is no partition file.
        JournalError: its journal is damaged or of another file, or missing when it is needed.
        CorpusIOError: the system refused.
    """

    def __init__(self, path: Path) -> None:
        self._position = 0
        self._closed = False
        #: the error that a read met, which HDF5 hides
        self.failure: OSError | MemoryError | None = None
        with ExitStack() as undo, system_errors(f"open {path.name}"):
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise CorpusNotFoundError(f"there is no partition file {path}") from None
            undo.callback(os.close, self._fd)
            refusal = f"{path.name} is being written to, by a checkpoint or by another program; try again"
            lock(self._fd, exclusive=False, timeout=LOCK_WAIT, refusal=refusal)
            if is_plain(self._fd):
                self.uuid, self.state, self._wal = UUID(int=0), AbsorbedState(0, 0, 0, 0), -1
            else:
                self.uuid, self.state = read_uuid(self._fd, path.name), read_state(self._fd, path.name)
                self._wal = self._open_journal(path)
            live = LiveRecords(0, RecordPosition(self.state.absorbed, self.state.link, RECORDS_START), [])
            if self._wal >= 0:
                undo.callback(os.close, self._wal)
                live = read_journal(self._wal, self.uuid, self.state, journal_path(path).name)
            self._index = SectorIndex.of([record.extents for record in live.records])
            self.size = live.records[-1].file_size if live.records else os.fstat(self._fd).st_size
            undo.pop_all()
        #: number and link of the record that the next commit writes
        self.end = live.next
        #: how many commits only the journal holds
        self.journal_records = len(live.records)

    @property
    def has_journal(self) -> bool:
        """Whether the journal was there."""
        return self._wal >= 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, as files do."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fill the whole *buffer*; bytes past the end are zeros."""
        view = memoryview(buffer).cast("B")
        try:
            self._fill(view)
        except (OSError, MemoryError) as error:
            self.failure = error  # h5py hides it
            raise
        self._position += len(view)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        """Return *size* bytes, or all up to the end."""
        buffer = bytearray(max(0, self.size - self._position) if size < 0 else size)
        self.readinto(buffer)
        return bytes(buffer)

    def flush(self) -> None:
        """Do nothing: h5py calls it."""

    def close(self) -> None:
        """Release the lock and the descriptors."""
        if self._closed:
            return
        self._closed = True
        unlock(self._fd)
        os.close(self._fd)
        if self._wal >= 0:
            os.close(self._wal)

    def _fill(self, view: memoryview) -> None:
        if self._closed:
            raise OSError("the file is closed")
        read_into(self._fd, view, self._position)
        if len(self._index):
            self._index.patch(self._wal, self._position, view)

    def _open_journal(self, path: Path) -> int:
        try:
            return os.open(journal_path(path), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if self.state.target != self.state.absorbed:
                raise JournalError(
                    f"{path.name} was copied in the middle of a checkpoint: it is usable only with its journal "
                    f"{path.name}.wal; copy both"
                ) from None
            return -1


# -- Create -----------------------------------------------------------------------------------------------------------


def create_pair(path: Path, content: Callable[[UUID], bytes], io: StorageIO) -> None:
    """Create the partition file *path* and its journal: both whole, or nothing that an open would accept.

    Both are written under temporary names and renamed, the journal first: a crash leaves at most an empty journal
    without a file, which the next creation replaces.

    Args:
        content: makes the file's content for the UUID of the pair; its first 16 KiB are replaced by the user block.

    Raises CorpusExistsError: the file exists; JournalError: a journal with commits is there without its file;
    CorpusLockedError: another process creates files there; CorpusNotFoundError: there is no such directory;
    CorpusIOError: the system refused.
    """
    uuid = uuid4()
    with locked_directory(path.parent), system_errors(f"create {path.name}"):
        wal = journal_path(path)
        if path.exists():
            raise CorpusExistsError(f"{path.name} exists in {path.parent}; open it, or move it away")
        # a journal as creation leaves it is two blocks long, one with commits is longer
        if wal.exists() and wal.stat().st_size > RECORDS_START:
            raise JournalError(
                f"{wal.name} holds commits but {path.name} is missing: restore the file, or move the journal away"
            )
        replace_file(wal, empty_journal(uuid), io)
        replace_file(path, new_user_block(uuid) + content(uuid)[USER_BLOCK:], io)
