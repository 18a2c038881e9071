"""A partition file whose changes become durable all at once: a file object for h5py's ``fileobj`` driver.

What HDF5 writes stays in memory until :meth:`AtomicFile.commit` appends it to the journal as one record. The file
itself changes only in a checkpoint, under an exclusive lock, from what the journal holds; commits go on meanwhile.
After a crash, the file together with the whole records of its journal is the last commit: see docs/corpus-format.md.

The content as its writer sees it is in layers, of which :class:`PageCache` holds the first two::

    pages       pages of 4 KiB that changed since the last checkpoint began; when they are many, the index replaces them
    sealed      pages that the running checkpoint copies
    index       sectors whose newest image is only in the journal
    file        everything else, read when it is needed

A batch changes its pages in place and marks the sectors that it changes: a commit writes these into the journal. A
rollback drops every page, since the journal and the file hold all that is committed.

One thread calls all methods. Checkpoints and compactions run in threads of their own; :meth:`AtomicFile.collect`, which
every commit calls, takes their results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fiq.corpus.errors import CorpusError, CorpusFormatError, CorpusIOError, CorpusUsageError, StoreFailedError
from fiq.corpus.wal.checkpoint import (
    NO_ROOM,
    READER,
    BackgroundTask,
    Checkpoint,
    Compaction,
    leave_exclusive_lock,
    take_exclusive_lock,
)
from fiq.corpus.wal.journal import SECTOR, SLAB_BYTES, Journal, SectorIndex, Sectors, journal_path, runs_of
from fiq.corpus.wal.recovery import open_pair
from fiq.corpus.wal.storage import Buffer, StorageIO, read_into, reason_of, system_errors, unlock

#: growth of the file that is reserved on the disk ahead of the commits, bytes
_RESERVE_BYTES = 1 << 20
#: bytes of a page
PAGE = 4096
#: bytes that are read at once where HDF5 wants a few: headers and chunks of a consultation mostly lie within 8 KB, and
#: are asked for one after another in ten reads
_WINDOW = 16 << 10
#: reads of up to so many bytes go through the window
_SMALL = 4096
_NO_WINDOW = -2 * _WINDOW
_SECTORS_A_PAGE = PAGE // SECTOR
_PAGE_BITS, _SECTOR_BITS = PAGE.bit_length() - 1, SECTOR.bit_length() - 1
_WITHIN = PAGE - 1
_ZEROS = bytes(PAGE)


@dataclass(slots=True)
class FileStats:
    """What a file has done since it was opened."""

    commits: int = 0
    checkpoints: int = 0
    #: checkpoints deferred since a reader held the file, or the disk had no room for them
    checkpoints_deferred: int = 0
    #: why the last checkpoint was deferred; empty after one that was done
    checkpoint_deferred_because: str = ""
    #: duration of the last checkpoint
    checkpoint_seconds: float = 0.0
    #: how often the journal was compacted while checkpoints were deferred
    compactions: int = 0
    #: bytes written to the journal
    journaled_bytes: int = 0
    #: records found in the journal when the file was opened
    records_recovered: int = 0
    #: records dropped then because a crash had cut them short
    torn_records: int = 0


class AtomicFile:
    """A partition file open for writing; one thread, one process.

    Args:
        path: the partition file; its journal is beside it.
        io: the seam through which everything is written.
        cached_pages: how many committed pages are kept in memory before they are read from the journal instead.
        wrap_bytes: size from which the journal continues at its front when that is free.

    Raises:
        CorpusNotFoundError: the file is missing.
        CorpusLockedError: another process writes it, or another program has it open for writing.
        JournalError: the journal is missing, damaged, or of another file.
        CorpusFormatError: it is no partition file.
        CorpusIOError: the system refused.
    """

    def __init__(
        self, path: Path, *, io: StorageIO | None = None, cached_pages: int = 8192, wrap_bytes: int = 32 << 20
    ) -> None:
        self._io = StorageIO() if io is None else io
        self._path = path
        self._cached_pages = cached_pages
        self._wrap_bytes = wrap_bytes
        pair = open_pair(path, self._io)
        self.name = path.name
        self.uuid = pair.uuid
        self._fd, self._wal, self._state = pair.file, pair.journal, pair.state
        self._journal = Journal(self._wal, self._io, pair.uuid, pair.live, wrap_bytes=wrap_bytes)
        #: how many live records no page in memory covers
        self._indexed = len(pair.live.records)
        self._cache = PageCache(self._fd, self._wal, pair.size, self._index())
        self._reserved = os.fstat(self._fd).st_size
        self._position = 0
        #: offset and length of the last read, while a chunk is being located
        self._last_read: tuple[int, int] | None = None
        self._frozen = self._closed = False
        self._checkpoint: tuple[Checkpoint, BackgroundTask[bool]] | None = None
        self._compaction: tuple[Compaction, int, BackgroundTask[None]] | None = None
        #: the error after which nothing may be written any more
        self.failure: CorpusError | None = None
        self.stats = FileStats(records_recovered=len(pair.live.records), torn_records=int(pair.live.torn))

    # -- What h5py calls ----------------------------------------------------------------------------------------------

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, as files do."""
        if whence:
            offset += self._position if whence == os.SEEK_CUR else self._cache.size
        self._position = offset
        return offset

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        """Fill the whole *buffer*: h5py does not check for short reads.

        Bytes past the end are zeros: HDF5 reads what it has allocated and not written yet.
        """
        # no context manager: HDF5 calls this and write() thousands of times a batch
        view = memoryview(buffer).cast("B")
        if self._closed:
            # HDF5 may keep a file that it could not close; the descriptor may be another file's by now
            raise OSError(f"{self.name} is closed")
        if self._last_read is not None:
            self._last_read = self._position, len(view)
        try:
            self._cache.read_into(self._position, view)
        except (OSError, MemoryError) as error:
            raise self._remember(f"read {self.name}", error) from error
        self._position += len(view)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        """Return *size* bytes, or all up to the end."""
        buffer = bytearray(max(0, self._cache.size - self._position) if size < 0 else size)
        self.readinto(buffer)
        return bytes(buffer)

    def write(self, data: Buffer) -> int:
        """Keep *data* for the next commit."""
        size = len(data)
        if not self._frozen:
            try:
                self._cache.write(self._position, data)
            except (OSError, MemoryError) as error:
                raise self._remember(f"read {self.name}", error) from error
        self._position += size
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size, at the next commit."""
        size = self._position if size is None else size
        if not self._frozen:
            with self._remembered(f"read {self.name}"):
                self._cache.truncate(size)
        return size

    def flush(self) -> None:
        """Do nothing: only a commit makes anything durable."""

    # -- Reads and writes past HDF5 -----------------------------------------------------------------------------------

    def locate(self, read: Callable[[], object], length: int) -> int:
        """Return the byte offset of what HDF5 reads last when *read* is called; that has *length* bytes.

        Raises CorpusFormatError: it read something else.
        """
        self._last_read = 0, 0
        try:
            read()
            offset, found = self._last_read
        finally:
            self._last_read = None
        if found != length:
            raise CorpusFormatError(f"{self.name}: HDF5 read {found} bytes instead of a chunk of {length}")
        return offset

    def read_at(self, offset: int, length: int) -> bytes:
        """Return *length* bytes at *offset*; the position stays."""
        out = bytearray(length)
        with self._remembered(f"read {self.name}"):
            self._cache.read_into(offset, memoryview(out))
        return bytes(out)

    def write_at(self, offset: int, data: Buffer) -> None:
        """Keep *data*, which belongs at *offset*, for the next commit; the position stays."""
        try:
            self._cache.write(offset, data)
        except (OSError, MemoryError) as error:
            raise self._remember(f"read {self.name}", error) from error

    # -- Commits ------------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make everything written so far durable, in one step.

        Raises CorpusIOError: the system refused. Whether the commit counts is open until the file is opened again.
        """
        self.collect()
        if not self._cache.changed:
            return
        before = self._journal.bytes_live
        with self._remembered(f"commit to {self.name}.wal"):
            self._reserve(self._cache.size)
            self._journal.append(self._cache.size, *self._cache.changes())
        self._cache.commit()
        if len(self._cache) > self._cached_pages:
            newer = self._journal.records[self._indexed :]
            self._indexed += len(newer)
            self._cache.rebase(self._cache.index.with_newer([record.extents for record in newer]))
        self.stats.commits += 1
        self.stats.journaled_bytes += self._journal.bytes_live - before

    def discard(self) -> None:
        """Drop what was written since the last commit, and all that is written from now on.

        HDF5 writes when its handles are closed; that must not become part of the content.
        """
        self._frozen = True

    def rollback(self) -> None:
        """Drop the batch and take writes again; the caller has closed every HDF5 handle of the file."""
        self._indexed = len(self._journal.records)
        self._cache.rollback(self._index())
        self._frozen = False

    @property
    def in_place(self) -> bool:
        """Whether the open file and journal are still those at their paths.

        Raises CorpusIOError: the system refused to say.
        """
        with system_errors(f"look for {self.name}"):
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
        return PAGE * len(self._cache)

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

    # -- Checkpoints and compactions ----------------------------------------------------------------------------------

    @property
    def checkpoint_running(self) -> bool:
        """Whether a checkpoint runs."""
        return self._checkpoint is not None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint or a compaction runs."""
        return self._checkpoint is not None or self._compaction is not None

    def checkpoint(self) -> bool:
        """Copy what is committed into the file, and wait for it.

        Returns:
            False when it is deferred: a reader holds the file, or the disk lacks the room.

        Raises CorpusIOError: the system refused in the middle; the journal still holds everything.
        """
        self._finish()
        if self._cache.changed:
            raise CorpusUsageError("a checkpoint in the middle of a batch: commit first")
        return not self._journal.records or (self._begin_checkpoint(thread=False) and self._finish())

    def start_checkpoint(self) -> bool:
        """Begin to copy what is committed into the file, in a thread.

        Returns:
            False when there is nothing to copy, other work runs, or a reader holds the file.

        Raises CorpusIOError: the system refused, now or in the one before.
        """
        self.collect()
        return bool(self._journal.records) and not self.busy and self._begin_checkpoint(thread=True)

    def start_compaction(self) -> bool:
        """Begin to rewrite the journal with the newest images only, in a thread.

        Returns:
            False when other work runs, or the system lacks the room or the thread for it.
        """
        self.collect()
        if self.busy:
            return False
        records, journal, generation = list(self._journal.records), journal_path(self._path), self._journal.generation
        try:
            new = Compaction(self._io, journal, self._wal, self.uuid, generation=generation, state=self._state)
        except OSError:
            return False

        def write() -> None:
            with system_errors(f"compact {journal.name}"):
                new.add(records)
                # the sync of the whole, at the end, must find little to do: commits wait for that one
                self._io.fdatasync(new.fd)

        try:
            self._compaction = new, len(records), BackgroundTask(f"compact {journal.name}", write)
        except CorpusIOError:
            new.give_up()
            return False
        return True

    def collect(self) -> None:
        """Take the result of a checkpoint or compaction that has ended; cheap when none has.

        Raises CorpusError: a checkpoint failed; StoreFailedError: the file failed before.
        """
        self._check_usable()
        if (self._checkpoint and self._checkpoint[1].ended) or (self._compaction and self._compaction[2].ended):
            self._finish()

    def _begin_checkpoint(self, *, thread: bool) -> bool:
        with self._remembered(f"lock {self.name}"):
            if not take_exclusive_lock(self._fd, self.name):
                return self._defer(READER)
        self._cache.seal()
        records = tuple(self._journal.records)
        state, generation = self._state, self._journal.generation
        new = Checkpoint(self._io, self.name, self.uuid, self._fd, self._wal, records, state, generation)
        with self._remembered(f"checkpoint {self.name}"):
            try:
                self._checkpoint = new, BackgroundTask(f"checkpoint {self.name}", new.run, thread=thread)
            except CorpusIOError:
                leave_exclusive_lock(self._fd, self.name)
                raise
        return True

    def _finish(self) -> bool:
        """Wait for what runs and take its result; return False when a checkpoint had no room on the disk."""
        self._check_usable()
        done = True
        if self._checkpoint is not None:
            (checkpoint, task), self._checkpoint = self._checkpoint, None
            with self._remembered(f"checkpoint {self.name}"):
                done = task.result()
                # a copy that shrank the file has given back what was reserved, and so may one without room
                self._reserved = os.fstat(self._fd).st_size
                if done:
                    self._take_checkpoint(checkpoint, task.seconds)
                else:
                    self._defer(NO_ROOM)
        if self._compaction is not None:
            (compaction, count, writing), self._compaction = self._compaction, None
            self._take_compaction(compaction, count, writing)
        return done

    def _take_checkpoint(self, checkpoint: Checkpoint, seconds: float) -> None:
        """Forget what the file holds now."""
        count = len(checkpoint.records)
        self._state = checkpoint.state_after
        self._journal.release(count, checkpoint.generation + 1)
        self._indexed = max(0, self._indexed - count)
        self._cache.drop_sealed(self._index())
        self._journal.shrink(2 * self._wrap_bytes)
        self.stats.checkpoints += 1
        self.stats.checkpoint_seconds = seconds
        self.stats.checkpoint_deferred_because = ""

    def _take_compaction(self, compaction: Compaction, count: int, writing: BackgroundTask[None]) -> None:
        """Replace the journal by the compacted one, with what was committed meanwhile."""
        try:
            writing.result()
            with system_errors(f"compact {self.name}.wal"):
                compaction.add(self._journal.records[count:])
                compaction.prepare()
        except CorpusIOError:
            # nothing has changed; it is tried again when the journal has grown further
            compaction.give_up()
            return
        except BaseException:
            compaction.give_up()
            raise
        with self._remembered(f"replace {self.name}.wal"):
            try:
                compaction.install()
            except BaseException:
                # it may be the journal by now: its lock must not keep out the next open
                compaction.give_up()
                raise
            old, self._wal = self._wal, compaction.fd
            self._journal = Journal(self._wal, self._io, self.uuid, compaction.live, wrap_bytes=self._wrap_bytes)
            self._indexed = len(self._journal.records)
            self._cache.rebase(self._index(), self._wal)
            self.stats.compactions += 1
            unlock(old)
            os.close(old)

    def _defer(self, reason: str) -> bool:
        self.stats.checkpoints_deferred += 1
        self.stats.checkpoint_deferred_because = reason
        return False

    # -- Errors and the end -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the locks and the descriptors; writes nothing."""
        if self._closed:
            return
        self._closed = self._frozen = True
        # both use the descriptors; both end, since all that they do is bounded
        if self._checkpoint is not None:
            self._checkpoint[1].join()
        if self._compaction is not None:
            self._compaction[2].join()
            self._compaction[0].give_up()
        for fd in (self._fd, self._wal):
            unlock(fd)
            os.close(fd)

    def _check_usable(self) -> None:
        if self.failure is not None:
            raise StoreFailedError(f"{self.name} failed before ({self.failure}); open it again")

    def _remember(self, operation: str, error: OSError | MemoryError) -> CorpusIOError:
        """Remember an error: h5py hides those that its callbacks raise."""
        told = CorpusIOError(f"cannot {operation}: {reason_of(error)}")
        self.failure = self.failure or told
        return told

    @contextmanager
    def _remembered(self, operation: str) -> Iterator[None]:
        """Remember the error of the block."""
        try:
            yield
        except (OSError, MemoryError) as error:
            raise self._remember(operation, error) from error
        except CorpusError as error:
            self.failure = self.failure or error
            raise


