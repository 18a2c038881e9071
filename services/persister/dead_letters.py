"""Poison messages: to stream ``fi-dead`` with their reason, and a limit that tells bad messages from a bad release."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import repeat
from typing import Protocol

import orjson

from services.contract.event import MESSAGE_ID_HEADER
from services.eventlog.jetstream.names import dead_subject
from services.eventlog.protocol import Appended, Delivery, LogIdentity
from services.persister.batch import Reused
from services.persister.errors import PoisonFloodError

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
_LISTED = (
    "events under message ids that their consultations hold with another body, too many to be copied: "
    "[sequence, sequence of the one that is kept]; fi-events has them until they are trimmed"
)
#: more than the headers of a dead letter take, bytes
HEADERS_BYTES = 4096
#: more than an event takes in a list, bytes
_ENTRY_BYTES = 256
#: longest copy of a foreign header's value, characters
_MAX_COPIED = 300


class Publishes(Protocol):
    """What a dead letter is sent with."""

    async def publish(self, subject: str, body: bytes, headers: dict[str, str]) -> Appended:
        """Store *body* under *subject* on a quorum of nodes."""
        ...


class DeadLetters:
    """Sends the poison messages of one partition away; the same message is kept once, however often it is sent.

    Args:
        publisher: what they are sent with.
        partition: its number.
        identity: the log that they come from.
        max_bytes: what the broker takes as one message, headers included.
    """

    def __init__(self, publisher: Publishes, partition: int, identity: LogIdentity, *, max_bytes: int) -> None:
        self._max_body = max(0, max_bytes - HEADERS_BYTES)
        self._publisher = publisher
        self._subject = dead_subject(partition)
        self._log_id = f"{identity.name}/{identity.created}"

    async def send(self, delivery: Delivery, reason: str) -> None:
        """Store *delivery* with its *reason*.

        Raises:
            TransientError: the dead-letter stream is full or out of reach; the message does not count as done.
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
        await self._publisher.publish(self._subject, body, headers)

    async def send_list(self, reused: Sequence[Reused]) -> None:
        """Store where *reused* stand, and none of their bodies; in one letter or more; raises as :meth:`send`."""
        most = max(1, self._max_body // _ENTRY_BYTES)
        for part in (reused[start : start + most] for start in range(0, len(reused), most)):
            of_consultations: dict[str, list[tuple[int, int]]] = {}
            for one in part:
                of_consultations.setdefault(one.event.consultation, []).append((one.sequence, one.first))
            lines = [orjson.dumps({"consultation_id": name, "reused": at}) for name, at in of_consultations.items()]
            headers = {
                MESSAGE_ID_HEADER: f"{self._log_id}/{part[0].sequence}-{part[-1].sequence}",
                REASON_HEADER: _LISTED,
                SEQUENCE_HEADER: str(part[0].sequence),
                LISTED_HEADER: str(len(part)),
            }
            await self._publisher.publish(self._subject, b"\n".join(lines), headers)


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

        Raises:
            PoisonFloodError: this one is one bad message too many.
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


def _printable(value: str) -> str:
    return "".join(c for c in value[:_MAX_COPIED] if " " <= c <= "~").strip()
