"""Token buckets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.admission import RateLimiter, TokenBucket


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_begins_full_and_fills_at_its_rate() -> None:
    """Two a second."""
    clock = Clock()
    bucket = TokenBucket(2.0, 3, clock)
    assert [0.0, 0.0, 0.0, 0.5] == [bucket.take() for _ in range(4)]
    clock.now += 0.25
    assert 0.25 == pytest.approx(bucket.take())
    clock.now += 0.25
    assert 0.0 == bucket.take()


def test_more_than_it_holds_is_given_when_it_is_full() -> None:
    """A batch may be larger than the burst; it owes the rest, so that the rate holds in the long run."""
    clock = Clock()
    bucket = TokenBucket(1.0, 10, clock)
    assert 0.0 == bucket.take_more(30)
    assert 21.0 == bucket.take()
    clock.now += 21
    assert 0.0 == bucket.take()
    assert 1.0 == bucket.take()


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), max_size=40))
def test_no_pattern_gets_more_than_the_rate(asked: list[tuple[float, int]]) -> None:
    """Over any time at most the burst, what the time brought, and one batch."""
    clock = Clock()
    bucket = TokenBucket(5.0, 20, clock)
    given_out, began = 0, clock.now
    for pause, count in asked:
        clock.now += pause
        if bucket.take() == 0:
            given_out += 1
            given_out += 0 if bucket.take_more(count - 1) else count - 1
        assert given_out <= 20 + 5.0 * (clock.now - began) + 49 + 1e-6


def test_each_client_has_its_own() -> None:
    """What is forgotten begins anew, and without a rate there is no limit."""
    rates = RateLimiter(0.001, 1)
    assert [True, False, True] == [rates.take(name) == 0 for name in ("a", "a", "b")]
    rates.keep_only({"b"})
    assert [True, False] == [rates.take(name) == 0 for name in ("a", "b")]
    assert [0.0] * 5 == [RateLimiter(0, 1).take("a") for _ in range(5)]


def test_a_batch_larger_than_the_bucket_gets_in_and_makes_those_behind_it_wait() -> None:
    """Its request has been counted as one; asked for a full bucket, it would be refused for ever."""
    clock = Clock()
    bucket = TokenBucket(10, 5, clock)
    assert 0 == bucket.take()
    assert 0 == bucket.take_more(99)
    assert 9.6 == pytest.approx(bucket.take())
    assert 9.6 == pytest.approx(bucket.take_more(1))
    clock.now += 9.7
    assert 0 == bucket.take()
