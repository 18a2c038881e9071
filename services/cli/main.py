"""The ``fiq`` command: its commands, and what happens to their errors.

The table of commands has their help texts too, so that ``fiq --help`` imports none of them: one that reads the corpus
takes half a second to import (h5py). A test compares the texts with the commands' own.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from importlib import import_module
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, cast

from fiq.errors import FiqError
from services.cli.errors import UsageError
from services.core.command import product_version

#: about a package that `pip install fiq` leaves out, because clients need none of it
_MISSING = "{} is not installed: run  pip install 'fiq[services]'"
try:
    import typer
    from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]
    from typer.core import TyperGroup
except ModuleNotFoundError as error:
    sys.exit(f"fiq: {_MISSING.format(error.name)}")

#: in the environment when a shell asks for completions
COMPLETE_VARIABLE = "_FIQ_COMPLETE"
#: what typer raises about arguments; it exports only this subclass
USAGE_ERROR = cast("type[Exception]", typer.BadParameter.__mro__[1])
_SURPLUS = re.compile(r"^Got unexpected extra arguments?(?:\(s\))? \((.*)\)$", re.DOTALL)
#: exit code after Ctrl-C: 128 + SIGINT
INTERRUPTED = 130


class Entry(NamedTuple):
    """A command: ``module:attribute`` below ``services.cli``, and the first line of its help."""

    location: str
    summary: str


#: the sections of `fiq --help`
SECTIONS = {
    "Start here": {
        "up": Entry("embedded.up:up", "Run the whole pipeline on this machine until Ctrl-C."),
        "demo": Entry("demo:demo", "Post events while parts are killed, then verify HDF5."),
        "logs": Entry("logs:logs", "Show the logs of `fiq up`, of all processes by time."),
        "status": Entry("status:status", "Show nodes, stream, and each partition's lag and owner."),
    },
    "Post and read": {
        "post": Entry("post:post", "Post the events of a file; a stopped post can continue."),
        "ls": Entry("corpus:ls", "List consultations: events, first and last time, id."),
        "show": Entry("corpus:show", "Print a consultation's events, one per line."),
        "get": Entry("service:get", "Print one event as JSON, in HDF5 or not yet."),
        "follow": Entry("service:follow", "Print a consultation's events as they come."),
        "export": Entry("corpus:export", "Write events as NDJSON, JSON, CSV or Parquet."),
    },
    "Deploy and operate": {
        "init": Entry("init.deployment:init", "Create the secrets of a deployment."),
        "token": Entry("init.token:token", "Create, list and revoke API tokens without a restart."),
        "provision": Entry("nats_context:provision", "Create the streams, or check that they fit the settings."),
        "doctor": Entry("doctor.command:doctor", "Check a whole deployment and say what to do."),
        "dead": Entry("service:dead", "List, show, requeue and drop dead letters."),
        "wait": Entry("embedded.rolling_restart:wait", "Wait until nodes, replicas and services are ready."),
        "rolling-restart": Entry(
            "embedded.rolling_restart:rolling_restart", "Restart the processes of `fiq up` one after the other."
        ),
        "nats-context": Entry("nats_context:nats_context", "Write a context file for the `nats` command line."),
    },
    "Corpus files and volumes": {
        "verify": Entry("corpus_files:verify", "Check every row, body, chain and journal of a corpus."),
        "recover": Entry("corpus_files:recover", "Apply journals to their partition files."),
        "repack": Entry("corpus_files:repack", "Write a compact, verified copy of a corpus."),
        "backup": Entry("backup.backup:backup", "Copy a volume while persisters write, and verify it."),
        "restore": Entry("backup.restore:restore", "Put a lost volume back from a backup."),
        "give-up": Entry("backup.restore:give_up", "Start a lost volume again without a backup."),
        "place": Entry("backup.restore:place", "Restore deleted placement keys from partition files."),
    },
    "About fiq": {
        "completion": Entry("main:completion", "Print the completion script of a shell."),
        "version": Entry("main:version", "Print the versions of fiq, Python and nats-server."),
    },
}
#: all, by name
COMMANDS = {name: entry for commands in SECTIONS.values() for name, entry in commands.items()}


def version() -> None:
    """Print the versions of fiq, Python and nats-server."""
    from services.cli.embedded.processes import find_nats_server
    from services.cli.errors import MissingServerError

    typer.echo(f"fiq {product_version()}")
    typer.echo(f"Python {platform.python_version()}")
    try:
        command = [str(find_nats_server()), "--version"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603 - ours
        typer.echo(found.stdout.strip())
    except MissingServerError as error:
        typer.echo(str(error))
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it failed"
        typer.echo(f"nats-server cannot be run: {reason}")


class Shell(StrEnum):
    """A shell whose completion is supported."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="Of the shell that you use.")]) -> None:
    """Print the completion script of a shell.

    It asks `fiq` itself for what may come next, so it fits the installed version.
    """
    typer.echo(get_completion_script(prog_name="fiq", complete_var=COMPLETE_VARIABLE, shell=shell))


