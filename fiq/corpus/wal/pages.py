"""The content of a partition file as its writer sees it: layers of 4 KiB pages over the file.

::

    pages       pages that changed since the last checkpoint began; when they are many, the index replaces them
    sealed      pages that the running checkpoint copies
    index       sectors whose newest image is only in the journal
    file        everything else, read when it is needed

A batch changes its pages in place and marks the sectors that it changes: a commit writes these into the journal. A
rollback drops every page, since the journal and the file hold all that is committed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from fiq.corpus.wal.journal import SECTOR, Extents, Sectors
from fiq.corpus.wal.storage import Buffer, read_into

#: bytes of a page
PAGE = 4096
#: bytes of images that are held in memory at once
_SLAB_BYTES = 1 << 20
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


class SectorIndex:
    """Sorted sector numbers, each with the byte offset of its newest image in the journal."""

    def __init__(self, sectors: Sectors, offsets: Sectors) -> None:
        self.sectors = sectors
        self.offsets = offsets

    @classmethod
    def of(cls, records: Sequence[Extents]) -> Self:
        """Build the index of *records*, given from the oldest to the newest."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.uint64)).with_newer(records)

    def with_newer(self, records: Sequence[Extents]) -> Self:
        """Return the index of this one's sectors and of newer *records*, from the oldest to the newest."""
        if not records:
            return self
        numbers, offsets = [self.sectors], [self.offsets]
        for record in records:
            numbers.append(record.sectors())
            offsets.append(np.arange(len(numbers[-1]), dtype=np.uint64) * np.uint64(SECTOR) + np.uint64(record.images))
        # unique() keeps the first of equals: newest first. All are sorted in themselves, so they are only merged
        newest, chosen = np.unique(np.concatenate(numbers)[::-1], return_index=True)
        return type(self)(newest, np.concatenate(offsets)[::-1][chosen])

    def __len__(self) -> int:
        return len(self.sectors)

    def table(self) -> Sectors:
        """Return the runs of neighbouring sectors: shape (n, 2), first sector and number of sectors."""
        return runs_of(self.sectors)

    def patch(self, journal: int, offset: int, out: memoryview) -> None:
        """Lay the images in the *journal* over *out*, which holds the file's bytes from *offset* on."""
        end = offset + len(out)
        # of the same type: else numpy turns the whole index into floats first
        bounds = np.array((offset // SECTOR, -(-end // SECTOR)), np.uint64)
        first, last = self.sectors.searchsorted(bounds).tolist()
        for sector, image in zip(self.sectors[first:last].tolist(), self.offsets[first:last].tolist(), strict=True):
            start = sector * SECTOR
            low, high = max(start, offset), min(start + SECTOR, end)
            read_into(journal, out[low - offset : high - offset], image + low - start)

    def runs(self, journal: int) -> Iterator[tuple[int, memoryview]]:
        """Yield (byte offset in the file, content) of every run of neighbouring sectors, in rising order."""
        step = _SLAB_BYTES // SECTOR
        for low in range(0, len(self), step):
            sectors, offsets = self.sectors[low : low + step], self.offsets[low : low + step]
            images = memoryview(bytearray(len(sectors) * SECTOR))
            for first, last in _neighbours(offsets, SECTOR):
                read_into(journal, images[first * SECTOR : last * SECTOR], int(offsets[first]))
            for first, last in _neighbours(sectors, 1):
                yield int(sectors[first]) * SECTOR, images[first * SECTOR : last * SECTOR]


def runs_of(sectors: Sectors) -> Sectors:
    """Return the runs of neighbours among rising *sectors*: shape (n, 2), first sector and number of sectors."""
    if not len(sectors):  # a commit that changes the size only
        return np.empty((0, 2), np.uint64)
    breaks = np.flatnonzero(np.diff(sectors) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(sectors)]))
    return np.stack((sectors[starts], (ends - starts).astype(np.uint64)), axis=1)


def _neighbours(numbers: Sectors, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the stretches in which *numbers* rise by *step*."""
    breaks = (np.flatnonzero(np.diff(numbers) != step) + 1).tolist()
    return zip([0, *breaks], [*breaks, len(numbers)], strict=True)


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
        self._slab = bytearray(_SLAB_BYTES)
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
            if at > _SLAB_BYTES - PAGE:
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


def _stretches(marks: int) -> list[tuple[int, int]]:
    """Return where in a page the stretches of marked sectors begin and end, bytes."""
    bits = [0, *(marks >> sector & 1 for sector in range(_SECTORS_A_PAGE)), 0]
    bounds = [SECTOR * n for n in range(_SECTORS_A_PAGE + 1) if bits[n] != bits[n + 1]]
    return list(zip(bounds[::2], bounds[1::2], strict=True))


#: the stretches by the marks of a page
_STRETCHES = [_stretches(marks) for marks in range(1 << _SECTORS_A_PAGE)]
#: the marks of all sectors from the first to the last
_MARKS = [[(2 << last) - (1 << first) for last in range(_SECTORS_A_PAGE)] for first in range(_SECTORS_A_PAGE)]
