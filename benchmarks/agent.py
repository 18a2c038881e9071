"""The load, in a process of its own: ``python -m benchmarks.agent`` takes a job on stdin, JSON both ways."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import uvloop

from benchmarks import batches, loads, pulls
from benchmarks.jobs import GO, READY, AppendJob, LoadJob, PullJob, Report

_WORK: dict[str, tuple[type[Any], Callable[[Any, Callable[[], None]], Awaitable[Report]]]] = {
    "http": (LoadJob, loads.over_http),
    "batch": (LoadJob, batches.over_http),
    "bare_batch": (LoadJob, batches.over_nats),
    "publish": (LoadJob, loads.over_nats),
    "pull": (PullJob, pulls.pull),
    "append": (AppendJob, loads.append_each),
}


async def run(order: dict[str, Any]) -> Report:
    """Do the job that *order* describes."""
    kind, work = _WORK[order["kind"]]
    async with asyncio.timeout(order["timeout"]):
        return await work(kind(**order["job"]), _meet)


def _meet() -> None:
    """Say that everything is prepared, and wait for the word to begin."""
    gc.collect()
    gc.freeze()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    if sys.stdin.buffer.readline() != GO:
        raise RuntimeError("the measuring process is gone")


def main() -> None:
    """Read the order, print the report."""
    report = uvloop.run(run(orjson.loads(sys.stdin.buffer.readline())))
    os.set_blocking(sys.stdout.fileno(), True)  # a long report does not fit into the pipe at once
    sys.stdout.buffer.write(orjson.dumps(report))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
