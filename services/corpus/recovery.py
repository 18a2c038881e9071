"""Opens a partition file and its journal for writing, and finds the last commit."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from services.corpus.compaction import remove_leftover
from services.corpus.errors import CorpusLockedError, CorpusNotFoundError, JournalError, system_errors
from services.corpus.journal import read_records, read_start
from services.corpus.journal_records import JournalRecord, Position
from services.corpus.pair import State, read_state, read_uuid
from services.corpus.storage import StorageIO, lock, try_lock

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

    Raises:
        CorpusNotFoundError: the file is missing.
        CorpusLockedError: another process writes it, or a program other than this has it open for writing.
        JournalError: the journal is missing, damaged, or of another file.
        CorpusFormatError: it is no partition file.
        CorpusIOError: the system refused.
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
