"""The sorted names of a file's consultations: a B-tree of text pages in the dataset ``/names``.

HDF5 indexes the members of a large group by a hash, so it can neither list them in order nor begin in the middle. Here
a page takes 4 KiB and holds lines. A *leaf* has one name a line. An *inner* page has ``<first name> <page number>`` for
each page below it; what is less than all of its names belongs to the first. Page 0 is the root.

Lines are not sorted within a page: a new name is appended to its leaf, which changes one or two sectors of the file,
and readers sort some hundred lines. A full page is split in two. If the new line sorts after all others it alone moves,
so names that rise, as those with a time do, leave full pages.

No name has a character below ``-``, so lines compare as their names do, and the space marks inner pages.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from h5py import h5d, h5p, h5s, h5t

from fiq.corpus.errors import CorpusFormatError

#: bytes of a page
PAGE_BYTES = 4096
#: pages of a chunk
CHUNK_PAGES = 8
#: type of the dataset: a page is one string, padded with zeros
PAGE_DTYPE = np.dtype(f"S{PAGE_BYTES}")
#: levels of a tree; five hold over a hundred million names
_MOST_LEVELS = 16


class Pages(Protocol):
    """Where the pages are."""

    def __len__(self) -> int:
        """Return the number of pages."""

    def read(self, number: int) -> bytes:
        """Return a page without the zeros at its end."""

    def write(self, number: int, at: int, data: bytes) -> None:
        """Replace what is in a page from byte *at* on; *data* ends within it."""

    def add(self, content: bytes) -> int:
        """Add a page with *content*, which is filled up with zeros, and return its number."""


class NameTree:
    """Names in *pages*."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def insert(self, name: bytes) -> None:
        """Insert a name that is not there."""
        if not len(self._pages):
            self._pages.add(b"")
        path: list[int] = []
        number = 0
        while _is_inner(content := self._read(number, len(path))):
            path.append(number)
            bound = name + b"!"  # above the line of this name and below those of greater ones
            number = self._child(max((line for line in content.split(b"\n") if line < bound), default=b""))
        self._put(number, content, name, path)

    def scan(self, start: bytes = b"") -> Iterator[bytes]:
        """Yield the names from *start* on, sorted.

        Raises CorpusFormatError: a page is damaged.
        """
        if len(self._pages):
            yield from self._scan(0, start, 0)

    def _scan(self, number: int, start: bytes, level: int) -> Iterator[bytes]:
        content = self._read(number, level)
        lines = sorted(content.split(b"\n"))[1:] if content else []
        if not _is_inner(content):
            yield from lines[bisect_left(lines, start) :]
            return
        for line in lines[max(0, bisect_left(lines, start + b"!") - 1) :]:
            yield from self._scan(self._child(line), start, level + 1)

    def _put(self, number: int, content: bytes, line: bytes, path: list[int]) -> None:
        """Add *line* to a page; *path* leads to it."""
        if len(content) + len(line) < PAGE_BYTES:
            self._pages.write(number, len(content), line + b"\n")
            return
        lines = sorted([*content.split(b"\n")[:-1], line])
        middle = len(lines) - 1 if lines[-1] is line else len(lines) // 2
        low, high = (b"\n".join([*half, b""]) for half in (lines[:middle], lines[middle:]))
        separator, _, _ = lines[middle].partition(b" ")
        upper = self._pages.add(high)
        if path:
            self._pages.write(number, 0, low.ljust(PAGE_BYTES, b"\0"))
            parent = path[-1]
            self._put(parent, self._read(parent, 0), b"%b %d" % (separator, upper), path[:-1])
        else:
            root = b" %d\n%b %d\n" % (self._pages.add(low), separator, upper)
            self._pages.write(number, 0, root.ljust(PAGE_BYTES, b"\0"))

    def _child(self, line: bytes) -> int:
        number = line.rpartition(b" ")[2]
        if not number.isdigit() or not 0 < int(number) < len(self._pages):
            raise CorpusFormatError(f"the index of names is damaged: a line leads to no page: {line!a}")
        return int(number)

    def _read(self, number: int, level: int) -> bytes:
        content = self._pages.read(number)
        if level > _MOST_LEVELS or not (content.endswith(b"\n") or (not content and not number)):
            raise CorpusFormatError(f"the index of names is damaged: page {number}")
        return content


def _is_inner(content: bytes) -> bool:
    return b" " in content


def create_names(parent: Any, name: bytes) -> Any:
    """Create an empty dataset for pages below *parent*, h5py's low-level id of a group; return that of the dataset."""
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_chunk((CHUNK_PAGES,))
    plan.set_fill_time(h5d.FILL_TIME_NEVER)
    plan.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plan.set_obj_track_times(False)
    empty = h5s.create_simple((0,), (h5s.UNLIMITED,))
    return h5d.create(parent, name, h5t.py_create(PAGE_DTYPE), empty, plan)


class DatasetPages:
    """Pages that are read, and written into a file which nothing else changes, through HDF5.

    Args:
        dataset: its low-level id.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._count = int(dataset.shape[0])
        self._type = h5t.py_create(PAGE_DTYPE)
        self._one = h5s.create_simple((1,))

    def __len__(self) -> int:
        return self._count

    def read(self, number: int) -> bytes:
        page = np.empty(1, PAGE_DTYPE)
        self._dataset.read(self._one, self._at(number), page, self._type)
        return bytes(page[0])  # numpy leaves the zeros at the end out

    def write(self, number: int, at: int, data: bytes) -> None:
        page = np.array([self.read(number).ljust(at, b"\0")[:at] + data], PAGE_DTYPE)
        self._dataset.write(self._one, self._at(number), page, self._type)

    def add(self, content: bytes) -> int:
        self._count += 1
        self._dataset.set_extent((self._count,))
        self._dataset.write(self._one, self._at(self._count - 1), np.array([content], PAGE_DTYPE), self._type)
        return self._count - 1

    def _at(self, number: int) -> Any:
        space = self._dataset.get_space()
        space.select_hyperslab((number,), (1,))
        return space