class Commands(Mapping[str, Any]):
    """The commands by name, each imported when it is asked for.

    Args:
        entries: where they are.
        on_import: called after each import.
    """

    def __init__(self, entries: Mapping[str, Entry], on_import: Callable[[], None] = lambda: None) -> None:
        self._entries = entries
        self._on_import = on_import
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Return the command *name* as click knows it. Raises KeyError: there is no such command."""
        if name not in self._loaded:
            module, _, attribute = self._entries[name].location.partition(":")
            self._loaded[name] = _command(name, getattr(import_module(f"services.cli.{module}"), attribute))
            self._on_import()
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _command(name: str, found: Any) -> Any:
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name)(found)
    return typer.main.get_command(alone)


class FiqGroup(TyperGroup):
    """Shows an error as one message on stderr and exits with 1 (2: wrong arguments), instead of with a traceback."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Read the arguments, and print the help if that was asked for."""
        with _closed_pipe_is_an_end():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises typer.Exit: it failed (1), has wrong arguments (2), or was interrupted (130)."""
        try:
            with _closed_pipe_is_an_end():
                try:
                    return super().invoke(ctx)
                finally:
                    sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except FiqError as error:
            message, code = str(error), 2 if isinstance(error, UsageError) else 1
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("fiq", "services"):
                raise
            message, code = _MISSING.format(error.name), 1
        except USAGE_ERROR as error:
            cast("Any", error).message = _plain(error)
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            message, code = f"{error.filename}: {reason}" if error.filename else reason, 1
        typer.echo(f"fiq: {message}", err=True)
        raise typer.Exit(code)


def _plain(error: Any) -> str:
    """Return what is wrong with the arguments in words for a person: typer from 0.29 on passes on those of pydantic."""
    details: Callable[[], list[dict[str, Any]]] | None = getattr(error.__cause__, "errors", None)
    if details is None:
        return _SURPLUS.sub(r"Unexpected: \1.", str(error.message))
    found = details()[0]
    limits = found.get("ctx", {})
    match found["type"]:
        case "int_parsing" | "int_from_float" | "int_type" | "int_parsing_size":
            return f"{found['input']!r} is not a whole number."
        case "float_parsing" | "float_type" | "finite_number":
            return f"{found['input']!r} is not a number."
        case "less_than_equal":
            return f"{found['input']} is more than {limits['le']}."
        case "greater_than_equal":
            return f"{found['input']} is less than {limits['ge']}."
        case "value_error":
            return str(limits["error"])
        case _:
            return f"{found['input']!r} is not allowed here."


@contextmanager
def _closed_pipe_is_an_end() -> Iterator[None]:
    """Raise typer.Exit(0) when the reader of stdout has closed it, as in ``fiq … | head``: it has what it wanted."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        # the interpreter flushes stdout at exit, and would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


class _Fiq(FiqGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = cast("Any", Commands(COMMANDS))  # nothing is added to it

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return what may follow ``fiq``; as for the help, no command is imported for it."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        found = ((name, entry.summary) for name, entry in COMMANDS.items() if name.startswith(incomplete))
        return [SimpleNamespace(value=name, help=summary, type="plain") for name, summary in found]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        widest = max(map(len, COMMANDS))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(widest), entry.summary) for name, entry in commands.items()])


app = typer.Typer(
    name="fiq",
    cls=_Fiq,
    help="Consultation events over HTTP → three-node JetStream → one HDF5 group per consultation, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fiq {product_version()}")
        raise typer.Exit


@app.callback()
def _fiq(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make *app* a group although it registers no command itself."""


def main() -> None:
    """Run the command line of this process; libraries log nothing into its results."""
    logging.basicConfig(level=logging.CRITICAL)
    if COMPLETE_VARIABLE in os.environ:  # the shell asks
        completion_init()
    group: Any = typer.main.get_command(app)
    group.commands = Commands(COMMANDS, on_import=_silence_structlog)
    group()


def _silence_structlog() -> None:
    """Let no log line through, if the command's modules log at all: to import structlog takes 0.15 s."""
    structlog = sys.modules.get("structlog")
    if structlog is not None:
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )


if __name__ == "__main__":
    main()
