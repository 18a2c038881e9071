"""The command line in a process of its own: what it imports, runs and prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.main import COMMANDS, app

ROOT = Path(__file__).parents[3]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """A runner in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def test_a_closed_pipe_is_no_error() -> None:
    """`fiq … | head -1` ends quietly."""
    pipeline = f"'{sys.executable}' -m services.cli.main version | true"

    result = subprocess.run(["sh", "-c", pipeline], capture_output=True, text=True, check=False)

    assert result.stderr == ""


def test_version_names_fiq_and_the_server(runner: CliRunner) -> None:
    """`fiq version` says what a report of a fault needs."""
    result = runner.invoke(app, ["version"])

    assert result.exit_code == 0
    assert "fiq " in result.output
    assert "nats-server: v2." in result.output


def imported_by(*commands: str) -> list[str]:
    """Return the modules that a process has imported after `fiq` ran each of *commands* with one argument."""
    code = (
        "import contextlib, io, sys\nfrom services.cli.main import app\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    for arguments in {[command.split() for command in commands]}:\n"
        "        app(arguments, standalone_mode=False)\nprint(*sys.modules)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_h5py_is_imported_only_when_a_corpus_is_read() -> None:
    """It takes a while, and most commands do not need it."""
    modules = imported_by(*(f"{command} --help" for command in ("up", "status", "post", "nats-context", "version")))

    assert "services.cli.status" in modules
    assert "h5py" not in modules


def test_the_first_line_of_up_waits_for_no_slow_import() -> None:
    """It is to come within half a second; each of these takes 0.05 to 0.2 s."""
    modules = set(imported_by("up --help"))

    assert "services.cli.embedded.up" in modules
    assert set() == modules & {"rich.console", "structlog", "aiohttp", "nats", "h5py", "numpy", "cryptography"}


def test_make_up_runs_the_pipeline() -> None:
    """For those who have just read the README."""
    command = ["make", "-n", "up", "ARGS=--port 7009"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    assert ".venv/bin/fiq up --port 7009" == result.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", ["version", "--help"])
def test_a_command_imports_none_of_the_others(arguments: str) -> None:
    """`fiq version` and `fiq --help` would take twice as long."""
    commands = {f"services.cli.{entry.location.partition(':')[0]}" for entry in COMMANDS.values()}

    assert {"services.cli.main"} == commands & set(imported_by(arguments))
