"""Bookkeeping of pipelined pull requests: the next one is under way before the last is finished.

What is *promised* is what was asked for and neither arrived nor was declined by the broker. A replicated consumer sends
a message once its delivery is agreed upon among the nodes, but the status that ends its request at once: the end of a
request says nothing about what is still under way. (Measured with three nodes: 14 requests ended before the first of
their messages came. Counting them as done asked for ten times the buffer.) The broker serves open requests in
turn, so messages cannot be told apart by request either; only the sums are known, and they are all that is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.eventlog.jetstream.budget import Room

#: one request brings at most these
MAX_EVENTS = 8192
MAX_BYTES = 16 * 2**20
#: a request is worth sending when it can bring this part of what may be held in all
_WORTH = 4


@dataclass(frozen=True, slots=True)
class Pull:
    """One request for messages.

    Attributes:
        inbox: where its answers go; the last token is its number.
        events: messages that it may bring.
        max_bytes: bytes that it may bring in all.
    """

    inbox: str
    events: int
    max_bytes: int


class Pulls:
    """The pull requests of one consumer.

    Args:
        largest: bytes of the largest message: a request that could not bring it would end at once, again and again.
    """

    #: a pull that found nothing ends after this time and is renewed
    EXPIRES_NS = 30_000_000_000

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._events = 0
        self._bytes = 0
        self._number = 0
        self.inbox = ""

    @property
    def promised(self) -> int:
        """How many events may still come."""
        return self._events

    @property
    def promised_bytes(self) -> int:
        """The same in bytes, about."""
        return self._bytes

    def clear(self) -> None:
        """Forget every request."""
        self._events = self._bytes = 0

    def next(self, room: Room) -> Pull | None:
        """Return a request to send now; None when there is no *room* that makes one worth it."""
        least_events, least_size = 1, self._largest
        if self._events:  # without a request under way any is worth it
            least_events = max(least_events, min(room.all_events // _WORTH, MAX_EVENTS // 2))
            least_size = max(least_size, min(room.all_size // _WORTH, MAX_BYTES // 2))
        if room.events < least_events or room.size < least_size:
            return None
        self._number += 1
        return Pull(f"{self.inbox}.{self._number}", min(room.events, MAX_EVENTS), min(room.size, self._most_bytes))

    @property
    def _most_bytes(self) -> int:
        return max(MAX_BYTES, self._largest)

    def sent(self, pull: Pull) -> None:
        """Note that *pull* is under way."""
        self._events += pull.events
        self._bytes += pull.max_bytes

    def delivered(self, size: int) -> None:
        """Note one message of *size* bytes, as the broker counts them: subjects and headers included."""
        self._less(1, size)

    def ended(self, events: int, size: int) -> None:
        """Note that the broker ended a request, of which *events* and *size* bytes will not come."""
        self._less(events, size)

    def _less(self, events: int, size: int) -> None:
        self._events = max(0, self._events - events)
        # the sizes are ours and the broker's: what they differ by must not add up
        self._bytes = max(0, self._bytes - size) if self._events else 0
