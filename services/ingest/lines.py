"""As many log lines of each kind as anybody can read: who is refused decides how often, and must not fill a disk."""

from __future__ import annotations

from collections import Counter

from services.ingest.rates import Rates

#: lines of one kind a second in the long run, and at once
_RATE, _BURST = 5.0, 50


class Lines:
    """Decides which lines are written. The others are counted, and told with the next one of their kind."""

    def __init__(self) -> None:
        self._rates = Rates(_RATE, _BURST)
        self._left_out: Counter[str] = Counter()

    def told(self, kind: str) -> dict[str, int] | None:
        """Return what a line of *kind* should say besides, ``left_out`` if any were; None when it is left out itself.

        Args:
            kind: one of a few; each is remembered for ever.
        """
        if self._rates.take(kind):
            self.leave_out(kind)
            return None
        left_out = self._left_out.pop(kind, 0)
        return {"left_out": left_out} if left_out else {}

    def leave_out(self, kind: str) -> None:
        """Count a line of *kind* that is not written."""
        self._left_out[kind] += 1
