"""Stopping: the first signal asks, the second kills."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest

from services.contract.lifecycle import Stop, unless_stopped

PROGRAM = """
import asyncio, sys, time
from services.contract.lifecycle import Stop, stop_on_signals
async def main():
    stop = Stop()
    stop_on_signals(stop, notify=lambda name: print(name, flush=True))
    print("ready", flush=True)
    await stop.wait()
    if {hang}:
        time.sleep(60)  # the loop is blocked: nothing of ours runs any more
    return stop.exit_code
if {uvloop}:
    import uvloop
    sys.exit(uvloop.run(main()))
sys.exit(asyncio.run(main()))
"""


def start(*, hang: bool, uvloop: bool) -> subprocess.Popen[str]:
    program = PROGRAM.format(hang=hang, uvloop=uvloop)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen[str]) -> int:
    try:
        return process.wait(10)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("uvloop", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_the_process_in_order(number: signal.Signals, uvloop: bool) -> None:
    """The exit code is 0: being asked to stop is no failure."""
    process = start(hang=False, uvloop=uvloop)
    process.send_signal(number)
    assert finish(process) == 0


@pytest.mark.parametrize("uvloop", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_kills_also_a_process_that_hangs(number: signal.Signals, uvloop: bool) -> None:
    """The kernel does it, so it needs no cooperation."""
    process = start(hang=True, uvloop=uvloop)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(number)
    assert -number == finish(process)


async def test_the_first_reason_is_kept() -> None:
    """What follows from a failure must not hide it."""
    stop = Stop()
    stop.request("disk", failed=True)
    stop.request("SIGTERM")
    await stop.wait()
    assert (stop.reason, stop.requested, stop.exit_code) == ("disk", True, 1)


async def test_nothing_is_requested_at_first() -> None:
    """The exit code of a process that was never asked is 0."""
    stop = Stop()
    assert (stop.requested, stop.exit_code) == (False, 0)


async def test_work_that_ends_by_itself_gives_its_result() -> None:
    """Its errors, too."""

    async def work() -> int:
        return 7

    async def failing() -> None:
        raise ValueError("no")

    assert 7 == await unless_stopped(work(), Stop())
    with pytest.raises(ValueError, match="no"):
        await unless_stopped(failing(), Stop())


async def test_a_stop_cancels_work_and_waits_for_its_end() -> None:
    """What it does to clean up is done when this returns."""
    stop, cleaned = Stop(), []

    async def work() -> None:
        try:
            stop.request("SIGTERM")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    await unless_stopped(work(), stop)
    assert [True] == cleaned


async def test_an_error_while_work_is_being_cancelled_is_not_lost() -> None:
    """A batch that could not be finished, for instance."""
    stop = Stop()

    async def work() -> None:
        try:
            stop.request("SIGTERM")
            await asyncio.Event().wait()
        finally:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        await unless_stopped(work(), stop)
