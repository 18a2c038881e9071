"""How long a call is tried, and how long it waits in between."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client tries.

    Attributes:
        deadline: of one call with all of its tries and pauses, seconds. Of :meth:`FiqClient.follow`: the longest time
            without a word from the service.
        attempt: of one try, seconds; more than the service's FI_PUBLISH_DEADLINE.
        first_pause: before the second try, seconds; each further one is twice as long. The half of it is by chance, so
            that many clients do not come back at once.
        longest_pause: what the pauses grow to, seconds. A longer ``Retry-After`` counts all the same.
    """

    deadline: float = 60.0
    attempt: float = 15.0
    first_pause: float = 0.1
    longest_pause: float = 5.0


class Tries:
    """The tries of one call."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.renew()

    def renew(self) -> None:
        """Begin anew: the last try was a success."""
        self._failed = 0
        self._end = time.monotonic() + self._patience.deadline

    @property
    def timeout(self) -> float:
        """Seconds that the next try may take."""
        return max(0.001, min(self._patience.attempt, self._end - time.monotonic()))

    def pause(self, retry_after: float) -> float | None:
        """Return how long to wait after a failed try, seconds; None when the deadline does not allow another one.

        Args:
            retry_after: what the service asks for at least, seconds.
        """
        backoff = min(self._patience.longest_pause, self._patience.first_pause * 2.0 ** min(self._failed, 32))
        self._failed += 1
        pause = retry_after + backoff * random.uniform(0.5, 1.0)  # noqa: S311 - no secrets
        return pause if time.monotonic() + pause < self._end else None


def retry_after(headers: Mapping[str, str]) -> float:
    """Return what ``Retry-After`` asks for, seconds; 0 when it is missing or malformed (RFC 9110, section 10.2.3)."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:  # "-0000": UTC without a place
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
