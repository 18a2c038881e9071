"""The watchdog ends a process that hangs, and no other one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import orjson
import pytest

#: a service with a limit of a second; `patient` has a secret among its values
PROGRAM = """
import asyncio, sys, time
from services.core import logs
from services.core.watchdog import Watchdog

def patient(secret, seconds):
    time.sleep(seconds)

async def main():
    with Watchdog({limit}) as watchdog, watchdog.threads(1, "hdf5") as executor:
        loop = asyncio.get_running_loop()
        print("began", flush=True)
        {work}
        await asyncio.sleep(0)
    print("ended", flush=True)

logs.configure("test", json=True)
asyncio.run(main())
"""


def start(work: str, limit: float = 1) -> subprocess.Popen[str]:
    program = PROGRAM.format(work=work, limit=limit)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "began\n" == process.stdout.readline()
    return process


def hung(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the process to end itself, and return the one line that it logged."""
    output, errors = process.communicate(timeout=30)
    assert (1, "") == (process.returncode, errors)
    line: dict[str, Any] = orjson.loads(output)
    assert "PROCESS_HUNG" == line["event"]
    assert "PATIENT-17" not in output
    return line


@pytest.mark.parametrize(
    ("work", "what", "thread"),
    [
        ("patient('PATIENT-17', 60)", "event loop", "MainThread"),
        ("await loop.run_in_executor(executor, patient, 'PATIENT-17', 60)", "call in a thread", "hdf5_0"),
        ("await asyncio.to_thread(patient, 'PATIENT-17', 60)", "call in a thread", "asyncio_0"),
    ],
)
def test_a_process_that_hangs_ends_itself_and_says_where(work: str, what: str, thread: str) -> None:
    """One line has the position of each busy thread in the code, and none of its values."""
    with start(work) as process:
        line = hung(process)
    assert (what, 1) == (line["hung"], line["overdue_s"])
    assert line["threads"][thread][0].endswith(" patient")


def test_code_that_keeps_the_interpreter_busy_is_ended_by_the_kernel() -> None:
    """No thread of Python can run then: faulthandler writes where each one is, and SIGPROF ends the process."""
    with start("pow(3, 10**9)") as process:
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert -signal.SIGPROF == process.returncode
    assert "most recent call first" in errors
    assert "in main" in errors


def test_a_process_that_was_stopped_for_long_goes_on() -> None:
    """SIGSTOP stops the watchdog as well; a suspended machine does the same."""
    with start("await asyncio.gather(asyncio.sleep(1), loop.run_in_executor(executor, patient, '', 0.3))") as process:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2)  # twice the limit; nothing can be waited for
        os.kill(process.pid, signal.SIGCONT)
        output, errors = process.communicate(timeout=30)
    assert (0, "ended\n", "") == (process.returncode, output, errors)


@pytest.mark.parametrize(("limit", "calls", "seconds"), [(1, 4, 0.4), (0, 1, 1.6)])
def test_what_is_slow_and_not_overdue_goes_on(limit: float, calls: int, seconds: float) -> None:
    """Calls of less than the limit one after the other; without a limit, longer ones too."""
    work = f"[await loop.run_in_executor(executor, patient, '', {seconds}) for _ in range({calls})]"
    with start(work, limit) as process:
        output, errors = process.communicate(timeout=30)
    assert (0, "ended\n", "") == (process.returncode, output, errors)


def test_a_log_that_takes_nothing_does_not_keep_the_process() -> None:
    """What hangs may be the log: the line gets two seconds."""
    read, write = os.pipe()
    program = PROGRAM.format(limit=1, work="os.write(1, b'-' * 2**20)").replace("import asyncio", "import os, asyncio")
    try:
        done = subprocess.run([sys.executable, "-c", program], stdout=write, timeout=60, check=False)
    finally:
        os.close(read)
        os.close(write)
    assert 1 == done.returncode
