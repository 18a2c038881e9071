"""The backlog against its limit, and what Retry-After makes of the rate at which it drains."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.event import Event, new_event_id
from services.ingest import problems
from services.ingest.admission import BacklogLimiter
from services.ingest.metrics import IngestMetrics
from services.ingest.problems import RequestRefusedError
from services.log.partitions import partition_of
from services.log.status import Backlog, Waiting


class World:
    """A clock, a log that is looked at, and what ingest makes of it."""

    def __init__(self, limit: int = 100) -> None:
        self.now = 1000.0
        self.seen: Backlog | None = None
        self.metrics = IngestMetrics()
        self.limiter = BacklogLimiter(limit, 2.0, self.metrics)
        self.limiter.read_backlog = lambda: self.seen

    def look(self, sequence: int, *events: int, still: Iterable[int] = ()) -> None:
        """Look at the log, which has so many events in each of its partitions, and take it in."""
        waiting = (Waiting(count, sequence, p in still) for p, count in enumerate(events))
        self.seen = Backlog(self.now, sequence, tuple(waiting))
        self.limiter.update()

    def takes(self, partition: int | None = None) -> bool:
        """Whether a request gets through: any, or one with an event of a partition."""
        try:
            self.limiter.check()
            if partition is not None:
                assert self.seen is not None
                self.limiter.check_partitions([event_of(partition, len(self.seen.partitions))])
        except RequestRefusedError as refusal:
            return refusal.problem is not problems.BACKLOG_FULL
        return True

    def metric(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)


def event_of(partition: int, partitions: int) -> Event:
    """Return an event that belongs to *partition*."""
    name = next(name for name in map("c{}".format, range(1000)) if partition_of(name, partitions) == partition)
    return Event(name, new_event_id(), 1, b"{}")


def test_while_nothing_is_known_nothing_is_refused() -> None:
    """The broker's own limit holds all the same."""
    world = World()
    world.limiter.update()
    world.limiter.note(10**9)
    assert world.takes()
    assert world.takes(None)
    assert 0.0 == world.metric("fi_ingest_backlog_events")


def test_what_was_stored_since_the_look_counts() -> None:
    """By whichever process: the sequences in the broker's answers are those of the stream."""
    world = World()
    world.look(5000, 45, 45)
    world.limiter.note(5009)
    assert world.takes()
    world.limiter.note(5010)
    assert not world.takes()
    world.limiter.note(4000)  # a duplicate's first sequence
    assert not world.takes()
    assert 100.0 == world.metric("fi_ingest_backlog_events")


def test_what_an_owner_said_a_while_ago_counts_with_its_part_of_what_came_since() -> None:
    """One of two partitions said so at sequence 4000, the other one at 5000."""
    world = World(limit=1000)
    world.seen = Backlog(world.now, 5000, (Waiting(10, 4000, stalled=False), Waiting(30, 5000, stalled=False)))
    world.limiter.update()
    assert 540.0 == world.metric("fi_ingest_backlog_events")


def test_nothing_is_taken_for_committed_before_a_look_shows_it() -> None:
    """Persisters may have stopped since; the limit holds."""
    world = World()
    world.look(5000, 100)
    world.now += 5
    world.look(5050, 100)
    assert 10.0 == world.metric("fi_ingest_drained_events_per_second")
    world.now += 15
    world.limiter.update()
    assert 100.0 == world.metric("fi_ingest_backlog_events")
    assert not world.takes()


@pytest.mark.parametrize(
    ("drained", "events", "expected"), [(50, 150, 5.1), (0, 150, 60.0), (5, 10_000, 60.0), (500_000, 150, 1.0)]
)
def test_retry_after_is_when_there_will_be_room(drained: int, events: int, expected: float) -> None:
    """What is over the limit by the rate; a second at least, a minute at most, also when nothing drains at all."""
    world = World()
    world.look(10**6, events)
    world.now += 5
    world.look(10**6 + drained, events)
    assert expected == pytest.approx(world.limiter.retry_after(problems.BACKLOG_FULL), abs=0.01)


