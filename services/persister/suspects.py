"""Finds the message that breaks its batch by an error that should not exist (ADR 0005)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from services.eventlog.protocol import Delivery

V = TypeVar("V")


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
