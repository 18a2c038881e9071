"""Copies a partition file and its journal into a pair that is exactly the last commit, while the writer works."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from fiq.corpus.errors import CorpusExistsError, CorpusLockedError
from fiq.corpus.wal.journal import AbsorbedState, empty_journal, journal_path, refuse_archive, write_state
from fiq.corpus.wal.recovery import Snapshot, missing_journal
from fiq.corpus.wal.storage import FILE_MODE, StorageIO, system_errors, write_all

#: how long a copy waits for the writer's checkpoints, seconds; one takes some 0.1 s
_CHECKPOINT_WAIT = 60.0
_PIECE_BYTES = 4 << 20


def copy_pair(
    source: Path, target: Path, *, io: StorageIO | None = None, on_progress: Callable[[float], None] | None = None
) -> None:
    """Copy the pair at *source*, as of its last commit, to *target* and a journal beside it.

    The copy is what a checkpoint would have made of the original: the file holds everything that was committed, the
    journal is empty, and a writer may continue from there. The two belong together as the original's do: one that is
    mixed up with an older or newer one is refused. The writer keeps committing meanwhile; its checkpoints wait.

    Args:
        source: a partition file with its journal.
        target: the partition file to make.
        io: the seam through which everything is written.
        on_progress: called with the fraction that is done.

    Raises CorpusExistsError: *target* or its journal exists; CorpusNotFoundError: there is no partition file *source*;
    CorpusLockedError: checkpoints, or another program, kept the file busy for a minute; ArchivedFileError: it is an
    archive, which any program can copy; JournalError: its journal is damaged, missing, or of another file;
    CorpusFormatError: it is no partition file; CorpusIOError: the system refused.
    """
    io = StorageIO() if io is None else io
    journal = journal_path(target)
    if os.path.lexists(target) or os.path.lexists(journal):
        raise CorpusExistsError(f"{target} or its journal exists: a copy never replaces anything")
    if source.is_file():
        refuse_archive(source)
    snapshot = _snapshot(source)
    try:
        if not snapshot.has_journal:
            raise missing_journal(source)
        with system_errors(f"copy {source.name}"):
            _write(io, target, lambda fd: _write_file(io, fd, snapshot, on_progress))
            empty = empty_journal(snapshot.uuid, number=snapshot.end.number, link=snapshot.end.link)
            _write(io, journal, lambda fd: write_all(io, fd, empty, 0))
    finally:
        snapshot.close()


def _snapshot(path: Path) -> Snapshot:
    deadline = time.monotonic() + _CHECKPOINT_WAIT
    while True:
        try:
            return Snapshot(path)  # waits for some seconds itself
        except CorpusLockedError:
            if time.monotonic() >= deadline:
                raise


def _write(io: StorageIO, path: Path, write: Callable[[int], object]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        write(fd)
        io.fsync(fd)
    finally:
        os.close(fd)


def _write_file(io: StorageIO, fd: int, snapshot: Snapshot, on_progress: Callable[[float], None] | None) -> None:
    buffer = memoryview(bytearray(_PIECE_BYTES))
    offset = 0
    while offset < snapshot.size:
        piece = buffer[: min(len(buffer), snapshot.size - offset)]
        snapshot.seek(offset)
        snapshot.readinto(piece)
        offset = write_all(io, fd, piece, offset)
        if on_progress is not None:
            on_progress(offset / snapshot.size)
    number = snapshot.end.number
    write_state(io, fd, AbsorbedState(snapshot.state.generation + 1, number, number, snapshot.end.link))
