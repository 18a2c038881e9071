"""The ``fiq`` command: the commands' names, and what becomes of their errors."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, cast

import structlog
import typer
from typer.core import TyperGroup

from fiq.errors import FiqError

#: exit code after Ctrl-C: 128 + SIGINT
INTERRUPTED = 130


#: in the order of `fiq --help`
COMMANDS = {
    name: f"services.cli.commands.{place}"
    for name, place in {
        "demo": "demo:demo",
        "init": "init:init",
        "up": "up:up",
        "status": "status:status",
        "doctor": "doctor:doctor",
        "post": "post:post",
        "show": "export:show",
        "export": "export:export",
        "verify": "verify:verify",
        "recover": "verify:recover",
        "repack": "verify:repack",
        "backup": "backup:backup",
        "restore": "restore:restore",
        "give-up": "give_up:give_up",
        "place": "place:place",
        "token": "token:token",
        "nats-context": "nats_context:nats_context",
        "rolling-restart": "rolling_restart:rolling_restart",
        "wait": "rolling_restart:wait",
        "provision": "nats_context:provision",
        "version": "version:version",
    }.items()
}


class Commands(Mapping[str, Any]):
    """The commands of a group, in their order.

    Args:
        places: name → ``module:function`` of a command, or ``module:app`` of a group of some.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """Return the command of that *name*, as click knows it. Raises KeyError: there is none."""
        if name not in self._found:
            module, _, attribute = self._places[name].partition(":")
            self._found[name] = _command(name, getattr(import_module(module), attribute))
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _command(name: str, found: Any) -> Any:
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name)(found)
    return typer.main.get_command(alone)


class FiqGroup(TyperGroup):
    """Shows an error as one message on stderr and exits with 1, instead of with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for. Raises typer.Exit: it failed (1) or was interrupted (130)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except FiqError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has enough
                _discard_stdout()
                raise typer.Exit(1) from None
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        typer.echo(f"fiq: {message}", err=True)
        raise typer.Exit(1)


class _Fiq(FiqGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = cast("Any", Commands(COMMANDS))  # nothing is added to it


app = typer.Typer(
    name="fiq",
    cls=_Fiq,
    help="Free Intelligence event pipeline: HTTP → three-node JetStream → one HDF5 group a consultation, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _fiq() -> None:
    """Be a group, though no command is registered before it is called."""


def main() -> None:
    """Run the command line of this process."""
    _quiet_logs()
    app()


def _quiet_logs() -> None:
    """Keep what the libraries log out of the results: errors only, to stderr."""
    logging.basicConfig(level=logging.CRITICAL)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _discard_stdout() -> None:
    # the interpreter flushes stdout at exit, and would complain again
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
