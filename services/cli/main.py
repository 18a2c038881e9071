"""The ``fiq`` command: its commands, and what happens to their errors.

The table of commands has their help texts too, so that ``fiq --help`` imports none of them: one that reads the corpus
takes half a second to import (h5py). A test compares the texts with the commands' own.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple, cast

import typer
from typer.core import TyperGroup

from fiq.errors import FiqError
from services.core.command import product_version

#: exit code after Ctrl-C: 128 + SIGINT
INTERRUPTED = 130


class Entry(NamedTuple):
    """A command: ``module:attribute`` below ``services.cli``, and the first line of its help."""

    location: str
    summary: str


#: in the order of `fiq --help`
COMMANDS = {
    "demo": Entry("demo:demo", "Post events while parts are killed, then verify HDF5."),
    "init": Entry("init.deployment:init", "Create the secrets of a deployment."),
    "up": Entry("embedded.up:up", "Run the whole pipeline on this machine until Ctrl-C."),
    "status": Entry("status:status", "Show nodes, stream, and each partition's lag and owner."),
    "doctor": Entry("doctor.command:doctor", "Check a whole deployment and say what to do."),
    "post": Entry("post:post", "Post the events of a file; a stopped post can continue."),
    "ls": Entry("corpus:ls", "List consultations: events, first and last time, id."),
    "show": Entry("corpus:show", "Print a consultation's events, one per line."),
    "export": Entry("export:export", "Write events as NDJSON, JSON, CSV or Parquet."),
    "verify": Entry("corpus:verify", "Check every row, body, chain and journal of a corpus."),
    "recover": Entry("corpus:recover", "Apply journals to their partition files."),
    "repack": Entry("corpus:repack", "Write a compact, verified copy of a corpus."),
    "backup": Entry("backup.backup:backup", "Copy a volume while persisters write, and verify it."),
    "restore": Entry("backup.restore:restore", "Put a lost volume back from a backup."),
    "give-up": Entry("backup.lost:give_up", "Start a lost volume again without a backup."),
    "place": Entry("backup.lost:place", "Restore deleted placement keys from partition files."),
    "dead": Entry("dead:dead", "List, show, requeue and drop dead letters."),
    "token": Entry("init.token:token", "Create, list and revoke API tokens without a restart."),
    "nats-context": Entry("nats_context:nats_context", "Write a context file for the `nats` command line."),
    "rolling-restart": Entry(
        "embedded.rolling_restart:rolling_restart", "Restart the processes of `fiq up` one after the other."
    ),
    "wait": Entry("embedded.rolling_restart:wait", "Wait until nodes, replicas and services are ready."),
    "provision": Entry("nats_context:provision", "Create the streams, or check that they fit the settings."),
    "version": Entry("main:version", "Print the versions of fiq, Python and nats-server."),
}


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
        typer.echo(f"nats-server cannot be run: {error}")


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
    """Shows an error as one message on stderr and exits with 1, instead of with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises typer.Exit: it failed (1) or was interrupted (130)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except FiqError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has closed it
                # the interpreter flushes stdout at exit, and would complain again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        typer.echo(f"fiq: {message}", err=True)
        raise typer.Exit(1)


class _Fiq(FiqGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = cast("Any", Commands(COMMANDS))  # nothing is added to it

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


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


@app.callback()
def _fiq() -> None:
    """Make *app* a group although it registers no command itself."""


def main() -> None:
    """Run the command line of this process; libraries log nothing into its results."""
    logging.basicConfig(level=logging.CRITICAL)
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
