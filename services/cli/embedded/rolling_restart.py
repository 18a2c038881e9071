"""``fiq rolling-restart`` and ``fiq wait``: restart one process after the other; clients that retry notice nothing.

Nodes become lame ducks: they hand their leaderships over, ask their clients to leave, and end; ``fiq up`` starts them
again. The next one is not touched before every replica is current: the loss of a second node would cost the quorum.
Then the persisters, and ingest last.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from fiq.words import count
from services.cli import monitoring as probes
from services.cli.console import bar
from services.cli.embedded.stack import DEFAULT_FOLDER, Member, StackFolder
from services.cli.errors import CommandError, NotReadyError, NotRunningError

#: how long a process may take to end, seconds: `lame_duck_duration` of nats.conf and a margin
END_TIMEOUT = 60.0
_POLL = 0.1

TimeoutOption = Annotated[float, typer.Option(min=1, help="Seconds until everything must be ready.")]


def rolling_restart(
    folder: Annotated[Path, typer.Option(help="Folder of a running `fiq up`.")] = DEFAULT_FOLDER,
    timeout: TimeoutOption = 120.0,
) -> None:
    """Restart the processes of `fiq up` one after the other.

    Each one waits until everything before it is ready again. Stops at once when something does not come back. For
    containers: deploy/nats-cluster/rolling-restart.
    """
    with bar("restarting") as show:

        def on_step(what: str, fraction: float) -> None:
            show(fraction, what)
            if what.startswith("restarting"):
                typer.echo(what, err=True)

        roll(StackFolder(folder), timeout, on_step)
    typer.echo("everything was restarted and is ready")


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

    For scripts that restart nodes: do not restart another node before it returns.
    """
    nodes, others = _urls(monitoring), _urls(services)
    if not nodes and not others:
        try:
            state = StackFolder(folder or DEFAULT_FOLDER).read()
        except NotRunningError as error:
            raise CommandError(f"{error}; or name what to wait for with --monitoring and --services") from error
        nodes, others = _monitoring(state.nodes), _monitoring(state.services)
    wait_ready(nodes, others, timeout)
    typer.echo(f"ready: {count(len(nodes), 'node')}, {count(len(others), 'service')}")


def _urls(value: str) -> list[str]:
    return [url.strip().rstrip("/") for url in value.split(",") if url.strip()]


def _monitoring(members: Sequence[Member]) -> list[str]:
    return [member.monitoring for member in members]


def wait_ready(nodes: Sequence[str], services: Sequence[str], timeout: float) -> None:
    """Wait until the cluster survives the loss of any node, and all services are ready.

    Args:
        nodes: URLs of the nodes' monitoring ports.
        services: management URLs of ingests and persisters.
        timeout: seconds.

    Raises NotReadyError: it was not in time; the message says what is missing.
    """
    deadline = time.monotonic() + timeout
    while reasons := _missing(nodes, services):
        if time.monotonic() >= deadline:
            raise NotReadyError(f"not ready within {timeout:g} s: {'; '.join(reasons)}")
        time.sleep(_POLL)


def _missing(nodes: Sequence[str], services: Sequence[str]) -> list[str]:
    reasons = probes.problems([probes.view(url) for url in nodes])
    for url in services:
        status, body = probes.get(url, "/readyz")
        if status != 200:
            reason = probes.reasons(body) or (f"/readyz answers {status}" if status else "no answer")
            reasons.append(f"{url} is not ready: {reason}")
    return reasons


def roll(home: StackFolder, timeout: float, on_step: Callable[[str, float], None]) -> None:
    """Restart nodes, persisters and ingest of the stack that runs in *home*, one after the other.

    Args:
        home: folder of a running ``fiq up``.
        timeout: seconds that the stack gets after each restart until it is ready again.
        on_step: called before each step with what is done and the fraction that is done already.

    Raises NotRunningError: no stack runs there; NotReadyError: the stack was not ready before, or did not get ready
    again, and nothing more was restarted; CommandError: a process could not be asked, or did not end.
    """
    state = home.read()
    # ingest last: while persisters change hands it goes on accepting events
    order = [*state.nodes, *sorted(state.services, key=lambda one: one.name == "ingest")]
    urls = _monitoring(state.nodes), _monitoring(state.services)
    wait_ready(*urls, timeout)
    for number, member in enumerate(order):
        on_step(f"restarting {member.name}", number / len(order))
        _restart(home, member, signal.SIGUSR2 if member in state.nodes else signal.SIGTERM)
        on_step(f"waiting for {member.name}", number / len(order))
        wait_ready(*urls, timeout)
    on_step("done", 1.0)


def _restart(home: StackFolder, member: Member, number: signal.Signals) -> None:
    """Ask a process to end, and wait until ``fiq up`` has started another one in its place."""
    process = f"{member.name} (pid {member.pid})"
    try:
        os.kill(member.pid, number)
    except ProcessLookupError:
        raise NotReadyError(f"{process} ended by itself: look at its log, then try again") from None
    except PermissionError:
        raise CommandError(f"{process} runs as another user: run this command as that user") from None
    deadline = time.monotonic() + END_TIMEOUT
    while _pid(home, member.name) in {member.pid, None}:
        if time.monotonic() >= deadline:
            raise NotReadyError(f"{process} did not end within {END_TIMEOUT:g} s of {number.name}")
        time.sleep(_POLL)


def _pid(home: StackFolder, name: str) -> int | None:
    try:
        return next((member.pid for member in home.read().members if member.name == name), None)
    except NotRunningError as error:
        raise NotReadyError(f"`fiq up` ended while {name} was restarted: {error}") from error
