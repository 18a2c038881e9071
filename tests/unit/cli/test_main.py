"""The command line as a whole: help, errors and exit codes."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import typer
from typer.testing import CliRunner

from services.cli.errors import NotRunningError
from services.cli.main import COMMANDS, COMPLETE_VARIABLE, Commands, Entry, FiqGroup, Shell, app
from services.core.command import product_version

SERVICES = Path(__file__).parents[3] / "services" / "cli"
#: commands in modules that print tables, which print lines
NO_TABLE = {"get", "token new", "token revoke"}


#: texts of libraries, which no message to a person has
LIBRARIES = ("Input should", "Value error", "Errno", "argument(s)", "pydantic", "Traceback", "_ssl.c", "Connect call")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """A runner in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def failing_app(failure: BaseException) -> typer.Typer:
    made = typer.Typer(cls=FiqGroup)

    @made.command()
    def fail() -> None:
        raise failure

    made.command(name="other")(lambda: None)
    return made


def test_help_lists_every_command(runner: CliRunner) -> None:
    """`fiq --help` names what there is."""
    result = runner.invoke(app, ["--help"])

    assert result.exit_code == 0
    assert list(COMMANDS) == re.findall(r"^  ([a-z-]+) {2,}\S", result.output.partition("Start here:")[2], re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(runner: CliRunner, command: str) -> None:
    """`fiq COMMAND -h` works for each."""
    result = runner.invoke(app, [command, "-h"])

    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["show"], ["export", "c-1", "--format", "xml"], ["up", "--port", "0"], ["status", "--unknown"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(runner: CliRunner, arguments: list[str]) -> None:
    """Usage errors go to stderr, and have another exit code than failures."""
    result = runner.invoke(app, arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["status"], "fiq up"),
        (["nats-context"], "--server"),
        (["show", "c-1"], "--corpus"),
        (["export", "c-1"], "--corpus"),
        (["status", "--folder", "elsewhere"], "elsewhere"),
        (["show", "c-1", "--corpus", "nowhere"], "nowhere"),
        (["up", "--folder", "/dev/null"], "/dev/null is not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_failure_is_one_line_that_says_what_to_do(runner: CliRunner, arguments: list[str], advice: str) -> None:
    """Errors go to stderr without a traceback, and the exit code is 1."""
    result = runner.invoke(app, arguments)

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("fiq: ")
    assert result.stderr.count("\n") == 1
    assert advice in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["provision", "--server", "http://127.0.0.1:1"], "--server 'http://127.0.0.1:1': expected nats://HOST:PORT"),
        (["status", "--server", "foo"], "--server 'foo': expected nats://HOST:PORT"),
        (["show", "a b"], "'a b' is not a consultation's id: "),
        (["show", "a/b", "--corpus", "."], "'a/b' is not a consultation's id: "),
        (["show", "", "--corpus", "."], "'' is not a consultation's id: "),
        (["export", "a b"], "'a b' is not a consultation's id: "),
        (["get", "a b", str(UUID(int=1))], "'a b' is not a consultation's id: "),
        (["get", "c-1", "abc"], "'abc' is not a message id, which is a UUID"),
        (["get", "c-1", str(UUID(int=1)), "--url", "127.0.0.1:7001"], "--url: the URL of the service is http://host"),
        (["follow", "a b"], "'a b' is not a consultation's id: "),
        (["follow", "c-1", "--type", "", "--url", "http://127.0.0.1:1"], "an event type is a string that is not empty"),
        (["dead", "list", "--url", "127.0.0.1:7001"], "--url: the URL of the service is http://host:port"),
        (["post", "-", "--url", "127.0.0.1:7001"], "--url: the URL of the service is http://host:port"),
        (["post", "-", "--consultation", "a b"], "a consultation id is 1 to 128 characters"),
        (["init", "d", "--hosts", "a,b"], "--hosts: 2 nodes cannot be a cluster"),
        (["init", "d", "--hosts", "a,-b,c"], "--hosts: '-b' is neither a host name nor an address"),
        (["init", "d", "--owner", "fiq"], "--owner fiq: give numbers"),
        (["init", "d", "--curve", "Server"], "--curve Server: names are lower-case letters"),
        (["init", "d", "--encrypt", "--rotate", "users"], "--encrypt cannot be combined with --rotate"),
        (["restore", "b", "--to", "d", "--offline", "--as-store", "s"], "so it cannot be --offline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_malformed_argument_is_wrong_usage(runner: CliRunner, arguments: list[str], reason: str) -> None:
    """It is named in one line, before anything else that the command needs is looked for."""
    result = runner.invoke(app, arguments)

    assert 2 == result.exit_code
    assert "" == result.stdout
    assert result.stderr.startswith("fiq: ")
    assert 1 == result.stderr.count("\n")
    assert reason in result.stderr
    assert [] == list(Path().iterdir())


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"FI_URL": "127.0.0.1:7001"}, "127.0.0.1:7001 (FI_URL): the URL of the service is http://host:port"),
        ({"FI_URL": "http://127.0.0.1:1", "FI_TOKEN": "a b"}, "(FI_URL): a token is one word of visible ASCII"),
    ],
)
def test_a_malformed_setting_is_a_failure(runner: CliRunner, variables: dict[str, str], reason: str) -> None:
    """The arguments are right, so the exit code is 1."""
    result = runner.invoke(app, ["get", "c-1", str(UUID(int=1))], env=variables)

    assert 1 == result.exit_code
    assert reason in result.stderr


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (NotRunningError("nothing here"), 1, "fiq: nothing here\n"),
        (OSError(errno.ENOSPC, "No space left on device", "some/file"), 1, "fiq: some/file: No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["an error of ours", "an error of the system", "Ctrl-C"],
)
def test_what_becomes_of_an_exception(failure: BaseException, code: int, message: str) -> None:
    """Errors that were foreseen are shown without a traceback; Ctrl-C exits with 130."""
    result = CliRunner().invoke(failing_app(failure), ["fail"])

    assert result.exit_code == code
    assert result.stderr == message


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    """An unforeseen exception is a bug, and hidden bugs stay."""
    result = CliRunner().invoke(failing_app(RuntimeError("bug")), ["fail"])

    assert isinstance(result.exception, RuntimeError)


