"""How many events under used keys are copied whole."""

from __future__ import annotations

from services.persister.reused import LETTER_BYTES, PER_CONSULTATION, WINDOW_SECONDS, Allowance


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_consultation_gets_some_copies() -> None:
    """Enough to see what its client does wrong."""
    allowance = Allowance(2**30, Clock())

    assert [allowance.take("c1", number, 10) for number in range(PER_CONSULTATION + 1)] == [True] * PER_CONSULTATION + [
        False
    ]
    assert allowance.take("c2", 99, 10)


def test_a_copy_that_was_granted_stays_granted() -> None:
    """The batch may have to be tried again."""
    allowance = Allowance(LETTER_BYTES + 10, Clock())

    assert [allowance.take("c1", 1, 10) for _ in range(3)] == [True] * 3
    assert not allowance.take("c1", 2, 10)


def test_copies_of_all_consultations_together_take_so_many_bytes() -> None:
    """A share of the dead-letter stream; a small one may fit where a large one did not."""
    allowance = Allowance(3 * LETTER_BYTES, Clock())

    assert allowance.take("c1", 1, LETTER_BYTES)
    assert not allowance.take("c2", 2, 1)
    assert allowance.take("c3", 3, 0)


def test_after_a_day_there_are_new_ones() -> None:
    """Nothing is kept of the old one."""
    clock = Clock()
    allowance = Allowance(LETTER_BYTES, clock)

    assert allowance.take("c1", 1, 0)
    clock.now += WINDOW_SECONDS - 1
    assert not allowance.take("c1", 2, 0)
    clock.now += 1
    assert allowance.take("c1", 3, 0)