def test_a_full_stream_asks_to_come_back_when_it_is_drained() -> None:
    """And other problems as the setting says."""
    world = World()
    assert 2.0 == world.limiter.retry_after(problems.LOG_FULL)
    world.look(1000, 50)
    world.now += 5
    world.look(1050, 50)
    assert 5.0 == world.limiter.retry_after(problems.LOG_FULL)
    assert 2.0 == world.limiter.retry_after(problems.LOG_UNAVAILABLE)


def test_a_stream_that_was_made_anew_begins_anew() -> None:
    """Its sequences do."""
    world = World()
    world.look(5000, 100)
    assert not world.takes()
    world.now += 5
    world.look(3, 3)
    assert world.takes()
    assert 2.0 == world.limiter.retry_after(problems.BACKLOG_FULL)


def test_without_a_limit_nothing_is_refused() -> None:
    """0 leaves it to the broker's own."""
    world = World(limit=0)
    world.look(10**6, 10**6, 10**6, still=[0])
    assert world.takes()
    assert world.takes(0)


def test_a_partition_that_stands_still_refuses_its_own_clients_only() -> None:
    """It may take half of the limit, and counts for no more than that, however much waits in it."""
    world = World(limit=1000)
    world.look(10_000, 499, 0, 0, 0, still=[0])
    assert world.takes(0)
    world.look(10_000, 8000, 400, 0, 0, still=[0])
    assert [False, True, True, True] == [world.takes(p) for p in range(4)]
    world.look(10_000, 8000, 500, 0, 0, still=[0])
    assert not world.takes(1)


def test_those_that_stand_still_share_half_of_the_limit() -> None:
    """So the others have the other half, however many they are."""
    world = World(limit=1000)
    world.look(10_000, 260, 240, 499, 0, still=[0, 1])
    assert [False, True, True, True] == [world.takes(p) for p in range(4)]


def test_a_partition_that_stands_still_fills_up_between_two_looks() -> None:
    """With its part of what the stream gets."""
    world = World(limit=1000)
    world.look(10_000, 490, 0, still=[0])
    world.limiter.note(10_019)
    assert world.takes(0)
    world.limiter.note(10_020)
    assert [False, True] == [world.takes(p) for p in range(2)]


def test_when_all_stand_still_one_limit_holds_for_all() -> None:
    """Persisters are stopped for an hour: the cushion is as large as before, whichever partitions get the events."""
    world = World(limit=1000)
    world.look(10_000, 999, 0, still=[0, 1])
    assert [True, True] == [world.takes(p) for p in range(2)]
    world.limiter.note(10_001)
    assert [False, False] == [world.takes(p) for p in range(2)]


def test_the_rate_is_that_of_some_seconds() -> None:
    """Persisters commit in rounds: in most seconds none, in others many."""
    world = World(limit=10**6)
    committed = 0
    world.look(0, 0)
    for second in range(1, 31):
        world.now += 1
        committed += 500 if second % 5 == 0 else 0
        world.look(100 * second, 100 * second - committed)
        assert world.metric("fi_ingest_drained_events_per_second") == (100.0 if second >= 5 else 0.0)


@pytest.mark.parametrize("pause", [1, 5])
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60))
def test_the_limit_holds_whatever_comes(pause: int, turns: list[tuple[int, int]]) -> None:
    """No more waits than the limit, however rarely the log is looked at."""
    world = World(limit=100)
    stored = committed = 0
    world.look(0, 0)
    for second, (offered, drained) in enumerate(turns, start=1):
        world.now += 1
        committed = min(stored, committed + drained)
        if second % pause == 0:
            world.look(stored, stored - committed)
        else:
            world.limiter.update()
        for _ in range(offered):
            if not world.takes():
                break
            stored += 1
            world.limiter.note(stored)
        assert stored - committed <= 100


@given(st.lists(st.integers(0, 2000), min_size=2, max_size=16), st.data())
def test_partitions_that_move_have_half_of_the_limit_at_least(events: list[int], data: st.DataObject) -> None:
    """Whatever waits in the others."""
    still = data.draw(st.sets(st.integers(0, len(events) - 1), max_size=len(events) - 1))
    world = World(limit=1000)
    world.look(10_000, *events, still=still)
    moving = [p for p in range(len(events)) if p not in still]
    if sum(events[p] for p in moving) < 500:
        assert all(world.takes(p) for p in moving)
