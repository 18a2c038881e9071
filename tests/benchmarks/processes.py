"""The processes that are measured: ingest, persister, reference servers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from services.cli import monitoring
from services.cli.ports import free_ports
from services.cli.processes import ManagedProcess

#: root of the repository
ROOT = Path(__file__).parents[2]
#: how long a server may take until it answers, seconds
START_SECONDS = 30.0
#: how long a process gets to stop, seconds
STOP_SECONDS = 20.0


@contextmanager
def server(
    name: str, module: str, arguments: list[str], port: int, folder: Path, **env: str
) -> Iterator[ManagedProcess]:
    """Run an HTTP server until the block ends; it answers when the block begins."""
    with process(name, module, arguments, folder, **env) as running:
        wait(lambda: monitoring.get(port, "/healthz")[0] == 200, running, START_SECONDS)
        yield running


@contextmanager
def process(name: str, module: str, arguments: list[str], folder: Path, **env: str) -> Iterator[ManagedProcess]:
    """Run ``python -m module`` until the block ends; its output goes to ``<folder>/<name>.log``."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    running = ManagedProcess(name, command, env=_environment(env), log=folder / f"{name}.log")
    running.start()
    try:
        yield running
    finally:
        running.stop(STOP_SECONDS)


@contextmanager
def ingest(url: str, folder: Path, *, partitions: int, **settings: str) -> Iterator[tuple[ManagedProcess, int]]:
    """Run ingest until the block ends; yield it and its port."""
    port, management = free_ports(2)
    ports = {"FI_PORT": str(port), "FI_MANAGEMENT_PORT": str(management)}
    # nothing drains in most measurements
    ports["FI_MAX_BACKLOG"] = "0"
    env = {"FI_NATS_URL": url, **ports, "FI_PARTITIONS": str(partitions), **settings}
    with server("ingest", "services.ingest", [], management, folder, **env) as running:
        wait(lambda: '"INGEST_STARTED"' in running.log_tail(), running, START_SECONDS)
        yield running, port


@contextmanager
def reference(kind: str, folder: Path) -> Iterator[int]:
    """Run a reference server, ``empty`` or ``old``, until the block ends; yield its port."""
    port = free_ports(1)[0]
    arguments = [kind, str(port), str(folder / f"{kind}-{port}.h5")]
    with server(f"{kind}-{port}", "tests.benchmarks.references", arguments, port, folder):
        yield port


def wait(condition: Callable[[], bool], running: ManagedProcess, timeout: float, *, poll: float = 0.02) -> None:
    """Wait until *condition*, which is looked at every *poll* seconds, is true.

    Raises:
        RuntimeError: the process ended, or the time is over.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if not running.running:
            raise RuntimeError(f"{running.name} ended with code {running.exit_code}:\n{running.log_tail()}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{running.name} was not done within {timeout:g} s:\n{running.log_tail()}")
        time.sleep(poll)


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    # settings of the shell must not change what is measured
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FI_")}
    return {**inherited, "PYTHONPATH": str(ROOT), **own}
