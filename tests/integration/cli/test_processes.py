"""Child processes: started, watched, stopped, and never orphaned."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.cli.embedded.processes import ManagedProcess
from services.cli.errors import CommandError
from tests.support.polling import eventually_sync

Maker = Callable[..., ManagedProcess]

SLEEP = "import time; print('ready', flush=True); time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    """Return a function that makes a process of a piece of Python; all are killed at the end."""
    made: list[ManagedProcess] = []

    def maker(code: str, *, env: dict[str, str] | None = None) -> ManagedProcess:
        command = [sys.executable, "-I", "-c", code]
        process = ManagedProcess("child", command, env=env or {}, log=tmp_path / f"{len(made)}.log")
        made.append(process)
        return process

    yield maker
    for process in made:
        process.kill()


def started(process: ManagedProcess) -> ManagedProcess:
    process.start()
    eventually_sync(lambda: "ready" in process.log_tail())
    return process


def test_a_process_is_described_before_it_is_started(make: Maker) -> None:
    """Nothing runs yet, and stopping nothing is fine."""
    process = make(SLEEP)

    assert (process.pid, process.running, process.exit_code) == (None, False, None)
    assert process.stop(grace=1)


def test_a_process_runs_until_it_is_stopped(make: Maker) -> None:
    """SIGTERM is tried first, and shows in the exit code."""
    process = started(make(SLEEP))
    before = process.running

    assert process.stop(grace=10)

    assert (before, process.running) == (True, False)
    assert process.exit_code == -signal.SIGTERM


def test_a_process_that_does_not_listen_is_killed(make: Maker) -> None:
    """After the grace period SIGKILL follows, and the caller hears of it."""
    process = started(make(STUBBORN))

    assert not process.stop(grace=0.2)

    assert process.exit_code == -signal.SIGKILL


def test_a_process_may_be_started_again(make: Maker) -> None:
    """With the same command and the same log, which shows the last run's end only."""
    process = started(make("import os; print('ready', os.getpid(), flush=True)"))
    assert process.wait(10)
    first = process.pid

    process.start()
    assert process.wait(10)

    assert process.pid != first
    assert process.log_tail() == f"ready {process.pid}"
    assert process.log.read_text().count("ready") == 2


def test_a_process_is_not_started_twice(make: Maker) -> None:
    """The first one would be lost."""
    process = started(make(SLEEP))

    with pytest.raises(CommandError, match="runs already"):
        process.start()


def test_a_process_outlives_the_thread_that_started_it(make: Maker) -> None:
    """The kernel ties a child to the thread that forked it, and coroutines start children from short-lived threads."""
    process = make(SLEEP)
    thread = threading.Thread(target=process.start)
    thread.start()
    thread.join()

    eventually_sync(lambda: "ready" in process.log_tail())

    assert process.running


def test_a_process_has_a_session_of_its_own(make: Maker) -> None:
    """Ctrl-C in the terminal reaches the parent only."""
    process = started(make(SLEEP))

    assert process.pid is not None
    assert os.getsid(process.pid) == process.pid


def test_a_process_gets_only_the_environment_that_it_is_given(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the surroundings do not leak in."""
    monkeypatch.setenv("FI_SECRET", "x")
    process = make("import os; print('ready', os.environ.get('FI_SECRET'), os.environ['OWN'])", env={"OWN": "1"})

    started(process)

    assert process.log_tail() == "ready None 1"


def test_the_end_of_a_log_is_bounded(make: Maker) -> None:
    """A long log is not read as a whole to show its end."""
    process = make("for i in range(5000): print('line', i)\nprint('ready')")

    started(process)
    assert process.wait(10)

    assert process.log_tail(3).splitlines() == ["line 4998", "line 4999", "ready"]


def test_a_message_about_a_log_has_its_last_lines_or_says_that_there_are_none(make: Maker) -> None:
    """No sentence ends in a colon with nothing after it."""
    process = make("print('line 1')\nprint('ready')")
    assert f"Its log, {process.log}, is empty." == process.log_end()

    started(process)
    assert process.wait(10)

    assert f"The end of its log, {process.log}:\nline 1\nready" == process.log_end()


def test_a_program_that_is_missing_is_seen(tmp_path: Path) -> None:
    """On Linux the launcher says so in the log; elsewhere the start fails."""
    process = ManagedProcess("child", [str(tmp_path / "missing")], env={}, log=tmp_path / "log")
    try:
        process.start()
    except CommandError:
        return
    assert process.wait(10)
    assert process.exit_code == 1
    assert "FileNotFoundError" in process.log_tail()


def test_a_log_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    """The folder is missing, for example."""
    process = ManagedProcess("child", [sys.executable], env={}, log=tmp_path / "missing" / "log")

    with pytest.raises(CommandError, match="cannot start child"):
        process.start()
