"""Events under used keys: to ``fi-dead`` whole while they are few, and as lists when one client's mistake is a flood.

They are no poison and stop nothing: whoever shares the partition with that client would wait for it (ADR 0016).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from services.eventlog.protocol import Delivery
from services.persister.batch import Reused
from services.persister.dead_letters import DeadLetters
from services.persister.metrics import PartitionMetrics
from services.persister.traces import trace_id_in

#: events of one consultation that are copied whole in a window
PER_CONSULTATION = 10
#: how long a window is, seconds
WINDOW_SECONDS = 86_400.0
#: what a dead letter takes besides its body, about, bytes
LETTER_BYTES = 1024
#: a window's copies of all partitions together may take this share of ``fi-dead``
SHARE = 0.25
#: and those of one partition so much, unless it is told, bytes
_BYTES = 4 * 2**20


class Allowance:
    """How many events under used keys may be copied whole.

    Args:
        size: bytes that all copies of a window may take.
        clock: tells the time in seconds.
    """

    def __init__(self, size: int = _BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._clock = clock
        self._begin()

    def take(self, consultation: str, sequence: int, size: int) -> bool:
        """Return whether the event at *sequence*, of *size* bytes, may be copied; the answer yes stays the same."""
        if self._clock() - self._began >= WINDOW_SECONDS:
            self._begin()
        if sequence in self._granted:
            return True
        size += LETTER_BYTES
        if self._copies[consultation] >= PER_CONSULTATION or self._taken + size > self._size:
            return False
        self._granted.add(sequence)
        self._copies[consultation] += 1
        self._taken += size
        return True

    def _begin(self) -> None:
        self._began = self._clock()
        self._taken = 0
        self._granted: set[int] = set()
        self._copies: Counter[str] = Counter()


class ReusedKeys:
    """Tells of the events of one partition that came under used keys.

    Args:
        dead: takes them.
        metrics: of the partition.
        log: of the partition.
        allowance: how many are copied whole.
    """

    def __init__(self, dead: DeadLetters, metrics: PartitionMetrics, log: Any, allowance: Allowance) -> None:
        self._dead = dead
        self._metrics = metrics
        self._log = log
        self._allowance = allowance

    async def set_aside(self, batch: Sequence[Delivery], reused: Sequence[Reused]) -> None:
        """Store what tells of *reused*, events of *batch*; raises as :meth:`DeadLetters.send` does."""
        deliveries = {delivery.sequence: delivery for delivery in batch}
        listed: list[Reused] = []
        for one in reused:
            if self._allowance.take(one.event.consultation, one.sequence, len(one.event.body)):
                await self._copy(deliveries[one.sequence], one)
            else:
                listed.append(one)
        if listed:
            await self._dead.send_list(listed)
            self._metrics.reused_keys_listed(len(listed))
            first, last = listed[0].sequence, listed[-1].sequence
            self._log.warning("EVENT_KEYS_LISTED", events=len(listed), first_sequence=first, last_sequence=last)

    async def _copy(self, delivery: Delivery, reused: Reused) -> None:
        reason = f"its consultation holds this message id with another body, at sequence {reused.first}"
        await self._dead.send(delivery, reason)
        self._metrics.reused_key()
        traced = trace_id_in(delivery.headers)
        self._log.warning("EVENT_KEY_REUSED", sequence=reused.sequence, first_sequence=reused.first, **traced)
