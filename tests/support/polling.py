"""Waiting for something to become true: bounded, instead of sleeps."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

#: how long a condition may take, seconds: an election on two busy cores takes up to ten
TIMEOUT = 30.0
#: between two checks, seconds; a check that starts a process takes a longer one
INTERVAL = 0.05


@overload
async def eventually(check: Callable[[], Awaitable[T]], timeout: float = ..., interval: float = ...) -> T: ...
@overload
async def eventually(check: Callable[[], T], timeout: float = ..., interval: float = ...) -> T: ...
async def eventually(check: Callable[[], T | Awaitable[T]], timeout: float = TIMEOUT, interval: float = INTERVAL) -> T:
    """Call *check*, a function or a coroutine function, every *interval* seconds until its result is true; return that.

    An AssertionError inside *check* counts as "not yet".

    Raises:
        AssertionError: it was not true within *timeout* seconds; the last one of *check* itself when it raised one.
    """
    deadline = time.monotonic() + timeout
    while True:
        problem: AssertionError | None = None
        try:
            outcome = check()
            result: T = await outcome if inspect.isawaitable(outcome) else outcome
        except AssertionError as error:
            problem = error
        else:
            if result:
                return result
        if time.monotonic() >= deadline:
            raise problem or AssertionError(f"not true within {timeout:g} s: {check!r}")
        await asyncio.sleep(interval)


def eventually_sync(check: Callable[[], T], timeout: float = TIMEOUT, interval: float = INTERVAL) -> T:
    """Do as :func:`eventually` where no event loop runs."""
    deadline = time.monotonic() + timeout
    while True:
        problem: AssertionError | None = None
        try:
            result = check()
        except AssertionError as error:
            problem = error
        else:
            if result:
                return result
        if time.monotonic() >= deadline:
            raise problem or AssertionError(f"not true within {timeout:g} s: {check!r}")
        time.sleep(interval)
