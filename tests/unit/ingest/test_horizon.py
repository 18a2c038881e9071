"""Where an event may stand that the broker has forgotten, by a clock that the test turns."""

from __future__ import annotations

import asyncio

import pytest

from services.eventlog.protocol import Appended
from services.ingest.horizon import Horizon

#: how far the broker's memory is trusted with these settings, seconds
WINDOW, DEADLINE, TRUSTED = 600.0, 5.0, 295.0


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def new(sequence: int) -> Appended:
    return Appended(sequence, duplicate=False)


async def test_nothing_is_known_at_first(clock: Clock) -> None:
    """A forgotten event may be anywhere."""
    assert Horizon(WINDOW, DEADLINE).position is None


async def test_a_forgotten_event_stands_before_the_oldest_position_that_is_young_enough(clock: Clock) -> None:
    """The position moves on with the time, and is given up when nothing was stored for long."""
    horizon = Horizon(WINDOW, DEADLINE)
    for sequence in range(1, 1001):
        clock.now = 1000.0 + sequence
        horizon.note(clock.now, new(sequence))
        assert horizon.position is not None
        assert sequence - TRUSTED <= horizon.position <= max(1, sequence - TRUSTED * 0.85)
    clock.now += TRUSTED + 1
    assert horizon.position is None


async def test_a_duplicate_says_nothing(clock: Clock) -> None:
    """Its position is the first one's, however old that is."""
    horizon = Horizon(WINDOW, DEADLINE)
    horizon.note(clock.now, Appended(7, duplicate=True))

    assert horizon.position is None


async def test_the_time_counts_at_which_an_event_was_handed_over(clock: Clock) -> None:
    """It may have been stored long before its answer came."""
    horizon = Horizon(WINDOW, DEADLINE)
    horizon.note(clock.now - TRUSTED - 1, new(7))

    assert horizon.position is None


async def test_a_log_that_begins_anew_has_other_positions(clock: Clock) -> None:
    """Those of the old one are worth nothing."""
    horizon = Horizon(WINDOW, DEADLINE)
    horizon.note(clock.now, new(5000))
    clock.now += 60
    horizon.note(clock.now, new(3))

    assert horizon.position == 3


async def test_a_window_no_longer_than_two_deadlines_is_not_trusted(clock: Clock) -> None:
    """The broker may have forgotten a key between the question and the publication."""
    horizon = Horizon(10.0, 5.0)
    horizon.note(clock.now, new(7))

    assert horizon.position is None
