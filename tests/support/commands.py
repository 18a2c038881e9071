"""The ``fiq`` command about a cluster and its volumes, as an operator runs it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from tests.support.persisters import Log, Persister


async def fiq(log: Log, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command as an operator does."""
    command = [sys.executable, "-m", "services.cli.main", *map(str, arguments)]
    env = {**os.environ, "FI_LOG_URL": log.cluster.url}
    return await asyncio.to_thread(
        subprocess.run, command, env=env, capture_output=True, text=True, check=False, timeout=90
    )


async def done(log: Log, *arguments: object) -> str:
    """Run the command, which succeeds, and return what it printed on both."""
    result = await fiq(log, *arguments)
    assert 0 == result.returncode, result.stderr
    return result.stdout + result.stderr


async def refused(log: Log, *arguments: object) -> str:
    """Run the command, which refuses, and return why."""
    result = await fiq(log, *arguments)
    assert 1 == result.returncode, result.stdout
    return result.stderr


async def kill(*persisters: Persister) -> None:
    """End them with SIGKILL."""
    for persister in persisters:
        persister.process.kill()
        await asyncio.to_thread(persister.process.wait)


def killed_in(name: str, *arguments: object, after: int = 0) -> int:
    """Run the command in a process that kills itself when a function is called, *after* so many calls; return its end.

    Args:
        name: dotted name of the function.
    """
    program = """
import os, signal, sys
from pkgutil import resolve_name
from services.cli.main import main

place, name = sys.argv.pop(1).rsplit(".", 1)
calls, owner = int(sys.argv.pop(1)), resolve_name(place)
original = getattr(owner, name)

def call(*args, **kwargs):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, call)
main()
"""
    command = [sys.executable, "-c", program, name, str(after), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode
