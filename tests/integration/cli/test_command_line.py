"""The command line in a process of its own: what it imports, runs and prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.main import COMMANDS, Shell, app

ROOT = Path(__file__).parents[3]
#: what takes 0.05 to 0.2 s to import
SLOW = {"rich.console", "structlog", "aiohttp", "nats", "h5py", "numpy", "cryptography"}
#: a program that is called fiq
AS_FIQ = "import sys; sys.argv[0] = 'fiq'; from services.cli.main import main; main()"
FIQ = [sys.executable, "-m", "services.cli.main"]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """A runner in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return CliRunner()


@pytest.mark.parametrize("command", ["version | true", "--help | true", "show --help | true", "logs -n 0 | head -1"])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path, command: str) -> None:
    """`fiq … | head` ends quietly and with 0, also in a script with `set -o pipefail`."""
    log = tmp_path / ".fiq" / "logs" / "ingest.log"
    log.parent.mkdir(parents=True)
    log.write_text('{"event":"E","level":"info","timestamp":"2026-11-27T16:00:00.000000Z"}\n' * 50_000)

    script = f"set -o pipefail; {shlex.join(FIQ)} {command}"
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert (0, "") == (result.returncode, result.stderr)


COMPLETED = [
    ("fiq expo", ["export"]),
    ("fiq token re", ["revoke"]),
    ("fiq export --fo", ["--format", "--force", "--folder"]),
    ("fiq export --format ", ["ndjson", "json", "csv", "parquet"]),
    ("fiq --ver", ["--version"]),
]


@pytest.mark.parametrize(("line", "expected"), COMPLETED)
@pytest.mark.parametrize("shell", list(Shell))
def test_shells_complete_commands_options_and_values(shell: Shell, line: str, expected: list[str]) -> None:
    """By asking `fiq` as the shell's script does."""
    words = line.split(" ")
    env = os.environ | {"_FIQ_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    env |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}

    result = subprocess.run([sys.executable, "-c", AS_FIQ], env=env, capture_output=True, text=True, check=True)

    assert "" == result.stderr
    assert expected == [name for name in re.split(r'[\s":]+', result.stdout) if name in expected]


def test_bash_takes_the_completion_script() -> None:
    """The one shell that every machine has."""
    script = f"""
fiq() {{ {shlex.join([sys.executable, "-c", AS_FIQ])} "$@"; }}
eval "$(fiq completion bash)"
complete -p fiq"""

    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)

    assert "complete -o default -F _fiq_completion fiq\n" == result.stdout


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
    """It is to come within half a second."""
    modules = set(imported_by("up --help"))

    assert "services.cli.embedded.up" in modules
    assert set() == modules & SLOW


def test_make_up_runs_the_pipeline() -> None:
    """For those who have just read the README."""
    command = ["make", "--no-print-directory", "-n", "up", "ARGS=--port 7009"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    assert ".venv/bin/fiq up --port 7009" == result.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", ["version", "--help"])
def test_a_command_imports_none_of_the_others(arguments: str) -> None:
    """`fiq version` and `fiq --help` would take twice as long."""
    commands = {f"services.cli.{entry.location.partition(':')[0]}" for entry in COMMANDS.values()}

    modules = set(imported_by(arguments))

    assert {"services.cli.main"} == commands & modules
    assert set() == modules & SLOW
