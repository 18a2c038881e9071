"""A partition file whose changes become durable all at once: the file object behind h5py's ``fileobj`` driver.

What HDF5 writes stays in memory until :meth:`JournaledFile.commit` appends it to the journal as one record. The file
itself changes only in a checkpoint, under an exclusive lock, from what the journal holds; that runs beside the commits.
After a crash, the file together with the whole records of its journal is the last commit: see docs/corpus-format.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from services.corpus.beside import Beside
from services.corpus.checkpoint import Pair, Sealed
from services.corpus.checkpointer import NO_ROOM, READER, Checkpointer
from services.corpus.committing import CommittingFile
from services.corpus.compaction import Compaction
from services.corpus.errors import CorpusIOError, CorpusUsageError, system_errors
from services.corpus.journal import Journal
from services.corpus.locks import unlock
from services.corpus.recovery import journal_path
from services.corpus.storage import StorageIO


class JournaledFile(CommittingFile):
    """A partition file open for writing; one thread, one process.

    Args:
        path: the partition file; its journal stands beside it.
        io: the seam through which everything is written.
        cached_pages: how many committed pages are kept in memory before they are read from the journal instead.
        turn_bytes: size from which the journal goes back to its front when that is free.

    Raises:
        CorpusNotFoundError: the file is missing.
        CorpusLockedError: another process writes it, or a program other than this has it open for writing.
        JournalError: the journal is missing, damaged, or of another file.
        CorpusFormatError: it is no partition file.
        CorpusIOError: the system refused.
    """

    def __init__(
        self, path: Path, *, io: StorageIO | None = None, cached_pages: int = 8192, turn_bytes: int = 32 << 20
    ) -> None:
        super().__init__(path, io=io, cached_pages=cached_pages, turn_bytes=turn_bytes)
        self._checkpointer = Checkpointer(path, self._pair())
        self._copy: tuple[Sealed, Beside[bool]] | None = None
        self._rewrite: tuple[Compaction, int, Beside[None]] | None = None

    @property
    def checkpoint_running(self) -> bool:
        """Whether a checkpoint is being made beside the commits."""
        return self._copy is not None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint or a compaction is under way."""
        return self._copy is not None or self._rewrite is not None

    def commit(self) -> int:
        """Make everything written so far durable, in one step; take note of work beside it that has ended.

        Returns:
            The bytes that went to the journal.

        Raises:
            CorpusIOError: the system refused. Whether the commit counts is open until the file is opened again.
        """
        self.collect()
        return super().commit()

    def checkpoint(self) -> bool:
        """Copy what is committed into the file, and wait for it.

        Returns:
            False when it must wait: a reader holds the file, or the disk lacks the room.

        Raises:
            CorpusIOError: the system refused in the middle; the journal still holds everything.
        """
        self._finish()
        if self._overlay.changed:
            raise CorpusUsageError("a checkpoint in the middle of a batch: commit first")
        return not self._journal.records or (self._begin(thread=False) and self._finish())

    def start_checkpoint(self) -> bool:
        """Begin to copy what is committed into the file, beside the commits.

        Returns:
            False when there is nothing to copy, other work is under way, or a reader holds the file.

        Raises:
            CorpusIOError: the system refused, now or in the one before.
        """
        self.collect()
        return bool(self._journal.records) and not self.busy and self._begin(thread=True)

    def start_compaction(self) -> bool:
        """Begin to rewrite the journal with the newest images only, beside the commits.

        Returns:
            False when other work is under way, or the system lacks the room or the thread for it.
        """
        self.collect()
        if self.busy:
            return False
        records, journal = list(self._journal.records), journal_path(self._path)
        state, turn = self._state, self._journal.turn
        try:
            compaction = Compaction(
                self._io, journal, self._wal, self.uuid, turn=turn, number=state.absorbed, link=state.link
            )
        except OSError:
            return False

        def write() -> None:
            with system_errors(f"compact {journal.name}"):
                compaction.add(records)
                # the sync of the whole, at the end, must find little to do: commits wait for that one
                self._io.fdatasync(compaction.fd)

        try:
            self._rewrite = compaction, len(records), Beside(f"compact {journal.name}", write, thread=True)
        except CorpusIOError:
            compaction.give_up()
            return False
        return True

    def collect(self) -> None:
        """Take note of work beside the commits that has ended; cheap when none has.

        Raises:
            CorpusError: a checkpoint failed.
            StoreFailedError: the file failed before.
        """
        self._check_usable()
        if (self._copy and self._copy[1].ended) or (self._rewrite and self._rewrite[2].ended):
            self._finish()

    def close(self) -> None:
        """Release the locks and the descriptors; writes nothing."""
        if self._closed:
            return
        self._closed = self._frozen = True
        # it uses the descriptors; it ends, as all that it does is bounded
        if self._copy is not None:
            self._copy[1].join()
        if self._rewrite is not None:
            self._rewrite[2].join()
            self._rewrite[0].give_up()
        for fd in (self._fd, self._wal):
            unlock(fd)
            os.close(fd)

    def _pair(self) -> Pair:
        return Pair(self._io, self.uuid, self._fd, self._wal)

    def _begin(self, *, thread: bool) -> bool:
        with self._remembered(f"lock {self.name}"):
            if not self._checkpointer.take_lock():
                return self._deferred(READER)
        self._overlay.seal()
        sealed = Sealed(tuple(self._journal.records), self._state, self._journal.turn)
        with self._remembered(f"checkpoint {self.name}"):
            self._copy = sealed, self._checkpointer.begin(sealed, thread=thread)
        return True

    def _finish(self) -> bool:
        """Wait for the work under way and take its outcome; False when a checkpoint had no room on the disk."""
        self._check_usable()
        done = True
        if self._copy is not None:
            (sealed, work), self._copy = self._copy, None
            with self._remembered(f"checkpoint {self.name}"):
                done = work.outcome()
                if done:
                    self._absorbed(sealed, work.seconds)
                else:
                    # the growth may have been taken back, and what was reserved with it; the next commit reserves again
                    self._reserved = os.fstat(self._fd).st_size
                    self._deferred(NO_ROOM)
        if self._rewrite is not None:
            (compaction, count, rewriting), self._rewrite = self._rewrite, None
            self._install(compaction, count, rewriting)
        return done

    def _absorbed(self, sealed: Sealed, seconds: float) -> None:
        """Let go of what the file holds now."""
        count = len(sealed.records)
        self._state = sealed.copied
        self._journal.turn = sealed.turn + 1
        self._journal.release(count)
        self._indexed = max(0, self._indexed - count)
        self._overlay.drop_sealed(self._index())
        # a copy that shrank the file has given back what was reserved
        self._reserved = os.fstat(self._fd).st_size
        self._journal.shrink(2 * self._turn_bytes)
        self.stats.checkpoints += 1
        self.stats.checkpoint_seconds = seconds
        self.stats.deferred_because = ""

    def _install(self, compaction: Compaction, count: int, rewriting: Beside[None]) -> None:
        """Put the compacted journal into the old one's place, with what was committed meanwhile."""
        try:
            rewriting.outcome()
            with system_errors(f"compact {self.name}.wal"):
                compaction.add(self._journal.records[count:])
                compaction.prepare()
        except CorpusIOError:
            # nothing has changed; it is tried again when the journal has grown once more
            compaction.give_up()
            return
        except BaseException:
            compaction.give_up()
            raise
        with self._remembered(f"replace {self.name}.wal"):
            try:
                compaction.install()
            except BaseException:
                # it may be the journal by now: its lock must not keep out whoever opens the file next
                compaction.give_up()
                raise
            self._take_over(compaction)

    def _take_over(self, compaction: Compaction) -> None:
        old, self._wal = self._wal, compaction.fd
        self._journal = Journal(
            self._wal,
            self._io,
            self.uuid,
            compaction.turn,
            compaction.start,
            compaction.records,
            turn_bytes=self._turn_bytes,
        )
        self._indexed = len(compaction.records)
        self._overlay.rebase(self._index(), self._wal)
        self._checkpointer.pair = self._pair()
        self.stats.compactions += 1
        unlock(old)
        os.close(old)

    def _deferred(self, reason: str) -> bool:
        self.stats.checkpoints_deferred += 1
        self.stats.deferred_because = reason
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
