"""Up to where in the log an event may stand whose key the broker has forgotten."""

from __future__ import annotations

import asyncio
from collections import deque

from services.eventlog.protocol import Appended

#: positions that are noted within the time that is looked back on
_MARKS = 16


class Horizon:
    """Positions of new events, and when they were handed to the log.

    The broker forgets by time, and whoever looks for a forgotten event reads the log by position. An event that the
    broker has forgotten is older than its window; so it stands before each event that was handed over within that.

    Args:
        window: seconds for which the broker remembers keys.
        deadline: seconds that an event may take to be stored: so much later the broker may look.
    """

    def __init__(self, window: float, deadline: float) -> None:
        self._trusted = max(0.0, window / 2 - deadline)  # half of it: the clocks of two leaders may differ
        self._marks: deque[tuple[float, int]] = deque(maxlen=_MARKS)
        self._loop = asyncio.get_running_loop()

    def now(self) -> float:
        """Return the time at which an event is handed over, for :meth:`note`."""
        return self._loop.time()

    def note(self, began: float, appended: Appended) -> None:
        """Note where an event stands that was handed over at *began*."""
        step = self._trusted / _MARKS
        if not step or appended.duplicate or (self._marks and began < self._marks[-1][0] + step):
            return
        if self._marks and appended.sequence < self._marks[-1][1]:
            self._marks.clear()  # the log has begun anew
        self._marks.append((began, appended.sequence))

    @property
    def position(self) -> int | None:
        """The position before which every forgotten event stands; None when that is not known."""
        oldest = self._loop.time() - self._trusted
        while self._marks and self._marks[0][0] < oldest:
            self._marks.popleft()
        return self._marks[0][1] if self._marks else None
