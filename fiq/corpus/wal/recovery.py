"""Opens a partition file and its journal for writing, and finds the last commit."""

from __future__ import annotations

import io as memory
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import h5py

from fiq.corpus.errors import (
    CorpusExistsError,
    CorpusLockedError,
    CorpusNotFoundError,
    JournalError,
    system_errors,
)
from fiq.corpus.format import CONFLICTS, CONSULTATIONS, LIBVER, Identity, write_attributes
from fiq.corpus.wal.checkpoint import remove_leftover
from fiq.corpus.wal.journal import RECORDS_START, JournalRecord, Position, new_journal, read_records, read_start
from fiq.corpus.wal.pair import USER_BLOCK, State, new_user_block, read_state, read_uuid
from fiq.corpus.wal.storage import FILE_MODE, StorageIO, lock, try_lock, write_all

#: how long a creation waits for another one in the same directory, seconds
_DIRECTORY_WAIT = 10.0
#: how long an open waits for the lock of the partition file, seconds. With the journal's lock in hand no writer of ours
#: holds that one: a lock dies with its process and a store lets go of the file first. So who has it is another program.
_FOREIGN_WAIT = 0.2


@dataclass(frozen=True, slots=True)
class Recovered:
    """A pair that is open for writing.

    Attributes:
        file: descriptor of the partition file, locked shared.
        journal: descriptor of its journal, locked exclusively.
        uuid: of the pair.
        state: what the file says it has absorbed.
        turn: of the journal's newest slot.
        start: where its live records begin.
        records: the live records, oldest first.
        torn: whether a record was dropped that a crash had cut short.
        size: size of the content, bytes.
    """

    file: int
    journal: int
    uuid: UUID
    state: State
    turn: int
    start: Position
    records: list[JournalRecord]
    torn: bool
    size: int


def journal_path(path: Path) -> Path:
    """Return the path of the journal of the partition file at *path*."""
    return path.with_name(path.name + ".wal")


def recover(path: Path, io: StorageIO) -> Recovered:
    """Open and lock a pair and find its last commit. Writes nothing: a full disk or an open reader cannot stop it.

    Raises CorpusNotFoundError: the file is missing; CorpusLockedError: another process writes it, or a program other
    than this has it open for writing; JournalError: the journal is missing, damaged, or of another file;
    CorpusFormatError: it is no partition file; CorpusIOError: the system refused.
    """
    with ExitStack() as undo, system_errors(f"open {path.name}"):
        wal = _open_journal(path)
        undo.callback(os.close, wal)
        if not try_lock(wal, exclusive=True):
            raise CorpusLockedError(f"another process writes {path.name}: it holds the lock of {path.name}.wal")
        _check_current(path, wal)
        remove_leftover(journal_path(path))
        fd = _open_file(path)
        undo.callback(os.close, fd)
        refusal = f"{path.name} is open for writing in another program; close it there"
        lock(fd, exclusive=False, timeout=_FOREIGN_WAIT, refusal=refusal)
        recovered = _read(path, fd, wal, io)
        undo.pop_all()
    return recovered


def _read(path: Path, fd: int, wal: int, io: StorageIO) -> Recovered:
    wal_name = journal_path(path).name
    uuid, state = read_uuid(fd, path.name), read_state(fd, path.name)
    # a record that a failed sync left in memory only must not be taken for a durable one
    io.fdatasync(wal)
    os.posix_fadvise(wal, 0, 0, os.POSIX_FADV_DONTNEED)
    turn, _ = read_start(wal, uuid, wal_name)
    start, records, torn = read_records(wal, uuid, state, wal_name)
    size = records[-1].file_size if records else os.fstat(fd).st_size
    return Recovered(fd, wal, uuid, state, turn, start, records, torn, size)


def _check_current(path: Path, wal: int) -> None:
    """Refuse a journal that its writer replaced between our open and our lock."""
    journal = journal_path(path)
    if not journal.exists() or os.fstat(wal).st_ino != journal.stat().st_ino:
        raise CorpusLockedError(f"another process writes {path.name}: it has just replaced {journal.name}; try again")


def _open_file(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorpusNotFoundError(
            f"{path.name} is missing though its journal stands there: restore the file from a backup taken with it"
        ) from None


def _open_journal(path: Path) -> int:
    try:
        return os.open(journal_path(path), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if not path.exists():
            raise CorpusNotFoundError(f"there is no partition file {path.name} in {path.parent}") from None
        raise JournalError(
            f"{path.name} has no journal {path.name}.wal: commits that only the journal held may be missing; "
            "put the journal back that belongs to the file"
        ) from None


# -- Creates a partition file with its journal: both whole, or nothing that an open would accept ---------------------


def create_pair(path: Path, identity: Identity, io: StorageIO, *, begins: int = 1) -> None:
    """Create the partition file *path*, whose first stream sequence is *begins* at the earliest, and its journal.

    Both are written under temporary names and renamed, the journal first: a crash leaves at most an empty journal
    without a file, which the next creation replaces.

    Raises CorpusExistsError: the file exists; JournalError: a journal with commits in it stands there without its file;
    CorpusIOError: the system refused.
    """
    uuid = uuid4()
    with locked_directory(path.parent), system_errors(f"create {path.name}"):
        wal = journal_path(path)
        _check_vacant(path, wal)
        replace_file(wal, new_journal(uuid), io)
        replace_file(path, _image(identity, uuid, begins), io)


def replace_file(path: Path, content: bytes, io: StorageIO) -> None:
    """Put a file with *content* at *path* in one durable step; the caller holds the directory's lock.

    Raises OSError: the system refused; what stood there still does.
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


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Hold the directory's lock: one creation at a time, so that temporary files are nobody else's.

    Raises CorpusLockedError: another process held it for 10 s; CorpusNotFoundError: there is no such directory.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusNotFoundError(f"there is no directory {directory}") from None
    try:
        refusal = f"another process creates files in {directory}"
        lock(fd, exclusive=True, timeout=_DIRECTORY_WAIT, refusal=refusal)
        yield
    finally:
        os.close(fd)


def _check_vacant(path: Path, wal: Path) -> None:
    if path.exists():
        raise CorpusExistsError(f"{path.name} exists in {path.parent}; open it, or move it away")
    # a journal as creation leaves it is two blocks long, one with commits is longer
    if wal.exists() and wal.stat().st_size > RECORDS_START:
        raise JournalError(
            f"{wal.name} holds commits but {path.name} is missing: restore the file, or move the journal away"
        )


def _image(identity: Identity, uuid: UUID, begins: int) -> bytes:
    """Build the whole content of an empty partition file."""
    buffer = memory.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER, userblock_size=USER_BLOCK) as file:
        write_attributes(file, identity, str(uuid), begins=begins)
        file.create_group(CONSULTATIONS)
        file.create_group(CONFLICTS)
    content = bytearray(buffer.getvalue())
    content[:USER_BLOCK] = new_user_block(uuid)
    return bytes(content)
