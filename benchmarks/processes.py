"""The processes that are measured: nodes, ingest, persisters, reference servers; of this checkout or of another one."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.cli import monitoring
from services.cli.embedded.processes import ManagedProcess, free_ports

#: root of the repository
ROOT = Path(__file__).parents[1]
#: how long a server may take until it answers, seconds
START_SECONDS = 60.0
#: how long a process gets to stop, seconds
STOP_SECONDS = 20.0
#: room for a few backlogs on each node
MAX_FILE_STORE = "8GB"


@dataclass(frozen=True, slots=True)
class Product:
    """A checkout whose services are run.

    Attributes:
        label: what the tables call it; empty for this one.
        root: its folder.
        python: what runs it.
    """

    label: str = ""
    root: Path = ROOT
    python: str = sys.executable

    @classmethod
    def parse(cls, text: str) -> Product:
        """Return the product of ``LABEL=DIR``, or of ``DIR``, whose name is the label then."""
        label, _, folder = text.rpartition("=")
        root = Path(folder).resolve()
        python = root / ".venv" / "bin" / "python"
        if not (root / "services").is_dir():
            raise ValueError(f"{root} is no checkout: it has no folder services")
        return cls(label or root.name, root, str(python) if python.exists() else sys.executable)


#: this checkout
HERE = Product()


@dataclass(frozen=True, slots=True)
class Nodes:
    """Three nodes that run.

    Attributes:
        urls: for clients.
        pids: of the processes.
    """

    urls: list[str]
    pids: list[int]


@dataclass(frozen=True, slots=True)
class Persister:
    """A persister that runs, and the port of its metrics."""

    process: ManagedProcess
    port: int


@contextmanager
def nodes(folder: Path, product: Product = HERE) -> Iterator[Nodes]:
    """Run the embedded cluster of *product* until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [product.python, "-P", str(Path(__file__).with_name("nodes.py")), str(folder / "cluster"), MAX_FILE_STORE]
    running = ManagedProcess("nodes", command, env=_environment(product, {}), log=folder / "nodes.log")
    running.start()
    try:
        wait(lambda: running.log_tail(1).startswith("{"), running, START_SECONDS)
        yield Nodes(**json.loads(running.log_tail(1)))
    finally:
        running.stop(STOP_SECONDS)


@contextmanager
def server(
    name: str, module: str, arguments: list[str], port: int, folder: Path, product: Product = HERE, **env: str
) -> Iterator[ManagedProcess]:
    """Run an HTTP server until the block ends; it answers when the block begins."""
    with process(name, module, arguments, folder, product, **env) as running:
        wait(lambda: monitoring.get(port, "/healthz")[0] == 200, running, START_SECONDS)
        yield running


@contextmanager
def process(
    name: str, module: str, arguments: list[str], folder: Path, product: Product = HERE, **env: str
) -> Iterator[ManagedProcess]:
    """Run ``python -m module`` until the block ends; its output goes to ``<folder>/<name>.log``."""
    command = [product.python, "-P", "-m", module, *arguments]
    running = ManagedProcess(name, command, env=_environment(product, env), log=folder / f"{name}.log")
    running.start()
    try:
        yield running
    finally:
        running.stop(STOP_SECONDS)


@contextmanager
def ingest(
    url: str, folder: Path, *, partitions: int, product: Product = HERE, settings: Mapping[str, str] | None = None
) -> Iterator[tuple[ManagedProcess, int]]:
    """Run ingest until the block ends; yield it and its port.

    Its backlog has no limit unless *settings* give one: nothing drains in most measurements.
    """
    port, management = free_ports(2)
    env = {
        "FI_LOG_URL": url,
        "FI_PARTITIONS": str(partitions),
        "FI_PORT": str(port),
        "FI_MANAGEMENT_PORT": str(management),
        "FI_MAX_BACKLOG": "0",
        **(settings or {}),
    }
    with server("ingest", "services.ingest", [], management, folder, product, **env) as running:
        wait(lambda: '"INGEST_STARTED"' in running.log_tail(), running, START_SECONDS)
        yield running, port


@contextmanager
def persisters(
    url: str,
    data: Path,
    *,
    count: int = 1,
    workers: int = 1,
    partitions: int,
    store: str = "main",
    product: Product = HERE,
) -> Iterator[list[Persister]]:
    """Run *count* persisters with *workers* each over the volume *data* until the block ends; it does not wait."""
    data.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        found = []
        for number, port in enumerate(free_ports(count)):
            env = {
                "FI_LOG_URL": url,
                "FI_DATA_DIR": str(data),
                "FI_STORE": store,
                "FI_PARTITIONS": str(partitions),
                "FI_PERSISTER_PORT": str(port) if workers == 1 else "0",
            }
            name = f"persister-{store}-{number}"
            running = process(name, "services.persister", ["--workers", str(workers)], data.parent, product, **env)
            found.append(Persister(stack.enter_context(running), port))
        yield found


@contextmanager
def reference(kind: str, folder: Path) -> Iterator[tuple[ManagedProcess, int]]:
    """Run a reference server, ``empty`` or ``old``, until the block ends; yield it and its port."""
    port = free_ports(1)[0]
    arguments = [kind, str(port), str(folder / f"{kind}-{port}.h5")]
    with server(f"{kind}-{port}", "benchmarks.references", arguments, port, folder) as running:
        yield running, port


def wait_ready(one: Persister) -> None:
    """Wait until a persister says that it is ready."""
    wait(lambda: monitoring.get(one.port, "/readyz")[0] == 200, one.process, START_SECONDS)


def wait(condition: Callable[[], bool], running: ManagedProcess, timeout: float, *, poll: float = 0.02) -> None:
    """Wait until *condition*, which is looked at every *poll* seconds, is true.

    Raises:
        RuntimeError: the process ended, or the time is over.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        check(running)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{running.name} was not done within {timeout:g} s:\n{running.log_tail()}")
        time.sleep(poll)


def check(running: ManagedProcess) -> None:
    """Raise RuntimeError when a process has ended."""
    if not running.running:
        raise RuntimeError(f"{running.name} ended with code {running.exit_code}:\n{running.log_tail()}")


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the processor time that processes and their children, living and dead, have taken."""
    total = 0.0
    for pid in pids:
        family = psutil.Process(pid)
        for one in (family, *family.children(recursive=True)):
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _environment(product: Product, own: Mapping[str, str]) -> dict[str, str]:
    # settings of the shell must not change what is measured
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FI_")}
    return {**inherited, "PYTHONPATH": str(product.root), **own}
