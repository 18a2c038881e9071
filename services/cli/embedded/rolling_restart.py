"""``fiq rolling-restart`` and ``fiq wait``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from services.cli.console import bar
from services.cli.errors import CommandError, NotRunningError, NotWholeError
from services.cli.monitoring import ask, view_at, whole
from services.cli.target import DEFAULT_FOLDER, Member, StackFolder

#: how long an end may take, seconds: `lame_duck_duration` of nats.conf and some more; a service finishes what it has
END_PATIENCE = 60.0
_POLL = 0.1

#: told before each step: what is done, and how many steps of how many are behind
OnStep = Callable[[str, int, int], None]
TimeoutOption = Annotated[float, typer.Option(min=1, help="Seconds until everything must be whole.")]


def rolling_restart(
    folder: Annotated[Path, typer.Option(help="Folder of a running `fiq up`.")] = DEFAULT_FOLDER,
    timeout: TimeoutOption = 120.0,
) -> None:
    """Restart the processes of `fiq up` one after the other.

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
    """Wait until nodes, replicas and services are ready.

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


# -- Restarts what a ``fiq up`` runs, one process after the other, so that clients who retry once notice nothing -----
#
# Nodes are asked to become lame ducks: they hand their leaderships over, ask their clients to leave, and end. The next
# one is not touched before the cluster is whole again: the loss of a second node would cost the quorum.


def wait_whole(nodes: Sequence[str], services: Sequence[str], timeout: float) -> None:
    """Wait until the cluster is whole and all services are ready.

    Args:
        nodes: URLs of the nodes' monitoring ports.
        services: management URLs of ingests and persisters.
        timeout: seconds for everything.

    Raises NotWholeError: it was not in time; the message says what is missing.
    """
    deadline = time.monotonic() + timeout
    while reasons := _missing(nodes, services):
        if time.monotonic() >= deadline:
            raise NotWholeError(f"not whole within {timeout:g} s: {'; '.join(reasons)}")
        time.sleep(_POLL)


def _missing(nodes: Sequence[str], services: Sequence[str]) -> list[str]:
    reasons = whole([view_at(url) for url in nodes])
    for url in services:
        status, body = ask(url, "/readyz")
        if status != 200:
            said = body.decode("utf-8", "replace").strip()[:300] or "no answer"
            reasons.append(f"{url} is not ready: {said}")
    return reasons


def roll(home: StackFolder, timeout: float, on_step: OnStep) -> None:
    """Restart nodes, persisters and ingest of the stack that runs in *home*, one after the other.

    Args:
        home: folder of a running ``fiq up``, which starts again what ends.
        timeout: seconds that the stack gets after each restart until it is whole again.
        on_step: told before each step.

    Raises NotRunningError: nothing runs there; NotWholeError: the stack was not whole before, or did not get whole
    again; nothing more was restarted; CommandError: a process could not be asked, or did not end.
    """
    members = home.read().members
    nodes = [member for member in members if member.url.startswith("nats://")]
    services = [member for member in members if member not in nodes]
    # what takes events last: while persisters change hands nothing is refused
    order = [
        *nodes,
        *(one for one in services if one.name != "ingest"),
        *(one for one in services if one.name == "ingest"),
    ]
    urls = [node.monitoring for node in nodes], [service.monitoring for service in services]
    wait_whole(*urls, timeout)
    for number, member in enumerate(order):
        on_step(f"restarting {member.name}", number, len(order))
        _restart(home, member, signal.SIGUSR2 if member in nodes else signal.SIGTERM)
        on_step(f"waiting for {member.name}", number, len(order))
        wait_whole(*urls, timeout)
    on_step("done", len(order), len(order))


def _restart(home: StackFolder, member: Member, number: signal.Signals) -> None:
    """Ask a process to end, and wait until ``fiq up`` has started another one in its place."""
    try:
        os.kill(member.pid, number)
    except ProcessLookupError:
        raise NotWholeError(
            f"{member.name} (pid {member.pid}) ended by itself: look at its log, then try again"
        ) from None
    except PermissionError:
        raise CommandError(f"{member.name} (pid {member.pid}) runs as another user: be that one") from None
    deadline = time.monotonic() + END_PATIENCE
    while _pid(home, member.name) in {member.pid, None}:
        if time.monotonic() >= deadline:
            raise NotWholeError(
                f"{member.name} (pid {member.pid}) did not end within {END_PATIENCE:g} s of {number.name}"
            )
        time.sleep(_POLL)


def _pid(home: StackFolder, name: str) -> int | None:
    try:
        return next((member.pid for member in home.read().members if member.name == name), None)
    except NotRunningError as error:
        raise NotWholeError(f"`fiq up` ended while {name} was restarted: {error}") from error
