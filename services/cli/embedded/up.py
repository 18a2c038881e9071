"""``fiq up``: the whole pipeline on this machine, until Ctrl-C.

The first signal stops everything in order, the second one kills. A process that ends by itself is started again.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from services.cli import console
from services.cli.embedded.processes import ManagedProcess
from services.cli.embedded.stack import (
    DEFAULT_FOLDER,
    PREFERRED_NATS_PORT,
    PREFERRED_PORT,
    LogKind,
    Stack,
    StackFolder,
)
from services.cli.errors import ChildFailedError
from services.core.command import unknown_variables

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: how often the processes are checked, seconds
_CHECK_SECONDS = 0.1
#: pause before a process that ended more than once within _RESTART_WINDOW is started again, seconds
_RESTART_PAUSE = 1.0
#: after more ends than this within _RESTART_WINDOW seconds everything is stopped
_RESTARTS = 5
_RESTART_WINDOW = 60.0


class _StopRequested(BaseException):
    """Raised by the first signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def up(
    folder: Annotated[Path, typer.Option(help="Folder for the nodes' stores, the corpus and logs.")] = DEFAULT_FOLDER,
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the HTTP interface; 7001 by default, or a free one if that is taken."
        ),
    ] = None,
    nats_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65533, help="First of the nodes' three ports; 4222 by default, or the next free ones if taken."
        ),
    ] = None,
    log: Annotated[
        LogKind, typer.Option(help="The log: three NATS nodes, or ZeroMQ, which has no broker (docs/logs.md).")
    ] = LogKind.NATS,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser (docs/page.md).")] = False,
) -> None:
    """Run the whole pipeline on this machine until Ctrl-C.

    Runs three nats-server processes, one ingest and two persisters. A process that ends is started again: kill any of
    them and watch. The data stay in the folder; the next `fiq up` continues with them. A second Ctrl-C kills everything
    at once.
    """
    home = StackFolder(folder)
    with home.held():
        stack = Stack(folder, port=port, nats_port=nats_port, usual_nats_ports=True, log=log)
        typer.echo(f"starting {', '.join(stack.parts)} in {_shown(stack.folder)}", err=True)
        if unknown := unknown_variables(os.environ):
            typer.echo(f"no settings, so without effect: {', '.join(unknown)}", err=True)
        try:
            with _signals(stack):
                _run(stack, home, open_page=open_page)
        finally:
            home.clear()


def _run(stack: Stack, home: StackFolder, *, open_page: bool) -> None:
    try:
        _start(stack)
        home.write(stack.state())
        if stack.usual_port_taken:
            typer.echo(f"port {PREFERRED_PORT} is taken, using {stack.ingest.port}", err=True)
        if stack.usual_nats_port_taken:
            first, *_, last = (ports.client for ports in stack.cluster.ports)
            typer.echo(
                f"a port from {PREFERRED_NATS_PORT} on is taken, the nodes use {first} to {last}: a context of the "
                "`nats` command line needs  fiq nats-context  again",
                err=True,
            )
        typer.echo(_welcome(stack))
        if open_page and not webbrowser.open(_page_url(stack)):
            typer.echo(f"no browser was found: open {_page_url(stack)}", err=True)
        _watch(stack, home)
    except _StopRequested as request:
        _stop(stack, signal.Signals(request.number))
        raise typer.Exit(128 + request.number) from None
    except BaseException:
        _stop(stack, None)
        raise


def _start(stack: Stack) -> None:
    if not sys.stderr.isatty():
        stack.start(lambda name: typer.echo(f"{name} is ready", err=True))
        return
    # it takes a while to import, which the first line must not wait for
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console.err(), transient=True) as progress:
        waiting = list(stack.parts)
        task = progress.add_task(f"waiting for {waiting[0]}", total=len(waiting))

        def ready(name: str) -> None:
            waiting.remove(name)
            description = f"waiting for {waiting[0]}" if waiting else "ready"
            progress.update(task, advance=1, description=description)

        stack.start(ready)


def _stop(stack: Stack, number: signal.Signals | None) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        if number is not None:
            typer.echo(f"\n{number.name}: stopping (again to kill) …", err=True)
    killed = stack.stop()
    with contextlib.suppress(OSError):
        if killed:
            typer.echo(f"had to be killed: {', '.join(killed)}; nothing that was accepted is lost", err=True)
        if number is not None:
            typer.echo(f"stopped; the data stay in {_shown(stack.folder)}", err=True)


