"""Grows a dataset at its end, past most of HDF5.

``Dataset.resize`` and slicing cost 300 to 590 µs an append, ``set_extent`` and ``write_direct_chunk`` 18 to 28. Here
HDF5 only learns the new extent, for which it allocates the chunks, and the content goes straight to its place in the
file. That is safe: a chunk without filters never moves, and HDF5 keeps nothing of a chunk in memory that is only read
and written directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from h5py import h5d


class Beneath(Protocol):
    """The file under HDF5."""

    def locate(self, read: Callable[[], object], length: int) -> int:
        """Return the byte offset of what HDF5 reads when *read* is called, *length* bytes at last.

        Raises:
            CorpusFormatError: it read something else.
        """
        ...

    def peek(self, place: int, length: int) -> bytes:
        """Return *length* bytes at *place*, a byte offset."""
        ...

    def put(self, place: int, data: bytes) -> None:
        """Write *data* at *place*, as a part of the batch."""
        ...


class Tail(Protocol):
    """The end of one dataset."""

    @property
    def length(self) -> int:
        """Elements of the dataset."""
        ...

    def append(self, data: bytes) -> None:
        """Append whole elements."""
        ...

    def last(self) -> bytes:
        """Return the last element; the dataset is not empty."""
        ...


class Tails(Protocol):
    """Makes the tail of a dataset, given as h5py's low-level ``DatasetID`` with its element's and chunk's size."""

    def __call__(self, dataset: Any, *, item: int, chunk: int, empty: bool) -> Tail: ...


class ChunkedTail:
    """A dataset of one dimension, in chunks without filters.

    Args:
        beneath: the file under HDF5.
        dataset: h5py's low-level ``DatasetID``.
        item: bytes of an element.
        chunk: elements of a chunk.
        empty: whether it was just created.
    """

    __slots__ = ("_beneath", "_chunk", "_dataset", "_early", "_filled", "_item", "_place", "length")

    def __init__(self, beneath: Beneath, dataset: Any, *, item: int, chunk: int, empty: bool) -> None:
        self._beneath = beneath
        self._dataset = dataset
        self._item = item
        self._chunk = chunk * item
        #: whether a new extent allocates the chunks, None before it matters; in files of earlier versions a write does
        self._early: bool | None = None
        self.length = 0 if empty else int(dataset.shape[0])
        #: bytes in use of the last chunk, and its byte offset
        self._filled = self._place = 0
        if self.length:
            first = self.length - 1 - (self.length - 1) % chunk
            self._filled = (self.length - first) * item
            self._place = self._find(first)

    def append(self, data: bytes) -> None:
        """Append whole elements."""
        start, self.length = self.length, self.length + len(data) // self._item
        self._dataset.set_extent((self.length,))
        room = self._chunk - self._filled if self._filled else 0
        if len(data) <= room:
            self._beneath.put(self._place + self._filled, data)
            self._filled += len(data)
            return
        if room:
            self._beneath.put(self._place + self._filled, data[:room])
        for low in range(room, len(data), self._chunk):
            part = data[low : low + self._chunk]
            self._begin(start + low // self._item, part)

    def last(self) -> bytes:
        """Return the last element; the dataset is not empty."""
        return self._beneath.peek(self._place + self._filled - self._item, self._item)

    def _begin(self, element: int, content: bytes) -> None:
        """Write the *content* of a new chunk that begins with *element*."""
        if self._early is None:
            self._early = self._dataset.get_create_plist().get_alloc_time() == h5d.ALLOC_TIME_EARLY
        if not self._early:
            self._dataset.write_direct_chunk((element,), bytes(self._chunk))
        self._place, self._filled = self._find(element), len(content)
        self._beneath.put(self._place, content)

    def _find(self, element: int) -> int:
        """Return the byte offset of the chunk that begins with *element*.

        The function that tells it goes through all chunks of a dataset; the place of a read is found at once.
        """
        return self._beneath.locate(lambda: self._dataset.read_direct_chunk((element,)), self._chunk)
