"""The backlog against its limit, and what Retry-After makes of the rate at which it drains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.eventlog.backlog import Backlog
from services.ingest import problems
from services.ingest.metrics import Metrics
from services.ingest.pressure import Pressure
from services.ingest.problems import RequestRefusedError


class World:
    """A clock, a log that is looked at, and what ingest makes of it."""

    def __init__(self, limit: int = 100) -> None:
        self.now = 1000.0
        self.seen: Backlog | None = None
        self.metrics = Metrics()
        self.pressure = Pressure(limit, 2.0, lambda: self.seen, self.metrics, lambda: self.now)

    def look(self, sequence: int, events: int) -> None:
        """Look at the log, and take it in."""
        self.seen = Backlog(self.now, sequence, events)
        self.pressure.look()

    def takes(self) -> bool:
        """Whether a request gets through."""
        try:
            self.pressure.check()
        except RequestRefusedError as refusal:
            return refusal.problem is not problems.BACKLOG_FULL
        return True

    def metric(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)


def test_while_nothing_is_known_nothing_is_refused() -> None:
    """The broker's own limit holds all the same."""
    world = World()
    world.pressure.look()
    world.pressure.note(10**9)
    assert world.takes()


def test_what_was_stored_since_the_look_counts() -> None:
    """By whichever process: the sequences in the broker's answers are those of the stream."""
    world = World()
    world.look(sequence=5000, events=90)
    world.pressure.note(5009)
    assert world.takes()
    world.pressure.note(5010)
    assert not world.takes()
    world.pressure.note(4000)  # a duplicate's first sequence
    assert not world.takes()
    world.pressure.look()
    assert 100.0 == world.metric("fi_ingest_backlog_events")


def test_what_was_drained_since_the_look_makes_room() -> None:
    """At the rate between the looks before; a new look corrects what that got wrong."""
    world = World()
    world.look(sequence=5000, events=100)
    world.now += 5
    world.look(sequence=5100, events=150)
    assert (10.0, False) == (world.metric("fi_ingest_drained_events_per_second"), world.takes())
    world.now += 4
    world.pressure.look()
    assert not world.takes()
    world.now += 1.5
    world.pressure.look()
    assert world.takes()
    world.look(sequence=5100, events=150)
    assert not world.takes()


@pytest.mark.parametrize(
    ("drained", "events", "expected"), [(50, 150, 5.1), (0, 150, 60.0), (5, 10_000, 60.0), (500_000, 150, 1.0)]
)
def test_retry_after_is_when_there_will_be_room(drained: int, events: int, expected: float) -> None:
    """What is over the limit by the rate; a second at least, a minute at most, also when nothing drains at all."""
    world = World()
    world.look(sequence=10**6, events=events)
    world.now += 5
    world.look(sequence=10**6 + drained, events=events)
    assert expected == pytest.approx(world.pressure.retry_after(problems.BACKLOG_FULL), abs=0.01)


def test_a_full_stream_asks_to_come_back_when_it_is_drained() -> None:
    """And other problems as the setting says."""
    world = World()
    assert 2.0 == world.pressure.retry_after(problems.LOG_FULL)
    world.look(sequence=1000, events=50)
    world.now += 5
    world.look(sequence=1050, events=50)
    assert 5.0 == world.pressure.retry_after(problems.LOG_FULL)
    assert 2.0 == world.pressure.retry_after(problems.LOG_UNAVAILABLE)


def test_a_stream_that_was_made_anew_begins_anew() -> None:
    """Its sequences do."""
    world = World()
    world.look(sequence=5000, events=100)
    assert not world.takes()
    world.now += 5
    world.look(sequence=3, events=3)
    assert world.takes()
    assert 2.0 == world.pressure.retry_after(problems.BACKLOG_FULL)


def test_without_a_limit_nothing_is_refused() -> None:
    """0 leaves it to the broker's own."""
    world = World(limit=0)
    world.look(sequence=10**6, events=10**6)
    assert world.takes()


def test_what_is_not_counted_any_more_is_not_taken_for_committed_for_ever() -> None:
    """Persisters may have stopped since; once that is known to nobody, some seconds' worth is all that is let in."""
    world = World(limit=100)
    world.look(sequence=5000, events=100)
    world.now += 5
    world.look(sequence=5050, events=100)
    assert 10.0 == world.metric("fi_ingest_drained_events_per_second")
    world.now += 15
    world.pressure.look()
    assert 40.0 == world.metric("fi_ingest_backlog_events")
    world.pressure.note(5050 + 60)
    assert not world.takes()


def test_the_rate_is_that_of_some_seconds() -> None:
    """Persisters commit in batches: in most seconds none, in others many."""
    world = World(limit=10**6)
    committed = 0
    world.look(sequence=0, events=0)
    for second in range(1, 31):
        world.now += 1
        committed += 500 if second % 5 == 0 else 0
        world.look(sequence=100 * second, events=100 * second - committed)
        assert world.metric("fi_ingest_drained_events_per_second") == (100.0 if second >= 5 else 0.0)


@pytest.mark.parametrize("pause", [1, 5])
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60))
def test_the_limit_holds_whatever_comes(pause: int, turns: list[tuple[int, int]]) -> None:
    """No more waits than the limit and what was taken for committed since a count: with one each second, nothing."""
    world = World(limit=100)
    stored = committed = 0
    world.look(0, 0)
    for second, (offered, drained) in enumerate(turns, start=1):
        world.now += 1
        committed = min(stored, committed + drained)
        if second % pause == 0:
            world.look(stored, stored - committed)
        else:
            world.pressure.look()
        for _ in range(offered):
            if not world.takes():
                break
            stored += 1
            world.pressure.note(stored)
        assert stored - committed <= 100 + (0 if pause == 1 else 5 * 30)
