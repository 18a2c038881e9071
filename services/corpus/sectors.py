"""Where in the journal the newest image of each changed sector of the file lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from services.corpus.storage import read_into

#: bytes of a sector, the unit of the journal: what a disk writes whole or not at all
SECTOR = 512

#: sectors that a checkpoint holds in memory at once
_SLAB_SECTORS = (1 << 20) // SECTOR

Sectors = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Extents:
    """The sectors of one journal record.

    Attributes:
        table: shape (n, 2): first sector and number of sectors of each run, in rising order.
        images: byte offset in the journal at which the images of these sectors lie, one after another.
    """

    table: Sectors
    images: int

    def sectors(self) -> Sectors:
        """Return the number of every sector, in the order of the images."""
        starts, counts = self.table[:, 0], self.table[:, 1]
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        numbers: Sectors = np.arange(total, dtype=np.uint64)
        numbers += np.repeat(starts - (ends - counts), counts.astype(np.int64))
        return numbers


class SectorIndex:
    """Sorted sector numbers, each with the place of its newest image."""

    def __init__(self, sectors: Sectors, places: Sectors) -> None:
        self._sectors = sectors
        self._places = places

    @classmethod
    def of(cls, records: Sequence[Extents]) -> Self:
        """Build the index of *records*, given from the oldest to the newest."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.uint64)).with_newer(records)

    def with_newer(self, records: Sequence[Extents]) -> Self:
        """Build the index of what this one has and of *records* written since, from the oldest to the newest."""
        if not records:
            return self
        numbers, places = [self._sectors], [self._places]
        for record in records:
            numbers.append(record.sectors())
            places.append(np.arange(len(numbers[-1]), dtype=np.uint64) * np.uint64(SECTOR) + np.uint64(record.images))
        # unique() keeps the first of equals: newest first. All are sorted in themselves, so they are but merged
        newest, chosen = np.unique(np.concatenate(numbers)[::-1], return_index=True)
        return type(self)(newest, np.concatenate(places)[::-1][chosen])

    def __len__(self) -> int:
        return len(self._sectors)

    def table(self) -> Sectors:
        """Return the runs of neighbouring sectors: shape (n, 2), first sector and number of sectors."""
        return runs_of(self._sectors)

    def patch(self, journal: int, offset: int, out: memoryview) -> None:
        """Lay the images over *out*, which holds the file's bytes from *offset* on.

        Args:
            journal: descriptor of the journal.
        """
        end = offset + len(out)
        # of the same type: else numpy turns the whole index into floats first
        bounds = np.array((offset // SECTOR, -(-end // SECTOR)), np.uint64)
        first, last = self._sectors.searchsorted(bounds).tolist()
        for sector, place in zip(self._sectors[first:last].tolist(), self._places[first:last].tolist(), strict=True):
            start = sector * SECTOR
            low, high = max(start, offset), min(start + SECTOR, end)
            read_into(journal, out[low - offset : high - offset], place + low - start)

    def runs(self, journal: int) -> Iterator[tuple[int, memoryview]]:
        """Yield (byte offset in the file, content) of every run of neighbouring sectors, in rising order.

        Args:
            journal: descriptor of the journal.
        """
        for low in range(0, len(self), _SLAB_SECTORS):
            sectors, places = self._sectors[low : low + _SLAB_SECTORS], self._places[low : low + _SLAB_SECTORS]
            images = memoryview(bytearray(len(sectors) * SECTOR))
            for first, last in _neighbours(places, SECTOR):
                read_into(journal, images[first * SECTOR : last * SECTOR], int(places[first]))
            for first, last in _neighbours(sectors, 1):
                yield int(sectors[first]) * SECTOR, images[first * SECTOR : last * SECTOR]


def runs_of(sectors: Sectors) -> Sectors:
    """Return the runs of neighbours among rising *sectors*: shape (n, 2), first sector and number of sectors."""
    if not len(sectors):  # a commit that wrote what was there already
        return np.empty((0, 2), np.uint64)
    breaks = np.flatnonzero(np.diff(sectors) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(sectors)]))
    return np.stack((sectors[starts], (ends - starts).astype(np.uint64)), axis=1)


def _neighbours(numbers: Sectors, step: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the stretches in which *numbers* rise by *step*."""
    breaks = (np.flatnonzero(np.diff(numbers) != step) + 1).tolist()
    return zip([0, *breaks], [*breaks, len(numbers)], strict=True)
