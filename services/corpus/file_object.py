"""The file object behind h5py's ``fileobj`` driver: what HDF5 writes stays in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.corpus.errors import CorpusError, CorpusFormatError, CorpusIOError, StoreFailedError
from services.corpus.overlay import PageOverlay
from services.corpus.storage import Buffer


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

        Raises:
            CorpusFormatError: it read something else.
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
