"""A partition file whose changes become durable all at once: the file object behind h5py's ``fileobj`` driver.

What HDF5 writes stays in memory until :meth:`JournaledFile.commit` appends it to the journal as one record. The file
itself changes only in a checkpoint, under an exclusive lock, from what the journal holds; that runs beside the commits.
After a crash, the file together with the whole records of its journal is the last commit: see docs/corpus-format.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fiq.corpus.errors import (
    CorpusError,
    CorpusFormatError,
    CorpusIOError,
    CorpusUsageError,
    StoreFailedError,
    system_errors,
)
from fiq.corpus.wal.checkpoint import NO_ROOM, READER, Checkpointer, Compaction, Pair, Sealed
from fiq.corpus.wal.journal import Journal
from fiq.corpus.wal.overlay import Beside, PageOverlay, SectorIndex
from fiq.corpus.wal.recovery import journal_path, recover
from fiq.corpus.wal.storage import Buffer, StorageIO, unlock

#: growth of the file that is reserved on the disk ahead of the commits, bytes
_RESERVE_BYTES = 1 << 20


class FileObject:
    """A position in an overlay, with the methods that h5py calls.

    Args:
        name: the file's name, for messages.
        overlay: the content.
    """

    def __init__(self, name: str, overlay: PageOverlay) -> None:
        self.name = name
        self._overlay = overlay
        self._position = 0
        #: place and length of the last read, while somebody wants to know, and the length of what is looked for
        self._located: tuple[int, int] | None = None
        self._sought = -1
        self._frozen = self._closed = False
        #: the error after which nothing may be written any more
        self.failure: CorpusError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, as files do."""
        if whence:
            offset += self._position if whence == os.SEEK_CUR else self._overlay.size
        self._position = offset
        return offset

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fill the whole *buffer*, with zeros past the end: h5py does not check for short reads."""
        view = memoryview(buffer).cast("B")
        if self._located is not None:
            self._located = self._position, len(view)
        if self._closed or len(view) == self._sought:
            # closed: HDF5 may hold on to a file that it could not close; the descriptor may be another file's by now.
            # sought: only the place matters; should metadata ever be as long as a chunk, its checksum tells
            view[:] = bytes(len(view))
        else:
            # no context manager: HDF5 calls this and write() thousands of times a batch
            try:
                self._overlay.read_into(self._position, view)
            except OSError as error:
                raise self._remember(f"read {self.name}", error) from error
        self._position += len(view)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        """Return *size* bytes, or all up to the end."""
        buffer = bytearray(max(0, self._overlay.size - self._position) if size < 0 else size)
        self.readinto(buffer)
        return bytes(buffer)

    def write(self, data: Buffer) -> int:
        """Keep *data* for the next commit."""
        size = len(data)
        if not self._frozen:
            try:
                self._overlay.write(self._position, data)
            except OSError as error:
                raise self._remember(f"read {self.name}", error) from error
        self._position += size
        return size

    def locate(self, read: Callable[[], object], length: int) -> int:
        """Return the byte offset of what HDF5 reads when *read* is called, *length* bytes at last.

        Raises CorpusFormatError: it read something else.
        """
        self._located, self._sought = (0, 0), length
        try:
            read()
            place, span = self._located
        finally:
            self._located, self._sought = None, -1
        if span != length:
            raise CorpusFormatError(f"{self.name}: HDF5 read {span} bytes instead of a chunk of {length}")
        return place

    def peek(self, place: int, length: int) -> bytes:
        """Return *length* bytes at *place*; the position stays."""
        out = bytearray(length)
        with self._remembered(f"read {self.name}"):
            self._overlay.read_into(place, memoryview(out))
        return bytes(out)

    def put(self, place: int, data: Buffer) -> None:
        """Keep *data*, which belongs at *place*, for the next commit; the position stays."""
        try:
            self._overlay.write(place, data)
        except OSError as error:
            raise self._remember(f"read {self.name}", error) from error

    def truncate(self, size: int | None = None) -> int:
        """Set the size, at the next commit."""
        size = self._position if size is None else size
        if not self._frozen:
            with self._remembered(f"read {self.name}"):
                self._overlay.truncate(size)
        return size

    def flush(self) -> None:
        """Do nothing: durability is the commit's affair."""

    def _check_usable(self) -> None:
        if self.failure is not None:
            raise StoreFailedError(f"{self.name} failed before ({self.failure}); open it again")

    def _remember(self, operation: str, error: OSError) -> CorpusIOError:
        """Remember an error: h5py hides those that its callbacks raise."""
        told = CorpusIOError(f"cannot {operation}: {error.strerror or error}")
        self.failure = self.failure or told
        return told

    @contextmanager
    def _remembered(self, operation: str) -> Iterator[None]:
        """Remember the error of the block."""
        try:
            yield
        except OSError as error:
            raise self._remember(operation, error) from error
        except CorpusError as error:
            self.failure = self.failure or error
            raise


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


class JournaledFile(FileObject):
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
        self._checkpointer = Checkpointer(path, self._pair())
        self._copy: tuple[Sealed, Beside[bool]] | None = None
        self._rewrite: tuple[Compaction, int, Beside[None]] | None = None

    @property
    def in_place(self) -> bool:
        """Whether the open file and journal are still those at their paths.

        Raises CorpusIOError: the system refused to tell.
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
        """Make everything written so far durable, in one step; take note of work beside it that has ended.

        Returns:
            The bytes that went to the journal.

        Raises:
            CorpusIOError: the system refused. Whether the commit counts is open until the file is opened again.
        """
        self.collect()
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

    @property
    def checkpoint_running(self) -> bool:
        """Whether a checkpoint is being made beside the commits."""
        return self._copy is not None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint or a compaction is under way."""
        return self._copy is not None or self._rewrite is not None

    def checkpoint(self) -> bool:
        """Copy what is committed into the file, and wait for it.

        Returns:
            False when it must wait: a reader holds the file, or the disk lacks the room.

        Raises CorpusIOError: the system refused in the middle; the journal still holds everything.
        """
        self._finish()
        if self._overlay.changed:
            raise CorpusUsageError("a checkpoint in the middle of a batch: commit first")
        return not self._journal.records or (self._begin(thread=False) and self._finish())

    def start_checkpoint(self) -> bool:
        """Begin to copy what is committed into the file, beside the commits.

        Returns:
            False when there is nothing to copy, other work is under way, or a reader holds the file.

        Raises CorpusIOError: the system refused, now or in the one before.
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

        Raises CorpusError: a checkpoint failed; StoreFailedError: the file failed before.
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
