"""Says in the log when something keeps a partition's checkpoints waiting, and when they go on."""

from __future__ import annotations

from structlog.typing import FilteringBoundLogger

from services.corpus import StoreStats

#: checkpoints that wait for so long are worth a warning, seconds; it is repeated after as long again, doubled each time
WARN_SECONDS = 60.0


class CheckpointWatch:
    """Follows the stats of one partition's store.

    Args:
        log: bound to the partition.
    """

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._warn_after = WARN_SECONDS
        self._compactions = 0

    def note(self, stats: StoreStats) -> None:
        """Look at the *stats* as they are now; call it every second or so."""
        waiting = stats.checkpoint_waiting_seconds
        if waiting >= self._warn_after:
            self._warn_after = 2 * waiting
            self._log.warning(
                "CHECKPOINTS_HELD_BACK",
                reason=stats.checkpoint_deferred_because,
                waiting_s=round(waiting),
                journal_bytes=stats.journal_bytes,
            )
        elif not waiting and self._warn_after > WARN_SECONDS:
            self._warn_after = WARN_SECONDS
            self._log.info("CHECKPOINTS_GO_ON", journal_bytes=stats.journal_bytes)
        if stats.compactions > self._compactions:
            self._log.warning("JOURNAL_COMPACTED", times=stats.compactions, journal_bytes=stats.journal_bytes)
        self._compactions = stats.compactions
