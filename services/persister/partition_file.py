"""A partition's file while a runner has it: everything here runs in the HDF5 thread."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence

from fiq.corpus import EventStore
from fiq.errors import TransientError
from services.log.errors import PlacementError
from services.log.protocol import Position

#: the names of all consultations stay in memory for so long after they were asked for, seconds
NAMES_SECONDS = 600.0


class NotNowError(TransientError):
    """Raised when the file cannot be asked just now: it was let go, or a batch is half written."""


class PartitionFile:
    """Opens, watches and closes the file of one partition.

    Each method that works on a store is told which one: another may have been opened since the call was made.

    Args:
        open_store: opens the file.

    Attributes:
        store: the open file, or None.
    """

    def __init__(self, open_store: Callable[[], EventStore]) -> None:
        self.store: EventStore | None = None
        self._open_store = open_store
        self._names: Names | None = None

    def open(self) -> EventStore:
        """Open the file.

        Raises:
            PlacementError, CorpusError: it cannot be opened.
        """
        # noted here and not by the caller, who may be cancelled while this goes on: the file must be released then
        store = self.store = self._open_store()
        return store

    def close(self, *, abandon: bool) -> list[Exception]:
        """Release the file, if it is open; return what went wrong meanwhile: what is committed is safe all the same.

        Args:
            abandon: make no last checkpoint.
        """
        store, self.store = self.store, None
        self._names = None
        failures: list[Exception] = []
        if store is None:
            return failures
        for release in (store.abandon,) if abandon else (store.close, store.abandon):
            try:
                release()
            except Exception as error:  # noqa: BLE001 - the lock must go in any case
                failures.append(error)
        return failures

    def created(self, consultations: Sequence[str]) -> None:
        """Note that *consultations* are committed for the first time."""
        if self._names is not None and consultations:
            self._names.add(consultations)

    @property
    def names(self) -> Names:
        """The ids of all consultations in the file; empty at first, to be filled by whoever asks."""
        if self._names is None:
            self._names = Names()
        return self._names

    def check_askable(self, store: EventStore) -> None:
        """Make sure that *store* may be read on behalf of others.

        Raises:
            NotNowError: it was closed, or holds what is not committed.
            PlacementError: the file was deleted or replaced.
        """
        if store is not self.store:
            raise NotNowError("the partition was let go")
        if store.uncommitted:
            raise NotNowError("a batch is half written")
        self.check_in_place(store)

    def advance(self, store: EventStore, position: Position) -> bool:
        """Move the committed position forward; False when a batch has taken it further already, or it was closed.

        Raises:
            PlacementError: the file was deleted or replaced.
            CorpusError: it was not committed.
        """
        if store is not self.store or store.uncommitted or store.committed >= position.sequence:
            return False
        self.check_in_place(store)
        store.commit(position.sequence, position.message_id)
        return True

    def checkpoint(self, store: EventStore) -> None:
        """Bring the file up to date for stock readers when that is due, unless it was closed.

        Raises:
            PlacementError: the file was deleted or replaced.
            CorpusError: the checkpoint failed; the journal holds everything.
        """
        if store is self.store:
            self.check_in_place(store)
            store.maybe_checkpoint()
        if self._names is not None and time.monotonic() - self._names.used > NAMES_SECONDS:
            self._names = None

    def check_in_place(self, store: EventStore) -> None:
        """Make sure that the open files are still the ones in the directory: commits to deleted ones go nowhere.

        Raises PlacementError: one was deleted or replaced.
        """
        if not store.in_place:
            raise PlacementError(
                f"{store.path} or its journal was deleted or replaced while it was written: put both back, then "
                "restart the persister; the stream still has what they lack"
            )


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
