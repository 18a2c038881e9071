"""The events that a follower holds: those that came and wait, and the batch that is being worked on."""

from __future__ import annotations

from collections import deque

from services.eventlog.protocol import Delivery


class Buffer:
    """Deliveries in order; what was taken counts until it is done.

    Attributes:
        events: how many it holds.
        size: bytes of their bodies.
    """

    def __init__(self) -> None:
        self._waiting: deque[Delivery] = deque()
        self._taken = self._taken_size = 0
        self.events = self.size = 0

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def put(self, delivery: Delivery) -> None:
        """Add *delivery* behind the others."""
        self._waiting.append(delivery)
        self.events += 1
        self.size += len(delivery.body)

    def take(self, max_events: int, max_bytes: int) -> list[Delivery]:
        """Return those that wait, at most *max_events* and about *max_bytes*, at least one; they are in hand then."""
        taken: list[Delivery] = []
        size = 0
        waiting = self._waiting
        while waiting and len(taken) < max_events and (not taken or size + len(waiting[0].body) <= max_bytes):
            delivery = waiting.popleft()
            size += len(delivery.body)
            taken.append(delivery)
        self._taken, self._taken_size = len(taken), size
        return taken

    def done(self) -> bool:
        """Let go of what was taken last; say whether there was anything."""
        taken = self._taken
        self.events -= taken
        self.size -= self._taken_size
        self._taken = self._taken_size = 0
        return taken > 0

    def clear(self) -> None:
        """Let go of everything."""
        self._waiting.clear()
        self._taken = self._taken_size = self.events = self.size = 0
