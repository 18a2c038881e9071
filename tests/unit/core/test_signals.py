"""A stop that comes while a service is still importing is neither lost nor a failure."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

#: a service's beginning: hold, take long, listen; it says when it has begun
PROGRAM = """
import sys
from services.core import signals
signals.hold()
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
    command = [sys.executable, "-c", PROGRAM]
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
        "import sys, runpy; from services.core import signals\n"
        "def stop(): print(sorted({'asyncio', 'uvloop', 'structlog', 'nats', 'h5py'} & set(sys.modules))); sys.exit()\n"
        f"signals.hold = stop; runpy.run_module({module!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "[]\n" == done.stdout
