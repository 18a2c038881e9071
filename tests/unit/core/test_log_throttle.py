"""The throttle of log lines."""

from __future__ import annotations

from services.core.logs import LogThrottle


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_beyond_the_burst_are_left_out_and_counted_in_the_next_one() -> None:
    """At the rate the next line is allowed; it says how many came before it."""
    clock = Clock()
    throttle = LogThrottle(rate=2.0, burst=3, clock=clock)
    assert [{}, {}, {}, None, None] == [throttle.allow("a") for _ in range(5)]
    clock.now += 0.5
    assert [{"left_out": 2}, None] == [throttle.allow("a") for _ in range(2)]
    clock.now += 60
    assert [{"left_out": 1}, {}, {}, None] == [throttle.allow("a") for _ in range(4)]


def test_each_kind_has_a_budget_of_its_own() -> None:
    """A flood of one kind does not hide the others."""
    throttle = LogThrottle(rate=1e-9, burst=1)
    assert [{}, None, {}] == [throttle.allow(kind) for kind in ("a", "a", "b")]


def test_a_repeated_failure_is_one_line_until_it_is_repaired() -> None:
    """Then the next failure is logged at once."""
    throttle = LogThrottle.of_repeated()
    assert [{}, None] == [throttle.allow("disk full") for _ in range(2)]
    throttle.reset()
    assert {} == throttle.allow("disk full")


def test_the_memory_for_kinds_is_bounded() -> None:
    """Kinds may be texts of errors."""
    throttle = LogThrottle(rate=1e-9, burst=1)
    for number in range(3000):
        throttle.allow(str(number))
    assert {} == throttle.allow("0")
    assert None is throttle.allow("2999")
