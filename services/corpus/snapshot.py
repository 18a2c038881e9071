"""A read-only view of a partition file that sees every commit, while the writer works, from any process."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from services.corpus.errors import CorpusNotFoundError, JournalError, system_errors
from services.corpus.journal import read_records
from services.corpus.journal_records import Position
from services.corpus.journal_scan import RECORDS_START
from services.corpus.pair import State, read_state, read_uuid
from services.corpus.recovery import journal_path
from services.corpus.sectors import SectorIndex
from services.corpus.storage import LOCK_WAIT, Buffer, lock, read_into, unlock


class SnapshotFile:
    """The content as of the last commit before the opening: a file object for h5py's ``fileobj`` driver.

    While it is open it holds the shared lock that stock readers hold, so the file does not change; the writer goes on
    committing, but its checkpoints wait. Nothing is written: a read-only mount serves. Where the journal is missing,
    the content is that of the last checkpoint.

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
        self._path = path
        self._position = 0
        self._closed = False
        #: the error that a read met, which HDF5 hides
        self.failure: Exception | None = None
        with ExitStack() as undo, system_errors(f"open {path.name}"):
            self._fd = _open(path)
            undo.callback(os.close, self._fd)
            refusal = f"{path.name} is being written to, by a checkpoint or by another program; try again"
            lock(self._fd, exclusive=False, timeout=LOCK_WAIT, refusal=refusal)
            self.uuid, self.state = uuid, state = read_uuid(self._fd, path.name), read_state(self._fd, path.name)
            self._wal = self._open_journal(state)
            if self._wal >= 0:
                undo.callback(os.close, self._wal)
                _, records, _ = read_records(self._wal, uuid, state, journal_path(path).name)
            else:
                records = []
            self._index = SectorIndex.of([record.extents for record in records])
            self.size = records[-1].file_size if records else os.fstat(self._fd).st_size
            undo.pop_all()
        #: the record that the next commit writes: its number, and the link to the one before; the offset says nothing
        self.end = records[-1].behind if records else Position(state.absorbed, state.link, RECORDS_START)
        #: how many commits only the journal holds
        self.journal_records = len(records)

    @property
    def has_journal(self) -> bool:
        """Whether the journal was there."""
        return self._wal >= 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, as files do."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fill the whole *buffer*, with zeros past the end."""
        view = memoryview(buffer).cast("B")
        try:
            self._fill(view)
        except OSError as error:
            self.failure = error
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
            view[:] = bytes(len(view))
            return
        read_into(self._fd, view, self._position)
        if len(self._index):
            self._index.patch(self._wal, self._position, view)

    def _open_journal(self, state: State) -> int:
        try:
            return os.open(journal_path(self._path), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if state.target != state.absorbed:
                raise JournalError(
                    f"{self._path.name} was copied in the middle of a checkpoint: it is of use only with its journal "
                    f"{self._path.name}.wal; copy both"
                ) from None
            return -1


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorpusNotFoundError(f"there is no partition file {path}") from None
