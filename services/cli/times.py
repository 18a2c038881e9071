"""Times on the command line: what ``--since`` and ``--until`` take, and how the time of an event is written."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from services.cli.errors import UsageError
from services.core.settings import seconds

_TAKES = "2026-11-27, 2026-11-27T08:00:00Z, or a span before now such as 90d or 12h"
SinceOption = Annotated[
    str | None, typer.Option(help="Only what came then or later: a date, a time, or 12h for 12 hours ago.")
]
UntilOption = Annotated[str | None, typer.Option(help="Only what came before then; the same forms.")]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: longest span, seconds: a hundred years
_LONGEST = 100 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Period:
    """The time from *since* to before *until*, nanoseconds since the Unix epoch."""

    since: int = -(2**63)
    until: int = 2**63 - 1

    @classmethod
    def of(cls, since: str | None, until: str | None) -> Period:
        """Read the two options; None leaves that side open. Raises CommandError: one of them is malformed."""
        return cls(
            ALWAYS.since if since is None else _nanoseconds("--since", since),
            ALWAYS.until if until is None else _nanoseconds("--until", until),
        )

    def hold(self, nanoseconds: Any) -> Any:
        """Return whether a time is in it; for an array of times an array."""
        return (nanoseconds >= self.since) & (nanoseconds < self.until)


ALWAYS = Period()


def _nanoseconds(option: str, text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            if not text[-1:].isalpha():
                raise ValueError("a number without a unit may be a year")
            moment = datetime.now(UTC) - timedelta(seconds=seconds(0, _LONGEST)(text))
        except ValueError:
            raise UsageError(f"{option} takes {_TAKES}, not {text!r}") from None
    if moment.tzinfo is None:
        if ":" in text:
            raise UsageError(f"{option} {text}: a time of day needs a zone, such as Z for UTC") from None
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


def iso(nanoseconds: int, *, timespec: str = "microseconds") -> str:
    """Return a time as ISO 8601 in UTC, to the microsecond."""
    whole, rest = divmod(nanoseconds, 1_000_000_000)
    moment = datetime.fromtimestamp(whole, UTC).replace(microsecond=rest // 1000)
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")
