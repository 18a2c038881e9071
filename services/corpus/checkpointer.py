"""Runs a checkpoint: takes the exclusive lock, copies in a thread or at once, and lets readers in again."""

from __future__ import annotations

import os
from pathlib import Path

from services.corpus.beside import Beside
from services.corpus.checkpoint import Pair, Sealed, copy_sealed
from services.corpus.errors import CorpusFormatError, CorpusIOError, system_errors
from services.corpus.locks import LOCK_WAIT, lock, try_lock

#: reasons for which a checkpoint waits
READER = "a reader has the file open"
NO_ROOM = "the disk has no room for it"


class Checkpointer:
    """Makes the checkpoints of one partition file.

    Args:
        path: the partition file.
        pair: its descriptors; the file is locked shared.
    """

    def __init__(self, path: Path, pair: Pair) -> None:
        self.pair = pair
        self._path = path

    def take_lock(self) -> bool:
        """Take the exclusive lock; False when a reader holds the file.

        Raises:
            CorpusError: another program writes to the file.
        """
        if try_lock(self.pair.file, exclusive=True):
            return True
        self._take_shared_lock_again()
        return False

    def begin(self, sealed: Sealed, *, thread: bool) -> Beside[bool]:
        """Copy *sealed*; the lock is held.

        Returns:
            The work, which tells whether there was room. After an error the exclusive lock stays, so that nobody sees
            what is half copied.

        Raises:
            CorpusIOError: the system refuses a thread; nothing is copied, and the lock is a shared one again.
        """

        def copy() -> bool:
            with system_errors(f"checkpoint {self._path.name}"):
                done = copy_sealed(self.pair, sealed)
            self._leave_exclusive_lock()
            return done

        try:
            return Beside(f"checkpoint {self._path.name}", copy, thread=thread)
        except CorpusIOError:
            self._leave_exclusive_lock()
            raise

    def _leave_exclusive_lock(self) -> None:
        if not try_lock(self.pair.file, exclusive=False):
            self._take_shared_lock_again()

    def _take_shared_lock_again(self) -> None:
        """Repair what a failed conversion leaves: no lock at all (flock(2))."""
        before = os.fstat(self.pair.file)
        refusal = f"another program opened {self._path.name} for writing; close it there"
        lock(self.pair.file, exclusive=False, timeout=LOCK_WAIT, refusal=refusal)
        after = os.fstat(self.pair.file)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CorpusFormatError(
                f"{self._path.name} was changed by another program between two locks; restore it from a backup"
            )