def test_no_command_shows_help(runner: CliRunner) -> None:
    """`fiq` alone is a question."""
    result = runner.invoke(app, [])

    assert "Usage:" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_table_has_each_commands_own_help(command: str) -> None:
    """`fiq --help` says what `fiq COMMAND --help` begins with."""
    assert COMMANDS[command].summary == first_sentence(Commands(COMMANDS)[command].help)


def helps(prefix: tuple[str, ...] = (), commands: Any = COMMANDS) -> Iterator[tuple[str, ...]]:
    """Yield the arguments of each help: of `fiq`, of each group, and of each command."""
    yield prefix
    for name in commands:
        command = Commands(COMMANDS)[name] if commands is COMMANDS else commands[name]
        yield from helps((*prefix, name), getattr(command, "commands", {}))


@pytest.mark.parametrize("arguments", list(helps()), ids=" ".join)
def test_help_fits_80_columns_and_nothing_of_it_is_cut(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """A list of commands has one whole line for each."""
    monkeypatch.setenv("COLUMNS", "80")

    shown = runner.invoke(app, [*arguments, "--help"]).output
    shown = shown.partition("\n\n")[2]  # the usage ends with ARGS...

    assert [] == [line for line in shown.splitlines() if len(line) > 80 or line.endswith(("...", "…"))]
    described = re.findall(r"^  [a-z][a-z-]* {2,}(\S.*)$", shown.partition("Start here:")[2], re.MULTILINE)
    assert all(line.endswith(".") for line in described), described


def test_version_is_an_option_too(runner: CliRunner) -> None:
    """As every program has it; `fiq version` has more."""
    result = runner.invoke(app, ["--version"])

    assert (0, f"fiq {product_version()}\n") == (result.exit_code, result.stdout)


@pytest.mark.parametrize("shell", list(Shell))
def test_completion_prints_a_script_for_each_shell(runner: CliRunner, shell: Shell) -> None:
    """test_command_line.py uses them."""
    result = runner.invoke(app, ["completion", shell])

    assert 0 == result.exit_code
    assert f"{COMPLETE_VARIABLE}=complete_{shell}" in result.stdout


def test_every_command_that_prints_a_table_has_json() -> None:
    """A script reads no table: whoever calls console.table, or prints a manifest, takes --json."""
    users = [path for path in SERVICES.rglob("*.py") if "console.table(" in path.read_text() and path.stem != "console"]
    modules = {".".join(path.relative_to(SERVICES).with_suffix("").parts) for path in users}
    commands = [name for name, entry in COMMANDS.items() if entry.location.partition(":")[0] in modules]
    flat = {
        f"{name} {part}".strip(): command
        for name in commands
        for part, command in getattr(Commands(COMMANDS)[name], "commands", {"": Commands(COMMANDS)[name]}).items()
    }

    lacking = {name for name, one in flat.items() if not any("--json" in parameter.opts for parameter in one.params)}

    assert NO_TABLE == lacking


def first_sentence(text: str) -> str:
    """Return the first line of a help text."""
    return text.partition("\n")[0]


def test_commands_are_a_mapping_of_what_can_be_called() -> None:
    """A name that is none is a KeyError, as in any mapping; a command is made once."""
    commands = Commands({"version": Entry("main:version", "")})

    assert ["version"] == list(commands)
    assert 1 == len(commands)
    assert commands["version"] is commands["version"]
    with pytest.raises(KeyError):
        commands["nonsense"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("up --port 99999", "Invalid value for '--port': 99999 is more than 65535."),
        ("up --port x", "Invalid value for '--port': 'x' is not a whole number."),
        ("up --port 1.5", "Invalid value for '--port': '1.5' is not a whole number."),
        ("up --log tape", "Invalid value for '--log': 'tape' is not one of 'nats', 'zmq'."),
        ("demo --events 1", "Invalid value for '--events': 1 is less than 100."),
        ("wait --timeout soon", "Invalid value for '--timeout': 'soon' is not a number."),
        ("up one two", "Unexpected: one two."),
        ("token new", "Missing argument 'name'."),
    ],
)
def test_what_is_wrong_with_an_argument_is_said_in_plain_words(
    runner: CliRunner, arguments: str, expected: str
) -> None:
    """Not in those of the libraries that read it."""
    done = runner.invoke(app, arguments.split())
    assert 2 == done.exit_code
    assert f"Error: {expected}" == done.stderr.splitlines()[-1]
    assert [] == [text for text in LIBRARIES if text in done.output]


def test_an_error_of_the_system_without_a_file_has_its_reason_only(runner: CliRunner) -> None:
    """No number, and no tuple."""
    done = runner.invoke(failing_app(OSError(errno.ENOSPC, "No space left on device")), ["fail"])
    assert (1, "fiq: No space left on device\n") == (done.exit_code, done.stderr)
