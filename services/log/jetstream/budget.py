"""Shares the memory for events among the followers of a process: busy ones get more, idle ones keep a small minimum.

What a follower *holds* is what it has promised itself to take (its pull requests), what has come and waits, and the
batch that is being worked on. Each may always hold its *floor*, so nobody starves, whatever the others do and however
long a batch of theirs takes; nobody waits for anybody, so nothing can lock up. What the floors leave is shared by those
that have more to fetch than they asked for, in equal parts: one busy partition of sixteen gets nearly all of it. When
another one becomes busy the first keeps what it holds until that is written, and is granted no more than its new part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: the floors take this part of the whole together
_FLOORS = 4


@dataclass(frozen=True, slots=True)
class Held:
    """What a follower holds.

    Attributes:
        events: asked for, waiting, and being worked on.
        size: the same in bytes, about.
        busy: whether the log has more than was asked for.
    """

    events: int
    size: int
    busy: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What a follower may ask for.

    Attributes:
        events: now.
        size: now, bytes.
        all_events: if it held nothing.
        all_size: if it held nothing, bytes.
    """

    events: int
    size: int
    all_events: int
    all_size: int


class Budget:
    """The memory of a process for events.

    Args:
        events: that its followers hold together, at most; for a moment a quarter more when some join.
        size: the same in bytes; the floors may exceed it when messages may be large.
    """

    def __init__(self, events: int, size: int) -> None:
        self._events = events
        self._size = size
        self._members: dict[Share, None] = {}

    def join(self, held: Callable[[], Held], *, largest: int) -> Share:
        """Add a follower.

        Args:
            held: tells what it holds.
            largest: bytes of the largest message; the floor has room for two.
        """
        share = Share(self, held, largest)
        self._members[share] = None
        return share

    def leave(self, share: Share) -> None:
        """Remove a follower, which holds nothing any more. Idempotent."""
        self._members.pop(share, None)

    def room(self, share: Share) -> Room:
        """Return what the follower with *share* may ask for."""
        held = {one: one.held() for one in self._members}
        busy = max(1, sum(one.busy for one in held.values()))
        own = held[share]
        events, all_events = _room(
            self._events, [one.events for one in held.values()], own.events, self._floor_events(), busy, own.busy
        )
        size, all_size = _room(
            self._size, [one.size for one in held.values()], own.size, self._floor_size(share), busy, own.busy
        )
        return Room(events, size, all_events, all_size)

    def _floor_events(self) -> int:
        return max(1, self._events // (_FLOORS * len(self._members)))

    def _floor_size(self, share: Share) -> int:
        return max(2 * share.largest, self._size // (_FLOORS * len(self._members)))


class Share:
    """One follower's part in a :class:`Budget`."""

    __slots__ = ("_budget", "held", "largest")

    def __init__(self, budget: Budget, held: Callable[[], Held], largest: int) -> None:
        self._budget = budget
        self.held = held
        self.largest = largest

    def room(self) -> Room:
        """Return what the follower may ask for now."""
        return self._budget.room(self)

    def leave(self) -> None:
        """Hold nothing any more. Idempotent."""
        self._budget.leave(self)


def _room(total: int, held: list[int], own: int, floor: int, busy: int, is_busy: bool) -> tuple[int, int]:
    """Return how much one may add to its *own*, and how much it might hold in all."""
    pool = max(0, total - floor * len(held))
    part = pool // busy if is_busy else 0
    free = pool - sum(max(0, one - floor) for one in held)
    above = max(0, own - floor)
    return max(0, floor - own) + max(0, min(free, part - above)), floor + part
