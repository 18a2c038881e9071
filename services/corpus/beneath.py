"""What lies under the pages in memory: the file, with the images that only the journal holds laid over it."""

from __future__ import annotations

from services.corpus.sectors import SectorIndex
from services.corpus.storage import read_into

#: bytes that are read at once where HDF5 wants a few: headers and chunks of a consultation mostly lie within 8 KB, and
#: are asked for one after another in ten reads
_WINDOW = 16 << 10
#: reads of up to so many bytes go through the window
_SMALL = 4096
_NOWHERE = -2 * _WINDOW


class Beneath:
    """Reads the file and its journal; keeps the last window.

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
        self._at = _NOWHERE

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill *out* with the content from *offset* on; what lies past the end reads as zeros.

        Raises:
            OSError: the system refused.
        """
        size = len(out)
        if size > _SMALL:
            self._read(offset, out)
            return
        if not 0 <= offset - self._at <= _WINDOW - size:
            at, self._at = offset & -_SMALL, _NOWHERE
            self._read(at, self._window)
            self._at = at
        low = offset - self._at
        out[:] = self._window[low : low + size]

    def replace(self, index: SectorIndex, journal: int | None = None) -> None:
        """Go on with another *index*, and another *journal* if there is one; the file may have changed too."""
        self._at = _NOWHERE
        self.index = index
        self._journal = self._journal if journal is None else journal

    def _read(self, offset: int, out: memoryview) -> None:
        read_into(self._file, out, offset)
        if len(self.index):
            self.index.patch(self._journal, offset, out)
