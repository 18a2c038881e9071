"""The memory for events: busy followers get more, idle ones keep a minimum, and together they keep to it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from services.log.jetstream.follower import Budget, Held, Share

#: bytes of the largest message
LARGEST = 10
#: bytes of an event
SIZE = 2


@dataclass(eq=False)
class Follower:
    """Takes what it is granted, and lets go of it when its batch is done."""

    budget: Budget
    backlog: int = 0
    holds: int = 0
    share: Share = field(init=False)

    def __post_init__(self) -> None:
        self.share = self.budget.join(
            lambda: Held(self.holds, self.holds * SIZE, busy=self.backlog > 0), largest=LARGEST
        )

    @property
    def room(self) -> int:
        return self.share.room().events

    def fetch(self) -> int:
        room = self.share.room()
        fetched = min(room.events, room.size // SIZE, self.backlog)
        self.backlog -= fetched
        self.holds += fetched
        return fetched


def followers(count: int, events: int = 1600, size: int = 10**6) -> list[Follower]:
    budget = Budget(events, size)
    return [Follower(budget) for _ in range(count)]


def test_a_single_follower_gets_all_of_it() -> None:
    """No other follower needs it."""
    (one,) = followers(1)
    one.backlog = 10**6
    assert 1600 == one.room


def test_idle_followers_keep_a_small_minimum() -> None:
    """A quarter is divided among all."""
    assert {1600 // 4 // 16} == {one.room for one in followers(16)}


def test_one_busy_follower_of_many_gets_what_the_others_need_not() -> None:
    """With the defaults, more than a whole batch."""
    all_of_them = followers(16)
    all_of_them[3].backlog = 10**6
    assert 1600 - 15 * 25 == all_of_them[3].room
    assert 25 == all_of_them[4].room


def test_busy_followers_share_equally() -> None:
    """However many there are."""
    all_of_them = followers(16)
    for one in all_of_them[:4]:
        one.backlog = 10**6
    assert [25 + 300] * 4 == [one.fetch() for one in all_of_them[:4]]


def test_a_late_follower_gets_the_minimum_at_once_and_its_share_when_the_others_release_theirs() -> None:
    """No follower starves while the batch of another takes long."""
    early, late = followers(2)
    early.backlog = late.backlog = 10**6
    late.backlog = 0
    assert 1400 == early.fetch()
    late.backlog = 10**6
    assert 200 == late.fetch()
    early.holds = 0
    assert 600 == late.fetch()
    assert 800 == early.fetch()


def test_who_holds_nothing_always_has_room() -> None:
    """The others may hold everything for ever: a partition whose disk is full."""
    stuck, other = followers(2, events=8, size=0)
    stuck.backlog = 10**6
    stuck.fetch()
    stuck.backlog = 0
    other.backlog = 10**6
    for _ in range(100):
        assert other.fetch() > 0
        other.holds = 0


def test_a_follower_that_left_leaves_its_part() -> None:
    """When a partition is given to another process, those that stay get more; leaving twice does no harm."""
    one, other = followers(2)
    one.backlog = 10**6
    assert 1400 == one.room
    other.share.leave()
    other.share.leave()
    assert 1600 == one.room


def test_the_floor_holds_two_of_the_largest_messages() -> None:
    """Also when the setting is smaller than that; or such a message would never come."""
    assert {2 * LARGEST} == {one.share.room().size for one in followers(16, size=0)}


@pytest.mark.parametrize("seed", range(20))
def test_the_followers_never_hold_more_than_there_is(seed: int) -> None:
    """For any order of arrivals and completions; and each waiting follower is served."""
    chance = random.Random(seed)
    all_of_them = followers(chance.randrange(1, 20), events=chance.randrange(100, 5000))
    for _ in range(2000):
        one = chance.choice(all_of_them)
        if chance.random() < 0.3:
            one.backlog += chance.randrange(3000)
        elif chance.random() < 0.5:
            one.holds = 0
        elif one.backlog and not one.holds:
            assert one.fetch() > 0
        else:
            one.fetch()
        assert sum(each.holds for each in all_of_them) <= one.budget._events
