"""The ids of all consultations of a partition file, sorted: HDF5 cannot tell them in order without sorting them all."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence


class Names:
    """Is filled in slices when somebody asks first, and then kept up to date: about 100 bytes a consultation.

    Attributes:
        position: how many were read from the file.
        complete: whether all have been.
        used: when it was asked last, on :func:`time.monotonic`.
    """

    def __init__(self) -> None:
        self.position = 0
        self.complete = False
        self.used = time.monotonic()
        self._found: set[str] = set()
        self._sorted: list[str] = []

    def feed(self, names: Sequence[str]) -> None:
        """Take the slice of the file from :attr:`position` on; an empty one is the end."""
        self._found.update(names)
        self.position += len(names)
        if not names:
            self._sorted = sorted(self._found)
            self._found.clear()
            self.complete = True

    def add(self, names: Sequence[str]) -> None:
        """Take note of consultations that are new in the file."""
        if not self.complete:
            self._found.update(names)
            return
        for name in names:
            insort(self._sorted, name)

    def select(self, prefix: str, after: str, limit: int) -> list[str]:
        """Return at most *limit* names that begin with *prefix* and come behind *after*."""
        self.used = time.monotonic()
        start = bisect_left(self._sorted, prefix) if prefix > after else bisect_right(self._sorted, after)
        found = []
        for index in range(start, min(start + limit, len(self._sorted))):
            name = self._sorted[index]
            if not name.startswith(prefix):
                break
            found.append(name)
        return found
