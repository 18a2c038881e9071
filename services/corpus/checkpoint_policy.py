"""When a store makes checkpoints, and what it does while they are put off."""

from __future__ import annotations

import time

from services.corpus.atomic_file import JournaledFile
from services.corpus.options import StoreOptions

#: how long after a checkpoint that had to wait the next one is tried, seconds
_DEFERRED_RETRY = 1.0


class CheckpointPolicy:
    """Decides for one open file.

    Args:
        journaled: the file.
        options: its limits.
    """

    def __init__(self, journaled: JournaledFile, options: StoreOptions) -> None:
        self._journaled = journaled
        self._options = options
        self._oldest_in_journal: float | None = None
        self._next_attempt = 0.0
        self._deferred_since: float | None = None
        self._deferred = 0
        self._compactions = 0
        self._compact_from = options.journal_limit

    @property
    def waiting_seconds(self) -> float:
        """For how long checkpoints have been put off; 0 when they are not."""
        since = self._deferred_since
        return 0.0 if since is None else time.monotonic() - since

    def note_commit(self, moment: float) -> None:
        """Take note of a commit that was begun at *moment*."""
        self._oldest_in_journal = self._oldest_in_journal or moment

    def make(self) -> bool:
        """Make a checkpoint now and wait for it; False when it is put off."""
        done = self._journaled.checkpoint()
        if done:
            self._oldest_in_journal = None
        self._note_deferrals()
        return done

    def begin(self, *, now: bool) -> bool:
        """Begin one beside the commits when it is due, or *now*; return whether one was begun."""
        self._journaled.collect()
        self._note_deferrals()
        if (now or self._is_due()) and self._journaled.start_checkpoint():
            self._oldest_in_journal = None
            return True
        self._note_deferrals()
        self._bound_journal()
        return False

    def _is_due(self) -> bool:
        if not self._journaled.journal_bytes or self._journaled.busy:
            return False
        moment = time.monotonic()
        old = self._oldest_in_journal is None or moment - self._oldest_in_journal >= self._options.checkpoint_seconds
        long = self._journaled.journal_bytes >= self._options.checkpoint_bytes
        return (old or long) and moment >= self._next_attempt

    def _note_deferrals(self) -> None:
        """Take note of a checkpoint that was put off, so that the next one is not tried at every commit."""
        stats = self._journaled.stats
        if stats.checkpoints_deferred > self._deferred:
            self._deferred = stats.checkpoints_deferred
            self._next_attempt = time.monotonic() + _DEFERRED_RETRY
            self._deferred_since = self._deferred_since or time.monotonic()
        elif not stats.deferred_because:
            self._deferred_since = None

    def _bound_journal(self) -> None:
        """Compact a journal that has outgrown its limit since a reader holds checkpoints back."""
        size, limit = self._journaled.journal_bytes, self._options.journal_limit
        if self._journaled.stats.compactions > self._compactions or self._deferred_since is None:
            self._compactions = self._journaled.stats.compactions
            # what it cannot make shorter must not be tried again soon
            self._compact_from = max(limit, 2 * size)
        elif size >= self._compact_from and self._journaled.start_compaction():
            self._compact_from = 2 * size
