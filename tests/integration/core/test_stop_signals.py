"""The first stop signal asks, the second kills; one that comes during the imports is neither lost nor a failure."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

#: a service's beginning: hold, take long, listen; it says when it has begun
IMPORTING = """
import sys
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
print("held", flush=True)
sys.stdin.read()  # the imports
import asyncio
from services.core.lifecycle import Stop, stop_on_signals
async def main():
    stop = Stop()
    stop_on_signals(stop)
    await asyncio.wait_for(stop.wait(), 20)
    print(stop.reason)
    return stop.exit_code
sys.exit(asyncio.run(main()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_during_the_imports_is_taken_when_they_are_done(number: signal.Signals) -> None:
    """The process ends in order with 0, instead of with 143 in the middle of an import."""
    command = [sys.executable, "-c", IMPORTING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert (0, f"{number.name}\n") == (process.returncode, output)


@pytest.mark.parametrize("module", ["services.ingest", "services.persister"])
def test_the_services_hold_signals_before_they_import_anything_of_weight(module: str) -> None:
    """Each import before that is time in which a stop is lost to a container's first process."""
    program = (
        "import sys, runpy, signal\n"
        "def stop(*_):\n"
        "    print(sorted({'asyncio', 'uvloop', 'structlog', 'nats', 'h5py'} & set(sys.modules))); sys.exit()\n"
        f"signal.pthread_sigmask = stop; runpy.run_module({module!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "[]\n" == done.stdout


#: a service that says when it listens and which signal came
PROGRAM = """
import asyncio, sys, time
from services.core.lifecycle import Stop, stop_on_signals
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
