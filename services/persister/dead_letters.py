"""Poison messages: to stream ``fi-dead`` with their reason, and a limit that tells bad messages from a bad release.

A message is poison when it is no event, or when it alone breaks the writing of its batch twice. Events under used ids
are no poison: the corpus keeps them beside the others, and ``fi-dead`` gets a pointer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import TypeVar

import orjson
from structlog.typing import FilteringBoundLogger

from fiq.event import MESSAGE_ID_HEADER
from services.log.protocol import DeadLetterStore, Delivery, LogIdentity
from services.persister.errors import PoisonFloodError
from services.persister.metrics import PartitionMetrics
from services.persister.traces import trace_id_in

V = TypeVar("V")

#: header: why the message could not be written
REASON_HEADER = "Fi-Reason"
#: header: its position in ``fi-events``
SEQUENCE_HEADER = "Fi-Stream-Sequence"
#: header: the consultation's token of its subject, as far as it is printable ASCII
CONSULTATION_HEADER = "Fi-Consultation"
#: header: the message id it had, as far as it is printable ASCII
ORIGINAL_ID_HEADER = "Fi-Original-Msg-Id"

#: header: how many events the letter lists
LISTED_HEADER = "Fi-Listed"
#: header: size of a body that was too long to be kept whole, bytes; what is here is its beginning
CUT_HEADER = "Fi-Cut-From-Bytes"

_REMEDY = (
    "look at `nats stream view fi-dead` for the reasons and stop what publishes them; when these are to be set aside "
    "too, restart the persister with FI_POISON_STREAK=0 until it is through"
)
_POINTER = (
    "events under message ids that their consultations hold with another body: [sequence, sequence of the one that "
    "holds the id]; the partition file keeps them under /conflicts/<consultation>"
)
#: more than the headers of a dead letter take, bytes
HEADERS_BYTES = 4096
#: more than an event takes in a list, bytes
_ENTRY_BYTES = 256
#: longest copy of a foreign header's value, characters
_MAX_COPIED = 300


class DeadLetters:
    """Sends the poison messages of one partition away; the same message is kept once, however often it is sent.

    Args:
        letters: keeps them.
        partition: its number.
        identity: the log that they come from.
    """

    def __init__(self, letters: DeadLetterStore, partition: int, identity: LogIdentity) -> None:
        self._max_body = max(0, letters.max_bytes - HEADERS_BYTES)
        self._letters = letters
        self._partition = partition
        self._log_id = f"{identity.name}/{identity.created}"

    async def send(self, delivery: Delivery, reason: str) -> None:
        """Store *delivery* with its *reason*.

        Raises TransientError: the dead-letter stream is full or out of reach; the message does not count as done.
        """
        headers = {
            MESSAGE_ID_HEADER: f"{self._log_id}/{delivery.sequence}",
            REASON_HEADER: reason,
            SEQUENCE_HEADER: str(delivery.sequence),
        }
        original = (delivery.headers or {}).get(MESSAGE_ID_HEADER, "")
        for name, value in ((CONSULTATION_HEADER, delivery.consultation), (ORIGINAL_ID_HEADER, original)):
            if shown := _printable(value):
                headers[name] = shown
        body = delivery.body
        if len(body) > self._max_body:  # whole it would be refused for ever: our headers are longer than its own
            headers[CUT_HEADER] = str(len(body))
            body = body[: self._max_body]
        await self._letters.store(self._partition, body, headers)

    async def point_to(self, conflicts: Sequence[tuple[str, int, int]]) -> None:
        """Tell where the corpus keeps *conflicts*, without their bodies, in one letter or more.

        Args:
            conflicts: consultation, sequence, and sequence of the event that holds the id, of each; in stream order.

        Raises TransientError: the dead-letter stream is full or out of reach.
        """
        most = max(1, self._max_body // _ENTRY_BYTES)
        for part in (conflicts[start : start + most] for start in range(0, len(conflicts), most)):
            of_each: dict[str, list[tuple[int, int]]] = {}
            for consultation, sequence, first in part:
                of_each.setdefault(consultation, []).append((sequence, first))
            lines = [orjson.dumps({"consultation_id": name, "conflicts": at}) for name, at in of_each.items()]
            headers = {
                MESSAGE_ID_HEADER: f"{self._log_id}/{part[0][1]}-{part[-1][1]}",
                REASON_HEADER: _POINTER,
                SEQUENCE_HEADER: str(part[0][1]),
                LISTED_HEADER: str(len(part)),
            }
            await self._letters.store(self._partition, b"\n".join(lines), headers)


class PoisonLimit:
    """Stops a partition when bad messages come in a flood (after arroyo's ``DlqLimit``).

    Args:
        streak: bad messages in a row that are one too many; 0 for no limit at all.
        ratio: share of bad ones among the last *window* messages that is too much, 0 to 1.
        window: messages looked back on; the ratio counts only once so many have been seen.
    """

    def __init__(self, *, streak: int = 100, ratio: float = 0.1, window: int = 1000) -> None:
        self._max_streak = streak
        self._max_ratio = ratio
        self._recent: deque[bool] = deque(maxlen=window)
        self._window = window
        self._bad = 0
        self._streak = 0

    def count(self, *, bad: bool) -> None:
        """Count a message, a bad one before it is sent away.

        Raises PoisonFloodError: this one is one bad message too many.
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

    async def poison_of(self, batch: Sequence[Delivery], poison: Sequence[tuple[Delivery, str]]) -> None:
        """Send the *poison* of *batch* away, and count all of it; when this returns, the poison is safe.

        Raises:
            PoisonFloodError: there is too much of it.
            TransientError: the dead-letter stream is full or out of reach.
        """
        if not poison:
            self._limit.count_good(sum(delivery.sequence > self._judged for delivery in batch))
            self._judged = max(self._judged, batch[-1].sequence)
            return
        reasons = {delivery.sequence: reason for delivery, reason in poison}
        for delivery in batch:
            reason = reasons.get(delivery.sequence)
            if delivery.sequence > self._judged:
                self._judged = delivery.sequence
                self._limit.count(bad=reason is not None)
            if reason is None:
                continue
            await self._dead.send(delivery, reason)
            self._metrics.dead_letter()
            traced = trace_id_in(delivery.headers)
            self._log.warning("EVENT_SET_ASIDE", sequence=delivery.sequence, reason=reason, **traced)


class Suspects:
    """Takes a batch that failed singly; what fails alone twice counts as poison.

    Attributes:
        condemned: sequences that count as poison, and why.
    """

    def __init__(self) -> None:
        self.condemned: dict[int, str] = {}
        self._failed: dict[int, int] = {}
        self._left = 0

    @property
    def singly(self) -> bool:
        """Whether the next batch must be a single message."""
        return self._left > 0

    def failed(self, batch: Sequence[Delivery], error: Exception) -> None:
        """Note that *batch* failed by an *error* that may be one message's."""
        if len(batch) > 1:
            self._left = len(batch)
            return
        sequence = batch[0].sequence
        self._failed[sequence] = self._failed.get(sequence, 0) + 1
        if self._failed[sequence] > 1:
            self.condemned[sequence] = f"could not be written: {type(error).__name__}"

    def passed(self, batch: Sequence[Delivery]) -> None:
        """Note that *batch* is written or set aside, and forget what is known of it."""
        self._left = max(0, self._left - len(batch))
        reached = batch[-1].sequence
        self._failed = _behind(self._failed, reached)
        self.condemned = _behind(self.condemned, reached)


def _behind(found: Mapping[int, V], sequence: int) -> dict[int, V]:
    return {key: value for key, value in found.items() if key > sequence}


def _printable(value: str) -> str:
    return "".join(c for c in value[:_MAX_COPIED] if " " <= c <= "~").strip()
