"""Sets the poison of one partition's batches aside, and counts every message once for the limit on it."""

from __future__ import annotations

from collections.abc import Sequence

from structlog.typing import FilteringBoundLogger

from services.eventlog.protocol import Delivery
from services.persister.batch import Sorted
from services.persister.dead_letters import DeadLetters, PoisonLimit
from services.persister.metrics import PartitionMetrics
from services.persister.traces import trace_id_in


class SetAside:
    """Judges the messages of one partition.

    Args:
        dead: where poison goes.
        limit: when it is a flood.
        metrics: of the partition.
        log: with the partition in each line.
    """

    def __init__(
        self, dead: DeadLetters, limit: PoisonLimit, metrics: PartitionMetrics, log: FilteringBoundLogger
    ) -> None:
        self._dead = dead
        self._limit = limit
        self._metrics = metrics
        self._log = log
        #: last sequence that was counted: a batch that is tried again counts once
        self._judged = 0

    def none_of(self, batch: Sequence[Delivery]) -> None:
        """Count a *batch* without poison."""
        self._limit.count_good(sum(delivery.sequence > self._judged for delivery in batch))
        self._judged = max(self._judged, batch[-1].sequence)

    async def poison_of(self, batch: Sequence[Delivery], sorted_: Sorted) -> None:
        """Send the poison of *batch* away; when this returns, it is safe.

        Raises:
            PoisonFloodError: there is too much of it.
        """
        poison = {delivery.sequence: reason for delivery, reason in sorted_.poison}
        for delivery in batch:
            reason = poison.get(delivery.sequence)
            if delivery.sequence > self._judged:
                self._judged = delivery.sequence
                self._limit.count(bad=reason is not None)
            if reason is None:
                continue
            await self._dead.send(delivery, reason)
            self._metrics.dead_letter()
            traced = trace_id_in(delivery.headers)
            self._log.warning("EVENT_SET_ASIDE", sequence=delivery.sequence, reason=reason, **traced)
