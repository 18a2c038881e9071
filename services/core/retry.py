"""Wait and try again: how long services pause between attempts.

A caller bounds the whole with ``asyncio.timeout``; cancellation ends a pause at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def backoff(pause: float, longest: float | None = None) -> Iterator[float]:
    """Yield the pause before each further attempt, seconds: *pause*, then twice as long each time, up to *longest*.

    Without *longest* all pauses are the same.
    """
    longest = pause if longest is None else longest
    while True:
        yield pause
        pause = min(2 * pause, longest)


async def retry(
    attempt: Callable[[], Awaitable[T]],
    *,
    on: type[Exception] | tuple[type[Exception], ...],
    pause: float,
    longest: float | None = None,
    failed: Callable[[Exception], None] | None = None,
) -> T:
    """Call *attempt* until it returns, and return its result.

    Args:
        attempt: what is tried.
        on: errors that may pass; any other one is raised.
        pause: before the second attempt, seconds.
        longest: pause to which it doubles; by default all are the same.
        failed: called with the error of each attempt that failed, to log it or to give up by raising.
    """
    for seconds in backoff(pause, longest):
        try:
            return await attempt()
        except on as error:
            if failed is not None:
                failed(error)
        await asyncio.sleep(seconds)
    raise AssertionError("backoff never ends")
