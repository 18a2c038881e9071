"""Times on the command line."""

from __future__ import annotations

import time

import pytest

from services.cli.errors import CommandError
from services.cli.times import ALWAYS, Period, iso

RECEIVED_NS = 1_795_453_297_123_456_789


@pytest.mark.parametrize(
    ("nanoseconds", "expected"),
    [(0, "1970-01-01T00:00:00.000000Z"), (RECEIVED_NS, "2026-11-23T17:01:37.123456Z")],
)
def test_times_are_iso_8601_in_utc(nanoseconds: int, expected: str) -> None:
    """Always six digits, so that texts sort as times do."""
    assert expected == iso(nanoseconds)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-23", "2026-11-23T00:00:00.000000Z"),
        ("20261123", "2026-11-23T00:00:00.000000Z"),
        ("2026-11-23T17:00:00Z", "2026-11-23T17:00:00.000000Z"),
        ("2026-11-23T17:00:00+02:00", "2026-11-23T15:00:00.000000Z"),
    ],
)
def test_a_time_is_a_day_of_utc_or_has_a_zone(text: str, expected: str) -> None:
    """The same command means the same on each machine."""
    assert expected == iso(Period.of(text, None).since)


def test_a_span_ends_now() -> None:
    """--since 12h is twelve hours ago."""
    assert abs(Period.of("12h", None).since - (time.time_ns() - 12 * 3600 * 10**9)) < 60 * 10**9


def test_a_period_holds_its_first_moment_and_not_its_last() -> None:
    """So that two that follow each other have no event in common."""
    period = Period(10, 20)
    assert [False, True, True, False] == [bool(period.hold(moment)) for moment in (9, 10, 19, 20)]
    assert ALWAYS == Period.of(None, None)


@pytest.mark.parametrize("text", ["yesterday", "2026-11-23T17:00:00", "12 moons", "-1h", "2026", "12", "1e3", ""])
def test_anything_else_is_refused_with_what_is_taken(text: str) -> None:
    """A wrong time would choose other events silently."""
    with pytest.raises(CommandError, match="--until"):
        Period.of(None, text)