# -- The layers -------------------------------------------------------------------------------------------------------


class PageCache:
    """Pages over a file and its journal; writes to neither.

    Args:
        file: descriptor of the partition file.
        journal: descriptor of its journal.
        size: committed size of the content, bytes.
        index: the sectors that only the journal holds.
    """

    def __init__(self, file: int, journal: int, size: int, index: SectorIndex) -> None:
        self._below = PageReader(file, journal, index)
        self._pages: dict[int, bytearray] = {}
        self._sealed: dict[int, bytearray] = {}
        #: the sectors that the batch changes: a bit each, by page
        self._marks: dict[int, int] = {}
        self._committed_size = size
        #: nothing was ever written from this byte on
        self._used = max(size, os.fstat(file).st_size)
        self._slab = bytearray(SLAB_BYTES)
        self.size = size

    def __len__(self) -> int:
        """Return the number of pages in memory."""
        return len(self._pages) + len(self._sealed)

    @property
    def index(self) -> SectorIndex:
        """The sectors that are read from the journal where no page has them."""
        return self._below.index

    @property
    def changed(self) -> bool:
        """Whether anything changed since the last commit."""
        return bool(self._marks) or self.size != self._committed_size

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill *out* with the content from *offset* on; bytes past the end are zeros."""
        start = filled = offset
        end, page = offset + len(out), offset >> _PAGE_BITS
        while start < end:
            stop = min((start | _WITHIN) + 1, end)
            content = self._pages.get(page) or self._sealed.get(page)
            if content is not None:
                if filled < start:
                    self._below.read_into(filled, out[filled - offset : start - offset])
                within = start & _WITHIN
                out[start - offset : stop - offset] = content[within : within + stop - start]
                filled = stop
            start, page = stop, page + 1
        if self._used <= filled < end:
            out[filled - offset :] = bytes(end - filled)
        elif filled < end:
            self._below.read_into(filled, out[filled - offset :])

    def write(self, offset: int, data: Buffer) -> None:
        """Add *data* to the batch."""
        size = len(data)
        within = offset & _WITHIN
        stop = within + size
        if 0 < size <= SECTOR and stop <= PAGE:
            # an object header, or what a consultation gets: a thousand times a batch
            page = offset >> _PAGE_BITS
            (self._pages.get(page) or self._page(page))[within:stop] = data
            self._marks[page] = self._marks.get(page, 0) | _MARKS[within >> _SECTOR_BITS][(stop - 1) >> _SECTOR_BITS]
        else:
            self._write_pages(offset, bytes(data))
        if offset + size > self.size:
            self.size = offset + size

    def truncate(self, size: int) -> None:
        """Set the size; bytes that a shrink cuts off are zeros if the content grows over them again."""
        end = max(self.size, self._committed_size) if size < self.size else size
        for start in range(size, end, 1 << 20):
            self._write_pages(start, bytes(min(1 << 20, end - start)))
        self.size = size

    def changes(self) -> tuple[Sectors, Iterator[memoryview]]:
        """Return what the batch changes: the runs of sectors (first, count) in rising order, and their new images.

        The images come in pieces; each must be used before the next one is taken.
        """
        pages = sorted(self._marks)
        marks = np.array([self._marks[page] for page in pages], np.uint8)
        rows, sectors = np.nonzero(np.unpackbits(marks, bitorder="little").reshape(-1, _SECTORS_A_PAGE))
        numbers = np.array(pages, np.uint64)[rows] * np.uint64(_SECTORS_A_PAGE) + sectors.astype(np.uint64)
        return runs_of(numbers), self._images(pages)

    def commit(self) -> None:
        """The journal holds the batch now."""
        self._marks.clear()
        self._committed_size = self.size
        self._used = max(self._used, self.size)

    def rollback(self, index: SectorIndex) -> None:
        """Drop the batch and all pages: *index*, the journal and the file give what is committed."""
        self._marks.clear()
        self.size = self._committed_size
        self.rebase(index)

    def seal(self) -> None:
        """Set the committed pages apart: a checkpoint copies them while others are committed."""
        self._sealed.update(self._pages)
        self._pages = {page: self._sealed.pop(page) for page in self._marks}

    def drop_sealed(self, index: SectorIndex) -> None:
        """Drop the sealed pages, which the file holds now; *index* has what neither it nor the other pages hold."""
        self._sealed.clear()
        self._below.replace(index)

    def rebase(self, index: SectorIndex, journal: int | None = None) -> None:
        """Drop the committed pages: *index*, the *journal* and the file give their content from now on."""
        self._pages = {page: self._pages[page] for page in self._marks}
        self._sealed.clear()
        self._below.replace(index, journal)

    def _images(self, pages: list[int]) -> Iterator[memoryview]:
        slab, at = self._slab, 0
        for page in pages:
            if at > SLAB_BYTES - PAGE:
                yield memoryview(slab)[:at]
                at = 0
            content = self._pages[page]
            for low, high in _STRETCHES[self._marks[page]]:
                slab[at : at + high - low] = content[low:high]
                at += high - low
        yield memoryview(slab)[:at]

    def _page(self, page: int) -> bytearray:
        """Return a page that is about to change; a sealed one becomes an ordinary one."""
        own = self._sealed.pop(page, None)
        if own is None:
            own = bytearray(PAGE)
            if page * PAGE < self._used:
                self._below.read_into(page * PAGE, memoryview(own))
        self._pages[page] = own
        return own

    def _write_pages(self, offset: int, data: bytes) -> None:
        """Write what spans sectors; equal bytes are not marked, nor zeros past the end of new content.

        HDF5 writes a new chunk whole, and then most of it is zeros over zeros.
        """
        at, end = offset, offset + len(data)
        while at < end:
            page, within = at >> _PAGE_BITS, at & _WITHIN
            stop = min(PAGE, within + end - at)
            new = data[at - offset : at - offset + stop - within]
            own = self._pages.get(page) or self._page(page)
            old = own[within:stop]
            if old != new:
                own[within:stop] = new
                used = stop
                if not new[-1] and old == _ZEROS[: len(new)]:
                    while own[(low := (used - 1) & -SECTOR) : used] == _ZEROS[: used - low]:
                        used = low
                marks = _MARKS[within >> _SECTOR_BITS][(used - 1) >> _SECTOR_BITS]
                self._marks[page] = self._marks.get(page, 0) | marks
            at += stop - within


class PageReader:
    """Reads the file and, over it, the images in its journal; keeps the last window.

    Args:
        file: descriptor of the partition file.
        journal: descriptor of its journal.
        index: the sectors that only the journal holds.
    """

    def __init__(self, file: int, journal: int, index: SectorIndex) -> None:
        self._file = file
        self._journal = journal
        #: the sectors that only the journal holds
        self.index = index
        self._window = memoryview(bytearray(_WINDOW))
        #: byte offset of the window's content
        self._at = _NO_WINDOW

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill *out* with the content from *offset* on; bytes past the end are zeros.

        Raises OSError: the system refused.
        """
        size = len(out)
        if size > _SMALL:
            self._read(offset, out)
            return
        if not 0 <= offset - self._at <= _WINDOW - size:
            at, self._at = offset & -_SMALL, _NO_WINDOW
            self._read(at, self._window)
            self._at = at
        low = offset - self._at
        out[:] = self._window[low : low + size]

    def replace(self, index: SectorIndex, journal: int | None = None) -> None:
        """Use another *index*, and another *journal* if given; the file may have changed too."""
        self._at = _NO_WINDOW
        self.index = index
        self._journal = self._journal if journal is None else journal

    def _read(self, offset: int, out: memoryview) -> None:
        read_into(self._file, out, offset)
        if len(self.index):
            self.index.patch(self._journal, offset, out)


def _stretches(marks: int) -> list[tuple[int, int]]:
    """Return where in a page the stretches of marked sectors begin and end, bytes."""
    bits = [0, *(marks >> sector & 1 for sector in range(_SECTORS_A_PAGE)), 0]
    bounds = [SECTOR * n for n in range(_SECTORS_A_PAGE + 1) if bits[n] != bits[n + 1]]
    return list(zip(bounds[::2], bounds[1::2], strict=True))


#: the stretches by the marks of a page
_STRETCHES = [_stretches(marks) for marks in range(1 << _SECTORS_A_PAGE)]
#: the marks of all sectors from the first to the last
_MARKS = [[(2 << last) - (1 << first) for last in range(_SECTORS_A_PAGE)] for first in range(_SECTORS_A_PAGE)]