@contextlib.contextmanager
def _signals(stack: Stack) -> Iterator[None]:
    """Raise _StopRequested at the first signal, kill everything at the second one."""

    def kill(number: int, _: FrameType | None) -> None:
        stack.kill_all()
        os._exit(128 + number)

    def ask(number: int, _: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, kill)
        raise _StopRequested(number)

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(stack: Stack, home: StackFolder) -> None:
    ended: dict[str, list[float]] = {}
    away: dict[str, float] = {}  # when those that are not ready again ended
    while True:
        time.sleep(_CHECK_SECONDS)
        for process in stack.processes:
            if not process.running:
                away.setdefault(process.name, time.monotonic())
                _start_again(process, ended.setdefault(process.name, []))
                home.write(stack.state())
        for name in [name for name in away if stack.is_ready(name)]:
            typer.echo(f"{name} is back after {time.monotonic() - away.pop(name):.1f} s", err=True)


def _start_again(process: ManagedProcess, ended: list[float]) -> None:
    now = time.monotonic()
    ended[:] = [moment for moment in ended if now - moment < _RESTART_WINDOW]
    ended.append(now)
    how = _how_it_ended(process.exit_code or 0)
    if len(ended) > _RESTARTS:
        raise ChildFailedError(
            f"{process.name} ended {len(ended)} times within a minute, at last it {how}; all was stopped. "
            f"{process.log_end()}"
        )
    typer.echo(f"{process.name} (pid {process.pid}) {how}; starting it again", err=True)
    if len(ended) > 1:
        time.sleep(_RESTART_PAUSE)
    process.start()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed ({signal.Signals(-code).name})"
    except ValueError:  # a real-time signal
        return f"was killed (signal {-code})"


def _page_url(stack: Stack) -> str:
    """Return the URL of the page."""
    return f"{stack.ingest.url}/ui"


def _welcome(stack: Stack) -> str:
    folder, corpus = _shown(stack.folder), _shown(stack.data_dir)
    token, header = "", ""
    if stack.token_file is not None:
        token, header = _token_note(stack.token_file), ' \\\n    -H "Authorization: Bearer $FI_TOKEN"'
    option = "" if stack.folder == DEFAULT_FOLDER.absolute() else f" --folder {shlex.quote(folder)}"
    metrics = ", ".join(f"{service.name} {service.management_url}/metrics" for service in stack.services)
    pids = ", ".join(f"{member.name} {member.pid}" for member in stack.state().members)
    if stack.log is LogKind.NATS:
        address, logs = f"NATS      {stack.log_url}", f"{_shown(stack.logs)}, {_shown(stack.cluster.folder)}"
        look = (
            f"Look at the stream, with the NATS command line:\n\n  nats --server {stack.log_url} stream info fi-events"
        )
    else:
        address, logs = f"log       {stack.log_url}", _shown(stack.logs)
        look = f"Look at the partitions and their owners:\n\n  fiq status{option}"
    from fiq.corpus.wal.storage import ephemeral_file_system  # with h5py: the first line must not wait for it

    kind = ephemeral_file_system(stack.folder)
    lost = f", on {kind}: they are lost when this machine restarts or this container is removed" if kind else ""
    return f"""\
fiq is up; Ctrl-C stops it. The data stay in {folder}{lost}

  HTTP      {stack.ingest.url}
  page      {_page_url(stack)}
  API       {stack.ingest.url}/docs
  {address}
  ready?    {stack.ingest.management_url}/readyz
  metrics   {metrics}
  pids      {pids}
  corpus    {corpus}
  logs      {logs}

{token}Post an event:

  curl -i {stack.ingest.url}/consultations/c-1/events -H 'Content-Type: application/json'{header} \\
    -d '{{"event_type": "MESSAGE_RECEIVED", "payload": {{"text": "hello"}}}}'

{look}

Read the consultation, here or in Python:

  fiq show c-1{option}

  python - <<'END'
  from fiq import open_corpus
  with open_corpus({corpus!r}) as corpus:
      for event in corpus["c-1"]:
          print(event.sequence, event.received, event.payload)
  END
"""


def _token_note(tokens: Path) -> str:
    """Say how a token gets into FI_TOKEN: from the deployment that the file *tokens* is of, or a new one."""
    made = sorted((tokens.parent.parent / "clients").glob("*.token"))
    if made:
        command = f"export FI_TOKEN=$(cat {shlex.quote(_shown(made[0]))})"
    else:
        scopes = "--scopes read,write"
        command = f"export FI_TOKEN=$(fiq token new my-token {scopes} --file {shlex.quote(str(tokens))})"
    return f"Requests need a token of {tokens}:\n\n  {command}\n\n"


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
