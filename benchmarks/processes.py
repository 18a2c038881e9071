"""The processes that are measured, of this checkout or of another one, and the machine that they run on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import h5py
import psutil

from benchmarks.results import middle
from services.cli import monitoring
from services.cli.embedded.processes import ManagedProcess, find_nats_server, free_ports

_SYNCS = 100


def describe(folder: Path) -> dict[str, str]:
    """Return what a reader needs to judge the figures; *folder* is on the disk that is used."""
    libraries = ("nats-py", "aiohttp", "uvloop", "h5py")
    return {
        "processor": f"{os.cpu_count()} cores of {_cpu_model()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "disk": f"fdatasync of 4 KiB takes {_sync_ms(folder):.2f} ms (median)",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "HDF5": h5py.version.hdf5_version,
        "nats-server": _nats_server_version(),
        **{library: version(library) for library in libraries},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _nats_server_version() -> str:
    done = subprocess.run([find_nats_server(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.rpartition("v")[2].strip()


def _sync_ms(folder: Path) -> float:
    path = folder / "sync"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        times = []
        for number in range(_SYNCS):
            os.pwrite(descriptor, os.urandom(4096), 4096 * number)
            started = time.perf_counter()
            os.fdatasync(descriptor)
            times.append((time.perf_counter() - started) * 1000)
        return middle(times)
    finally:
        os.close(descriptor)
        path.unlink()


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
    # the checkout's own script: it knows where its cluster is
    folders = ("benchmarks", "tests/benchmarks")
    script = next(p for p in (product.root / name / "nodes.py" for name in folders) if p.exists())
    command = [product.python, "-P", str(script), str(folder / "cluster"), MAX_FILE_STORE]
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
        **_log(url),
        "FI_PARTITIONS": str(partitions),
        "FI_PORT": str(port),
        "FI_MANAGEMENT_PORT": str(management),
        "FI_MAX_BACKLOG": "0",
        "FI_NEW_CONSULTATIONS_RATE": "0",
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
                **_log(url),
                "FI_DATA_DIR": str(data),
                "FI_ALLOW_EPHEMERAL": "1",
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
    with server(f"{kind}-{port}", "benchmarks.peers", arguments, port, folder) as running:
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


def _log(url: str) -> dict[str, str]:
    return {"FI_LOG_URL": url, "FI_NATS_URL": url}  # the second one is what checkouts until 2026-11-27 read


def _environment(product: Product, own: Mapping[str, str]) -> dict[str, str]:
    # settings of the shell must not change what is measured
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FI_")}
    return {**inherited, "PYTHONPATH": str(product.root), **own}
