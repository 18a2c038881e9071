"""Waiting and trying again."""

from __future__ import annotations

import itertools

import pytest

from services.core.retry import backoff, retry


def test_pauses_double_up_to_the_longest() -> None:
    """Without a longest one they are all the same."""
    assert [1, 2, 4, 5, 5] == list(itertools.islice(backoff(1, 5), 5))
    assert [1, 1, 1] == list(itertools.islice(backoff(1), 3))


async def test_an_attempt_is_repeated_after_an_error_that_may_pass() -> None:
    """Each error is reported, and the result of the first success is returned."""
    errors = [OSError("a"), OSError("b")]
    seen: list[Exception] = []

    async def attempt() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    assert "done" == await retry(attempt, on=OSError, pause=0.001, failed=seen.append)
    assert ["a", "b"] == [str(error) for error in seen]


async def test_any_other_error_is_raised_at_once() -> None:
    """A bug is not tried again."""

    async def attempt() -> None:
        raise LookupError("bug")

    with pytest.raises(LookupError, match="bug"):
        await retry(attempt, on=OSError, pause=60)
