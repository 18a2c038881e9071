"""The commits of a partition file: what HDF5 wrote becomes durable as one record of the journal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from services.corpus.errors import system_errors
from services.corpus.file_object import FileObject
from services.corpus.journal import Journal
from services.corpus.overlay import PageOverlay
from services.corpus.recovery import journal_path, recover
from services.corpus.sectors import SectorIndex
from services.corpus.storage import StorageIO

#: growth of the file that is reserved on the disk ahead of the commits, bytes
_RESERVE_BYTES = 1 << 20


@dataclass(slots=True)
class FileStats:
    """What a journaled file has done since it was opened."""

    commits: int = 0
    checkpoints: int = 0
    #: checkpoints put off since a reader held the file, or the disk had no room for them
    checkpoints_deferred: int = 0
    #: why the last checkpoint was put off; empty after one that was done
    deferred_because: str = ""
    #: duration of the last checkpoint
    checkpoint_seconds: float = 0.0
    #: how often the journal was compacted while checkpoints had to wait
    compactions: int = 0
    #: bytes written to the journal
    journaled_bytes: int = 0
    #: records found in the journal when the file was opened
    records_recovered: int = 0
    #: records dropped then because a crash had cut them short
    torn_records: int = 0


class CommittingFile(FileObject):
    """A file object whose content commits to a journal. :class:`~services.corpus.atomic_file.JournaledFile` is whole.

    Args:
        path: the partition file; its journal stands beside it.
        io: the seam through which everything is written.
        cached_pages: how many committed pages are kept in memory before they are read from the journal instead.
        turn_bytes: size from which the journal goes back to its front when that is free.

    Raises:
        CorpusError: see :func:`~services.corpus.recovery.recover`.
    """

    def __init__(
        self, path: Path, *, io: StorageIO | None = None, cached_pages: int = 8192, turn_bytes: int = 32 << 20
    ) -> None:
        self._io = StorageIO() if io is None else io
        self._path = path
        self._cached_pages = cached_pages
        self._turn_bytes = turn_bytes
        found = recover(path, self._io)
        self.uuid = found.uuid
        self._fd, self._wal, self._state = found.file, found.journal, found.state
        self._journal = Journal(
            self._wal, self._io, found.uuid, found.turn, found.start, found.records, turn_bytes=turn_bytes
        )
        #: how many live records no page in memory covers
        self._indexed = len(found.records)
        self._reserved = os.fstat(self._fd).st_size
        super().__init__(path.name, PageOverlay(self._fd, self._wal, found.size, self._index()))
        self.stats = FileStats(records_recovered=len(found.records), torn_records=int(found.torn))

    @property
    def in_place(self) -> bool:
        """Whether the open file and journal are still those at their paths.

        Raises:
            CorpusIOError: the system refused to tell.
        """
        with system_errors(f"look for {self._path.name}"):
            try:
                return all(
                    os.path.samestat(os.fstat(descriptor), path.stat())
                    for descriptor, path in ((self._fd, self._path), (self._wal, journal_path(self._path)))
                )
            except FileNotFoundError:
                return False

    @property
    def journal_bytes(self) -> int:
        """Bytes of the journal that wait for a checkpoint."""
        return self._journal.bytes_live

    @property
    def memory_bytes(self) -> int:
        """Memory that changed pages take."""
        return self._overlay.bytes_held

    def commit(self) -> int:
        """Make everything written so far durable, in one step.

        Returns:
            The bytes that went to the journal.

        Raises:
            CorpusIOError: the system refused. Whether the commit counts is open until the file is opened again.
        """
        self._check_usable()
        if not self._overlay.changed:
            return 0
        before = self._journal.bytes_live
        with self._remembered(f"commit to {journal_path(self._path).name}"):
            self._reserve(self._overlay.size)
            self._journal.append(self._overlay.size, *self._overlay.changes())
        self._overlay.commit()
        self._bound_memory()
        written = self._journal.bytes_live - before
        self.stats.commits += 1
        self.stats.journaled_bytes += written
        return written

    def discard(self) -> None:
        """Drop what was written since the last commit, and all that is written from now on.

        HDF5 writes when its handles are closed; a closing file must not take that in.
        """
        self._frozen = True

    def rollback(self) -> None:
        """Drop the batch and take writes again; the caller has closed every HDF5 handle of the file."""
        self._indexed = len(self._journal.records)
        self._overlay.rollback(self._index())
        self._frozen = False

    def _bound_memory(self) -> None:
        if self._overlay.pages > self._cached_pages:
            newer = self._journal.records[self._indexed :]
            self._indexed += len(newer)
            self._overlay.rebase(self._overlay.index.with_newer([record.extents for record in newer]))

    def _index(self) -> SectorIndex:
        """Index the records that no page in memory covers."""
        return SectorIndex.of([record.extents for record in self._journal.records[: self._indexed]])

    def _reserve(self, size: int) -> None:
        """Reserve the room of the next checkpoint: what is committed can always be copied, however full the disk."""
        if size <= self._reserved:
            return
        held = self._reserved
        try:
            self._io.reserve(self._fd, held, size + _RESERVE_BYTES - held)
            self._reserved = size + _RESERVE_BYTES
        except OSError:
            self._io.reserve(self._fd, held, size - held)
            self._reserved = size
