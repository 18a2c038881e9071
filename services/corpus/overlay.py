"""The content of a partition file as its writer sees it: layers of pages over the file.

::

    batch       pages changed since the last commit; a rollback drops them
    committed   pages committed since the last checkpoint began; they give way to the index when they are many
    sealed      pages that the checkpoint under way is copying
    index       sectors whose newest image only the journal holds
    file        everything else, read when it is needed

What changed is found at the commit by comparing each page of the batch with what it was, sector by sector. So only the
sectors that really differ are journaled, however HDF5 wrote them.
"""

from __future__ import annotations

import os
from itertools import islice

import numpy as np

from services.corpus.sectors import SECTOR, SectorIndex, Sectors, runs_of
from services.corpus.storage import Buffer

#: bytes of a page
PAGE = 4096

_ZERO_PAGE = bytes(PAGE)
_SECTORS_A_PAGE = PAGE // SECTOR
#: pages that are compared at once
_SLAB_PAGES = 256


class PageOverlay:
    """Pages over a file and its journal; writes nothing to either.

    Args:
        file: descriptor of the partition file.
        journal: descriptor of its journal.
        size: committed size of the content, bytes.
        index: the sectors that only the journal holds.
    """

    def __init__(self, file: int, journal: int, size: int, index: SectorIndex) -> None:
        self._file = file
        self._journal = journal
        self._index = index
        self._committed: dict[int, bytearray] = {}
        self._sealed: dict[int, bytearray] = {}
        self._batch: dict[int, bytearray] = {}
        self._before: dict[int, bytes | bytearray] = {}
        self._committed_size = size
        self.size = size

    @property
    def committed_pages(self) -> int:
        """How many committed pages are kept in memory."""
        return len(self._committed) + len(self._sealed)

    @property
    def bytes_held(self) -> int:
        """Memory that the pages take."""
        return PAGE * (len(self._committed) + len(self._sealed) + 2 * len(self._batch))

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill *out* with the content from *offset* on; what lies past the end reads as zeros."""
        end = offset + len(out)
        for page in range(offset // PAGE, -(-end // PAGE)):
            start = page * PAGE
            low, high = max(start, offset), min(start + PAGE, end)
            content = self._batch.get(page) or self._load(page)
            out[low - offset : high - offset] = content[low - start : high - start]

    def write(self, offset: int, data: Buffer) -> None:
        """Put *data* into the batch."""
        end = offset + len(data)
        page, within = divmod(offset, PAGE)
        if end <= (page + 1) * PAGE:
            (self._batch.get(page) or self._page(page))[within : within + len(data)] = data
        else:
            self._write_across(offset, memoryview(data), end)
        if end > self.size:
            self.size = end

    def truncate(self, size: int) -> None:
        """Set the size; bytes that a shrink cuts off read as zeros if the content grows over them again."""
        end = max(self.size, self._committed_size) if size < self.size else size
        start = size
        while start < end:
            stop = min(end, (start // PAGE + 1) * PAGE)
            self._page(start // PAGE)[start % PAGE : start % PAGE + stop - start] = bytes(stop - start)
            start = stop
        self.size = size

    def changes(self) -> tuple[Sectors, list[memoryview]]:
        """Return what the batch changes: runs of sectors (first, count) in rising order, and their new images."""
        tables, images = [np.empty((0, 2), np.uint64)], []
        pages = iter(sorted(self._batch))
        while slab := list(islice(pages, _SLAB_PAGES)):
            sectors, content = self._compare(slab)
            if len(sectors):
                tables.append(runs_of(sectors))
                images.append(content)
        return np.concatenate(tables), images

    @property
    def changed(self) -> bool:
        """Whether anything was written since the last commit, even if to the same effect."""
        return bool(self._batch) or self.size != self._committed_size

    def commit(self) -> None:
        """Move the batch down: the journal holds it now."""
        self._committed.update(self._batch)
        self._batch.clear()
        self._before.clear()
        self._committed_size = self.size

    def rollback(self) -> None:
        """Drop the batch."""
        self._batch.clear()
        self._before.clear()
        self.size = self._committed_size

    def seal(self) -> None:
        """Set the committed pages apart: a checkpoint copies them while others are committed."""
        self._sealed.update(self._committed)
        self._committed = {}

    def drop_sealed(self, index: SectorIndex) -> None:
        """Drop the sealed pages, which the file holds now; *index* has what neither it nor the other pages do."""
        self._sealed.clear()
        self._index = index

    def rebase(self, index: SectorIndex, journal: int | None = None) -> None:
        """Drop the committed pages: *index*, the *journal* and the file give their content from now on."""
        self._committed.clear()
        self._sealed.clear()
        self._index = index
        self._journal = self._journal if journal is None else journal

    def _page(self, page: int) -> bytearray:
        own = self._batch.get(page)
        if own is None:
            before = self._load(page)
            own = self._batch[page] = bytearray(before)
            self._before[page] = before
        return own

    def _load(self, page: int) -> bytes | bytearray:
        committed = self._committed.get(page) or self._sealed.get(page)
        if committed is not None:
            return committed
        start = page * PAGE
        content = os.pread(self._file, PAGE, start)
        if len(content) < PAGE:
            content = content.ljust(PAGE, b"\0") if content else _ZERO_PAGE
        if len(self._index):
            patched = bytearray(content)
            self._index.patch(self._journal, start, memoryview(patched))
            return patched
        return content

    def _write_across(self, offset: int, data: memoryview, end: int) -> None:
        start = offset
        while start < end:
            stop = min(end, (start // PAGE + 1) * PAGE)
            self._page(start // PAGE)[start % PAGE : start % PAGE + stop - start] = data[start - offset : stop - offset]
            start = stop

    def _compare(self, pages: list[int]) -> tuple[Sectors, memoryview]:
        new = np.frombuffer(b"".join([self._batch[page] for page in pages]), np.uint64).reshape(-1, SECTOR // 8)
        old = np.frombuffer(b"".join([self._before[page] for page in pages]), np.uint64).reshape(-1, SECTOR // 8)
        differing = np.flatnonzero((new != old).any(axis=1))
        first = np.repeat(np.array(pages, np.uint64) * np.uint64(_SECTORS_A_PAGE), _SECTORS_A_PAGE)
        sectors = first + np.tile(np.arange(_SECTORS_A_PAGE, dtype=np.uint64), len(pages))
        return sectors[differing], memoryview(new[differing].tobytes())
