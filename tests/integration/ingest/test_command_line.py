"""The process: its command line, its settings, its refusals."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.core.settings import variables
from services.ingest.settings import Settings


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FI_")}
    env |= {"FI_MANAGEMENT_PORT": "0"} | settings
    command = [sys.executable, "-m", "services.ingest", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_every_setting() -> None:
    """So the manual is where the program is."""
    done = run("--help")
    assert done.returncode == 0
    assert [variable.name for variable in variables(Settings) if variable.name not in done.stdout] == []


def test_version_is_the_distribution_s() -> None:
    """For bug reports."""
    done = run("--version")
    assert (done.returncode, done.stdout[:4]) == (0, "fiq ")


def test_an_unknown_argument_is_usage() -> None:
    """Exit code 2."""
    assert run("--port", "1").returncode == 2


def test_wrong_settings_are_all_named_and_exit_2() -> None:
    """One line each, no traceback."""
    done = run(FI_PORT="http", FI_LOG_URL="localhost", FI_LOG_LEVEL="loud")
    assert done.returncode == 2
    assert [line.removeprefix("fiq-ingest: ").partition("=")[0] for line in done.stderr.splitlines()] == [
        "FI_PORT",
        "FI_LOG_LEVEL",
        "FI_LOG_URL",
    ]


def test_a_taken_port_is_one_line_and_exit_1() -> None:
    """Known at once, before the cluster is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(FI_PORT=str(taken.getsockname()[1]), FI_LOG_URL="nats://127.0.0.1:1")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "cannot listen on 127.0.0.1" in done.stderr


@pytest.mark.timeout(60)
def test_without_a_cluster_it_gives_up_after_its_time_with_one_line() -> None:
    """It names where it looked and how long."""
    done = run(FI_PORT="0", FI_LOG_URL="nats://127.0.0.1:1", FI_STARTUP_TIMEOUT="1")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    for part in ("127.0.0.1:1", "FI_STARTUP_TIMEOUT", "FI_LOG_URL"):
        assert part in done.stderr


def test_beyond_loopback_it_does_not_start_without_tokens() -> None:
    """An unintended open door; the message says what to do, before the process waits for the cluster."""
    done = run(FI_HOST="0.0.0.0", FI_PORT="0", FI_LOG_URL="nats://127.0.0.1:1")
    assert (2, 1) == (done.returncode, len(done.stderr.splitlines()))
    for part in ("FI_TOKEN_FILE", "FI_HOST", "fiq token new", "FI_ALLOW_ANONYMOUS=1"):
        assert part in done.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("settings", [{"FI_HOST": "0.0.0.0", "FI_ALLOW_ANONYMOUS": "1"}, {"FI_HOST": "localhost"}])
def test_without_tokens_it_says_so(settings: dict[str, str]) -> None:
    """On loopback, and where FI_ALLOW_ANONYMOUS asks for it."""
    done = run(FI_PORT="0", FI_LOG_URL="nats://127.0.0.1:1", FI_STARTUP_TIMEOUT="1", **settings)
    assert 1 == done.returncode
    assert "ACCESS_ANONYMOUS" in done.stdout


def test_an_unknown_setting_is_warned_of_once_at_start() -> None:
    """A misspelt one would have no effect, in silence."""
    done = run(FI_PORT="0", FI_LOG_URL="nats://127.0.0.1:1", FI_STARTUP_TIMEOUT="1", FI_MAXBACKLOG="1", FI_VOLUMES="2")
    assert 1 == done.stdout.count("SETTINGS_UNKNOWN")
    assert "FI_MAXBACKLOG (FI_MAX_BACKLOG?)" in done.stdout


def test_a_token_file_that_is_none_ends_it_with_2(tmp_path: Path) -> None:
    """One line, with the setting, the file, and nothing of what stands in it."""
    path = tmp_path / "tokens"
    path.write_text("secret\n")
    done = run(FI_PORT="0", FI_TOKEN_FILE=str(path), FI_LOG_URL="nats://127.0.0.1:1")
    assert (2, 1) == (done.returncode, len(done.stderr.splitlines()))
    assert f"FI_TOKEN_FILE={path}: line 1" in done.stderr
    assert "secret" not in done.stderr
