"""``fiq version``."""

from __future__ import annotations

import platform
import subprocess

import typer

from services.cli.errors import MissingServerError
from services.cli.processes import find_nats_server
from services.core.command import product_version


def version() -> None:
    """Print the versions of fiq, of Python and of the nats-server that `fiq up` would run."""
    typer.echo(f"fiq {product_version()}")
    typer.echo(f"Python {platform.python_version()}")
    typer.echo(_server())


def _server() -> str:
    try:
        command = [str(find_nats_server()), "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
    except MissingServerError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nats-server cannot be run: {error}"
