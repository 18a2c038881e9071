"""Bookkeeping of pipelined pull requests: two halves of the buffer in turn, so that the broker never waits for us.

What is *promised* is what was asked for and neither arrived nor was declined by the broker. A replicated consumer sends
a message once its delivery is agreed upon among the nodes, but the status that ends its request at once: the end of a
request says nothing about what is still under way. (Measured with three nodes: 14 requests ended before the first of
their messages came. Counting them as done asked for ten times the buffer.) The broker serves open requests in
turn, so messages cannot be told apart by request either; only the sums are known, and they are all that is needed.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        max_events: events in the buffer and promised together, at most.
        max_bytes: the same in bytes, about.
    """

    #: a pull that found nothing ends after this time and is renewed
    EXPIRES_NS = 30_000_000_000

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._half_events = max(1, max_events // 2)
        self._half_bytes = max_bytes // 2
        self._events = 0
        self._bytes = 0
        self._number = 0
        self.inbox = ""

    @property
    def promised(self) -> int:
        """How many events may still come."""
        return self._events

    def clear(self) -> None:
        """Forget every request."""
        self._events = self._bytes = 0

    def next(self, buffered: int, buffered_bytes: int) -> Pull | None:
        """Return a request to send now, or None when the buffer has no room for what it could bring."""
        if buffered + self._events > self._half_events or buffered_bytes + self._bytes > self._half_bytes:
            return None
        self._number += 1
        return Pull(f"{self.inbox}.{self._number}", self._half_events, self._half_bytes)

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
