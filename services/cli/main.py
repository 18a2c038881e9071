"""The ``fiq`` command: the commands' names, and what becomes of their errors."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Any

import structlog
import typer
from typer.core import TyperGroup

from services.cli.commands.backup import backup
from services.cli.commands.demo import demo
from services.cli.commands.doctor import doctor
from services.cli.commands.export import export
from services.cli.commands.give_up import give_up
from services.cli.commands.init import init
from services.cli.commands.nats_context import nats_context
from services.cli.commands.post import post
from services.cli.commands.provision import provision
from services.cli.commands.recover import recover
from services.cli.commands.repack import repack
from services.cli.commands.restore import restore
from services.cli.commands.rolling_restart import rolling_restart, wait
from services.cli.commands.show import show
from services.cli.commands.status import status
from services.cli.commands.token import token
from services.cli.commands.up import up
from services.cli.commands.verify import verify
from services.cli.commands.version import version
from services.contract.errors import FiqError

#: exit code after Ctrl-C: 128 + SIGINT
INTERRUPTED = 130


class FiqGroup(TyperGroup):
    """Shows an error as one message on stderr and exits with 1, instead of with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for.

        Raises:
            typer.Exit: it failed (1) or was interrupted (130).
        """
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


app = typer.Typer(
    name="fiq",
    cls=FiqGroup,
    help="Free Intelligence event pipeline: HTTP → three-node JetStream → one HDF5 group a consultation, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(init)
app.command()(up)
app.command()(status)
app.command()(doctor)
app.command()(post)
app.command()(show)
app.command()(export)
app.command()(verify)
app.command()(recover)
app.command()(repack)
app.command()(backup)
app.command()(restore)
app.command(name="give-up")(give_up)
app.add_typer(token)
app.command(name="nats-context")(nats_context)
app.command(name="rolling-restart")(rolling_restart)
app.command()(wait)
app.command()(provision)
app.command()(version)


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
