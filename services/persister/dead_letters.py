"""Poison: how it is found, stored in ``fi-dead`` with its reason, and limited.

A message is poison when it is not an event, or when writing it fails twice on its own: after a batch has failed by an
error that one of its messages may have caused, its messages are retried one by one. A flood of poison means a bad
release rather than bad messages: the partition stops before the stream empties itself into the dead letters.

Events under used ids are not poison: the corpus keeps them under /conflicts, and ``fi-dead`` gets a list of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import repeat
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
        self._max_ratio = ratio
        self._recent: deque[bool] = deque(maxlen=window)
        self._window = window
        self._bad = 0
        self._streak = 0

    def count(self, *, bad: bool) -> None:
        """Count a message, a bad one before it is stored as a dead letter.

        Raises PoisonFloodError: the limit is exceeded.
        """
        if len(self._recent) == self._window:
            self._bad -= self._recent[0]
        self._recent.append(bad)
        self._bad += bad
        self._streak = self._streak + 1 if bad else 0
        if bad and self._max_streak:
            self._check()

    def count_good(self, number: int) -> None:
        """Count *number* good messages in a row."""
        if number:
            self._streak = 0
            self._recent.extend(repeat(False, min(number, self._window)))
            self._bad = sum(self._recent) if self._bad else 0

    def _check(self) -> None:
        if self._streak >= self._max_streak:
            raise PoisonFloodError(f"{self._streak} poison messages in a row: {_REMEDY}")
        if len(self._recent) == self._window and self._bad > self._max_ratio * self._window:
            raise PoisonFloodError(f"{self._bad} of the last {self._window} messages were poison: {_REMEDY}")


class Quarantine:
    """Isolates the poison of one partition.

    Args:
        dead_letters: where poison is stored.
        limit: how much poison stops the partition.
        metrics: of the partition.
        log: with the partition in each line.

    Attributes:
        known: sequences that are poison although they can be decoded, because writing them failed, and why.
    """

    def __init__(
        self, dead_letters: DeadLetters, limit: PoisonLimit, metrics: PartitionMetrics, log: FilteringBoundLogger
    ) -> None:
        self.known: dict[int, str] = {}
        self.dead_letters = dead_letters
        self._limit = limit
        self._metrics = metrics
        self._log = log
        self._counted = 0  # last sequence that the limit has seen: a batch that is tried again counts once
        self._failures: dict[int, int] = {}  # by sequence
        self._left = 0  # messages that are still to be retried one by one

    @property
    def one_by_one(self) -> bool:
        """Whether the next batch must be a single message."""
        return self._left > 0

    def failed(self, batch: Sequence[Delivery], error: Exception) -> None:
        """Note that writing *batch* failed by an *error* that one of its messages may have caused."""
        if len(batch) > 1:
            self._left = len(batch)
            return
        sequence = batch[0].sequence
        self._failures[sequence] = self._failures.get(sequence, 0) + 1
        if self._failures[sequence] > 1:
            self.known[sequence] = f"could not be written: {type(error).__name__}"

    def succeeded(self, batch: Sequence[Delivery]) -> None:
        """Note that *batch* is committed, and forget what is known about its messages."""
        self._left = max(0, self._left - len(batch))
        reached = batch[-1].sequence
        self._failures = _after(self._failures, reached)
        self.known = _after(self.known, reached)

    async def store(self, batch: Sequence[Delivery], poison: Sequence[tuple[Delivery, str]]) -> None:
        """Store the *poison* of *batch* as dead letters; count the whole batch for the limit.

        Raises:
            PoisonFloodError: the limit is exceeded.
            TransientError: the dead letters are full or cannot be reached.
        """
        if not poison:
            self._limit.count_good(sum(delivery.sequence > self._counted for delivery in batch))
            self._counted = max(self._counted, batch[-1].sequence)
            return
        reasons = {delivery.sequence: reason for delivery, reason in poison}
        for delivery in batch:
            reason = reasons.get(delivery.sequence)
            if delivery.sequence > self._counted:
                self._counted = delivery.sequence
                self._limit.count(bad=reason is not None)
            if reason is None:
                continue
            await self.dead_letters.send(delivery, reason)
            self._metrics.dead_letter()
            trace_id = trace_id_in(delivery.headers)
            self._log.warning("EVENT_SET_ASIDE", sequence=delivery.sequence, reason=reason, **trace_id)


def _after(found: Mapping[int, V], sequence: int) -> dict[int, V]:
    return {key: value for key, value in found.items() if key > sequence}
