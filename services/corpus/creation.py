"""Creates a partition file with its journal: both whole, or nothing that an open would accept."""

from __future__ import annotations

import io as memory
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

import h5py

from services.corpus.errors import CorpusExistsError, CorpusNotFoundError, JournalError, system_errors
from services.corpus.format import CONFLICTS, CONSULTATIONS, LIBVER, write_attributes
from services.corpus.journal import new_journal
from services.corpus.journal_scan import RECORDS_START
from services.corpus.pair import USER_BLOCK, new_user_block
from services.corpus.records import Identity
from services.corpus.recovery import journal_path
from services.corpus.storage import FILE_MODE, StorageIO, lock, write_all

#: how long a creation waits for another one in the same directory, seconds
_DIRECTORY_WAIT = 10.0


def create_pair(path: Path, identity: Identity, io: StorageIO, *, begins: int = 1) -> None:
    """Create the partition file *path*, whose first stream sequence is *begins* at the earliest, and its journal.

    Both are written under temporary names and renamed, the journal first: a crash leaves at most an empty journal
    without a file, which the next creation replaces.

    Raises:
        CorpusExistsError: the file exists.
        JournalError: a journal with commits in it stands there without its file.
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

    Raises:
        OSError: the system refused; what stood there still does.
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

    Raises:
        CorpusLockedError: another process held it for 10 s.
        CorpusNotFoundError: there is no such directory.
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
