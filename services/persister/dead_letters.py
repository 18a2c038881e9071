"""Poison: how it is found, stored in ``fi-dead`` with its reason, and limited.

A message is poison when it is not an event, or when writing it fails twice on its own: after a batch has failed by an
error that one of its messages may have caused, its messages are retried one by one. A flood of poison means a bad
release rather than bad messages: the partition stops before the stream empties itself into the dead letters.

Events under used ids are not poison: the corpus keeps them under /conflicts, and ``fi-dead`` gets a list of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TypeVar

from structlog.typing import FilteringBoundLogger

from services.log.dead_letters import CUT_HEADER, HEADERS_BYTES, conflict_letters, message_headers
from services.log.protocol import DeadLetterStore, Delivery, LogIdentity
from services.persister.errors import PoisonFloodError
from services.persister.metrics import PartitionMetrics, trace_id_in

V = TypeVar("V")

_REMEDY = (
    "look at `fiq dead list` for the reasons and stop what publishes them; to set these aside too, restart "
    "the persister with FI_POISON_STREAK=0 until they are"
)


class DeadLetters:
    """Stores the poison messages of one partition; a message that is stored again is kept once.

    Args:
        store: keeps them.
        partition: its number.
        identity: the log that they come from.
    """

    def __init__(self, store: DeadLetterStore, partition: int, identity: LogIdentity) -> None:
        self._store = store
        self._partition = partition
        self._max_body = max(0, store.max_bytes - HEADERS_BYTES)
        self._log_id = f"{identity.name}/{identity.created}"

    async def send(self, delivery: Delivery, reason: str) -> None:
        """Store *delivery* with its *reason*.

        Raises TransientError: the dead letters are full or cannot be reached; the message is not set aside.
        """
        letter_id = f"{self._log_id}/{delivery.sequence}"
        headers = message_headers(letter_id, delivery.sequence, delivery.consultation, delivery.headers, reason)
        body = delivery.body
        if len(body) > self._max_body:  # our headers are longer than its own, so the whole would be refused for ever
            headers[CUT_HEADER] = str(len(body))
            body = body[: self._max_body]
        await self._store.store(self._partition, body, headers)

    async def list_conflicts(self, conflicts: Sequence[tuple[str, int, int]]) -> None:
        """Store where the corpus keeps *conflicts*, without their bodies, in one letter or more.

        Args:
            conflicts: consultation, sequence, and sequence of the event that holds the id, of each; in stream order.

        Raises TransientError: the dead letters are full or cannot be reached.
        """
        for body, headers in conflict_letters(self._log_id, conflicts, self._max_body):
            await self._store.store(self._partition, body, headers)


class PoisonLimit:
    """Stops a partition when too many messages are poison (after arroyo's ``DlqLimit``).

    Args:
        streak: the partition stops at this many poison messages in a row; 0 for no limit at all.
        ratio: the partition stops above this share of poison among the last *window* messages, 0 to 1.
        window: number of messages; the ratio is not checked before there were as many.
    """

    def __init__(self, *, streak: int = 100, ratio: float = 0.1, window: int = 1000) -> None:
        self._max_streak = streak
        self._max_bad = ratio * window
        self._window = window
        self._bad: deque[int] = deque()  # numbers of those among the last messages
        self._streak = 0

    def count(self, number: int) -> None:
        """Count a bad message, before it is stored as a dead letter.

        Args:
            number: of the message in the partition, from 1; those between two bad ones are good.

        Raises PoisonFloodError: the limit is exceeded.
        """
        in_a_row = self._bad and number <= self._bad[-1] + 1
        self._streak = self._streak + 1 if in_a_row else 1
        self._bad.append(number)
        while self._bad[0] <= number - self._window:
            self._bad.popleft()
        if not self._max_streak:
            return
        if self._streak >= self._max_streak:
            raise PoisonFloodError(f"{self._streak} poison messages in a row: {_REMEDY}")
        if number >= self._window and len(self._bad) > self._max_bad:
            raise PoisonFloodError(f"{len(self._bad)} of the last {self._window} messages were poison: {_REMEDY}")


class Quarantine:
    """Isolates the poison of one partition; without poison and failures nothing of it is called.

    Args:
        dead_letters: where poison is stored.
        limit: how much poison stops the partition.
        metrics: of the partition.
        log: with the partition in each line.

    Attributes:
        known: sequences that are poison although they can be decoded, because writing them failed, and why.
        committed: how many messages of the partition were committed, poison included.
        one_by_one: how many messages are still to be retried one by one, after a failure.
    """

    def __init__(
        self, dead_letters: DeadLetters, limit: PoisonLimit, metrics: PartitionMetrics, log: FilteringBoundLogger
    ) -> None:
        self.known: dict[int, str] = {}
        self.committed = self.one_by_one = 0
        self.dead_letters = dead_letters
        self._limit = limit
        self._metrics = metrics
        self._log = log
        self._counted = 0  # sequence of the last poison that the limit has seen: what is tried again counts once
        self._failures: dict[int, int] = {}  # by sequence

    def failed(self, batch: Sequence[Delivery], error: Exception) -> None:
        """Note that writing *batch* failed by an *error* that one of its messages may have caused."""
        self.one_by_one = max(self.one_by_one, len(batch))
        if len(batch) > 1:
            return
        sequence = batch[0].sequence
        self._failures[sequence] = self._failures.get(sequence, 0) + 1
        if self._failures[sequence] > 1:
            self.known[sequence] = f"could not be written: {type(error).__name__}"

    def succeeded(self, batch: Sequence[Delivery]) -> None:
        """Note that *batch*, which was retried, is committed, and forget what is known about its messages."""
        self.one_by_one = max(0, self.one_by_one - len(batch))
        reached = batch[-1].sequence
        self._failures = _after(self._failures, reached)
        self.known = _after(self.known, reached)

    async def store(self, batch: Sequence[Delivery], poison: Sequence[tuple[Delivery, str]]) -> None:
        """Store the *poison* of *batch* as dead letters, and count it for the limit.

        Raises:
            PoisonFloodError: the limit is exceeded.
            TransientError: the dead letters are full or cannot be reached.
        """
        reasons = {delivery.sequence: reason for delivery, reason in poison}
        for number, delivery in enumerate(batch, self.committed + 1):
            reason = reasons.get(delivery.sequence)
            if reason is None:
                continue
            if delivery.sequence > self._counted:
                self._counted = delivery.sequence
                self._limit.count(number)
            await self.dead_letters.send(delivery, reason)
            self._metrics.dead_letter()
            trace_id = trace_id_in(delivery.headers)
            self._log.warning("EVENT_SET_ASIDE", sequence=delivery.sequence, reason=reason, **trace_id)


def _after(found: Mapping[int, V], sequence: int) -> dict[int, V]:
    return {key: value for key, value in found.items() if key > sequence}
