"""What the client says of wrong arguments and of refused batches."""

from __future__ import annotations

from typing import Any

import pytest

import fiq
from fiq.client import AsyncClient, BadLine, InvalidArgumentError, Problem, RefusedError, RetryPolicy


@pytest.mark.parametrize(
    ("consultation", "key", "message"),
    [
        (17, None, "a consultation id is a string, not int"),
        ("c 1", None, "a consultation id is 1 to 128 characters"),
        ("c-1", 5, "an idempotency key is a string, not int"),
        ("c-1", "", "an idempotency key is 1 to 255 visible ASCII characters"),
    ],
)
async def test_a_malformed_id_or_key_is_an_invalid_argument(consultation: Any, key: Any, message: str) -> None:
    """Nothing is sent: no service runs here."""
    async with AsyncClient("http://127.0.0.1:9") as client:
        with pytest.raises(InvalidArgumentError, match=message):
            await client.post(consultation, {"event_type": "A"}, key)


async def test_a_token_may_come_from_a_file_with_a_line_feed() -> None:
    """As `fiq token new NAME > FILE` writes it; two words are no token."""
    async with AsyncClient("http://127.0.0.1:9", token="a-token\n"):
        pass
    for wrong in ("two words", " \n", "umläut"):
        with pytest.raises(InvalidArgumentError, match="one word of visible ASCII"):
            AsyncClient("http://127.0.0.1:9", token=wrong)


@pytest.mark.parametrize("times", [{"deadline": 0}, {"deadline": -1}, {"attempt_timeout": 0}])
def test_a_policy_has_time_for_an_attempt(times: dict[str, float]) -> None:
    """Without it every call would fail at once."""
    with pytest.raises(InvalidArgumentError, match="more than 0 seconds"):
        RetryPolicy(**times)


def test_a_refused_batch_names_its_first_bad_events() -> None:
    """A log that has only the message shows what to correct."""
    lines = tuple(BadLine(number, f"reason {number}") for number in range(2, 7))
    problem = Problem("/problems/invalid-batch", 422, lines=lines)
    message = str(RefusedError("refused", problem=problem))
    assert message == "refused (event 2: reason 2; event 3: reason 3; event 4: reason 4; and 2 more)"


def test_dir_lists_what_the_package_exports() -> None:
    """Completion in a shell or a notebook finds the lazily imported names."""
    assert set(fiq.__all__) <= set(dir(fiq))
