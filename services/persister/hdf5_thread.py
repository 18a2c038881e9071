"""Calls on one partition's file, in the thread that touches HDF5."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


class Calls:
    """Makes them, and knows how long they take.

    Args:
        hdf5: the one thread that touches HDF5.
    """

    def __init__(self, hdf5: Executor) -> None:
        self._hdf5 = hdf5
        self._made: dict[asyncio.Future[Any], float] = {}  # when

    @property
    def longest(self) -> float:
        """For how long the oldest call has waited for its answer, seconds; 0 without one."""
        return time.monotonic() - min(self._made.values()) if self._made else 0.0

    async def run(self, call: Callable[[], T]) -> T:
        """Run *call* in the thread; also when the caller is cancelled meanwhile it runs to its end first."""
        future = asyncio.get_running_loop().run_in_executor(self._hdf5, call)
        self._made[future] = time.monotonic()
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            if not future.cancelled():
                future.exception()  # nobody else asks for it, and asyncio would log its text, which may quote data
            raise
        finally:
            del self._made[future]
