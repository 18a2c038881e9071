"""``fiq rolling-restart`` and ``fiq wait``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli.errors import CommandError, NotRunningError
from services.cli.folder import DEFAULT_FOLDER, StackFolder
from services.cli.progress import bar
from services.cli.rolling import roll, wait_whole

TimeoutOption = Annotated[float, typer.Option(min=1, help="Seconds until everything must be whole.")]


def rolling_restart(
    folder: Annotated[Path, typer.Option(help="Folder of a running `fiq up`.")] = DEFAULT_FOLDER,
    timeout: TimeoutOption = 120.0,
) -> None:
    """Restart every process of a running `fiq up`, one after the other, each when everything is whole again.

    Stops at once when something does not come back. For containers: deploy/nats-cluster/rolling-restart.
    """
    with bar("restarting") as show:

        def tell(what: str, done: int, total: int) -> None:
            show(done / total, what)
            if what.startswith("restarting"):
                typer.echo(what, err=True)

        roll(StackFolder(folder), timeout, tell)
    typer.echo("everything was restarted, and is whole")


def wait(
    monitoring: Annotated[
        str, typer.Option(help="The nodes' monitoring ports, http://host:8222, separated by commas.")
    ] = "",
    services: Annotated[
        str, typer.Option(help="Management URLs of ingests and persisters, http://host:port, separated by commas.")
    ] = "",
    folder: Annotated[Path | None, typer.Option(help="Folder of a running `fiq up`, instead of both.")] = None,
    timeout: TimeoutOption = 120.0,
) -> None:
    """Wait until each node is healthy, every replica current, and every service ready.

    For scripts that restart nodes: as long as it waits, no other node may go.
    """
    nodes, others = _urls(monitoring), _urls(services)
    if not nodes and not others:
        try:
            members = StackFolder(folder or DEFAULT_FOLDER).read().members
        except NotRunningError as error:
            raise CommandError(f"{error}; or name what to wait for with --monitoring and --services") from error
        nodes = [member.monitoring for member in members if member.url.startswith("nats://")]
        others = [member.monitoring for member in members if not member.url.startswith("nats://")]
    wait_whole(nodes, others, timeout)
    typer.echo(f"whole: {len(nodes)} nodes, {len(others)} services")


def _urls(value: str) -> list[str]:
    return [url.strip().rstrip("/") for url in value.split(",") if url.strip()]
