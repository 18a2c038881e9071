"""Events within the log's duplicate window against their limit: the nodes keep each id in memory."""

from __future__ import annotations

import pytest

from services.ingest import problems
from services.ingest.admission import WindowLimiter
from services.ingest.metrics import IngestMetrics
from services.ingest.problems import RequestRefusedError

WINDOW = 120.0


class World:
    """A clock, and a log that grows."""

    def __init__(self, limit: int = 1000) -> None:
        self.now = 5000.0
        self.sequence = 10**9
        self.metrics = IngestMetrics()
        self.limiter = WindowLimiter(limit, WINDOW, self.metrics, lambda: self.now)
        self.limiter.update(self.sequence)

    def store(self, rate: int, seconds: int) -> None:
        """Let the log store *rate* events in each of so many seconds."""
        for _ in range(seconds):
            self.now += 1
            self.sequence += rate
            self.limiter.update(self.sequence)

    @property
    def shown(self) -> float | None:
        return self.metrics.registry.get_sample_value("fi_ingest_window_events")


def test_what_a_process_finds_at_its_start_is_not_counted() -> None:
    """It may be a year's events."""
    world = World()
    world.limiter.check()
    assert 0 == world.shown


def test_events_within_the_window_count_and_older_ones_do_not() -> None:
    """A steady rate gives rate times window, for as long as it lasts."""
    world = World()
    world.store(rate=5, seconds=1000)
    assert 5 * WINDOW == world.shown
    world.store(rate=0, seconds=60)
    assert 5 * WINDOW / 2 == world.shown
    world.limiter.check()


def test_beyond_the_limit_it_is_503_until_enough_ids_are_forgotten() -> None:
    """With the time that this takes, at most a minute; and then events are taken again."""
    world = World(limit=1000)
    world.store(rate=20, seconds=50)
    with pytest.raises(RequestRefusedError) as refused:
        world.limiter.check()
    assert problems.WINDOW_FULL is refused.value.problem
    assert {"Retry-After": "60"} == dict(refused.value.headers or {})
    world.store(rate=0, seconds=50)
    with pytest.raises(RequestRefusedError) as refused:
        world.limiter.check()
    assert {"Retry-After": "21"} == dict(refused.value.headers or {})  # the first second's, 100 s ago
    world.store(rate=0, seconds=21)
    world.limiter.check()


def test_a_log_that_was_made_anew_starts_from_nothing() -> None:
    """Its sequences are lower."""
    world = World()
    world.store(rate=100, seconds=20)
    world.sequence = 0
    world.store(rate=1, seconds=5)
    world.limiter.check()
    assert 4 == world.shown


def test_while_nothing_is_known_nothing_is_refused() -> None:
    """During an election, and in a log without a window; what was known before counts on."""
    world = World()
    world.store(rate=100, seconds=20)
    world.limiter.update(None)
    assert 2000 == world.shown
    limiter = WindowLimiter(1, WINDOW, IngestMetrics())
    limiter.update(None)
    limiter.check()
    assert 0 == limiter.events


def test_zero_is_no_limit() -> None:
    """The number is shown all the same."""
    world = World(limit=0)
    world.store(rate=10**6, seconds=10)
    world.limiter.check()
    assert 10**7 == world.shown
