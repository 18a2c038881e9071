"""The whole pipeline on one machine: an embedded cluster or ZeroMQ, one ingest, and persisters that share one volume.

:class:`Stack` starts and stops the processes; ``fiq up``, ``fiq demo`` and tests run it. Its folder holds ``cluster/``
(the nodes' stores and logs), ``logs/`` (the services') and ``corpus/`` (the data directory); the data stay, and another
stack on the same folder continues with them. Everything blocks; coroutines use ``asyncio.to_thread``.

:class:`StackFolder` is how other commands find a running stack: ``fiq up`` holds a lock on the folder's file ``lock``
as long as it runs, and writes ``state.json`` with addresses and process ids. A state without a locked file is stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType

import orjson

from services.cli import monitoring
from services.cli.embedded.processes import LOOPBACK, Cluster, ManagedProcess, free_ports, is_free, stop_together
from services.cli.errors import AlreadyRunningError, ChildFailedError, CommandError, NotRunningError, PortTakenError

#: where ingest listens unless another port is asked for or this one is taken
PREFERRED_PORT = 7001
#: where the first node of `fiq up` listens for clients, the others on the ports after it
PREFERRED_NATS_PORT = 4222
#: how long a service may take until it is ready, seconds
START_TIMEOUT = 60.0
#: how long a service gets to stop, seconds: FI_SHUTDOWN_GRACE and a margin
STOP_GRACE = 15.0
_PORT_TRIES = 5
_POLL = 0.05
#: longest folder of a stack that still leaves room for the names of its Unix sockets (107 bytes in all)
_LONGEST_FOLDER = 70
_IMPORT_ROOT = str(Path(__file__).absolute().parents[3])


class LogKind(StrEnum):
    """Which log a stack runs on."""

    NATS = "nats"
    ZMQ = "zmq"


@dataclass
class Service:
    """One of the pipeline's own processes and its HTTP ports.

    Attributes:
        process: runs it.
        port: of its HTTP interface; a persister has only the management endpoints.
        management_port: of the management endpoints.
        scheme: of its HTTP interface: https with a certificate.
    """

    process: ManagedProcess
    port: int
    management_port: int
    scheme: str = "http"

    @property
    def name(self) -> str:
        """Its name here and in the name of its log."""
        return self.process.name

    @property
    def url(self) -> str:
        """URL of its HTTP interface."""
        return f"{self.scheme}://{LOOPBACK}:{self.port}"

    @property
    def management_url(self) -> str:
        """URL of its management endpoints."""
        return f"http://{LOOPBACK}:{self.management_port}"

    def is_ready(self) -> bool:
        """Whether ``/readyz`` says so, of this process: another stack's may have got the port first."""
        return monitoring.ready_pid(self.management_port) == self.process.pid and self.process.running


class Stack:
    """The processes of a pipeline in one folder; a context manager that starts and stops them.

    Args:
        folder: for everything that is written.
        port: of ingest; by default 7001, or a free one when that is taken.
        nats_port: of the first node for clients, the others follow; free ones are chosen otherwise.
        usual_nats_ports: choose 4222 and the ports after it, or the next free ones, unless *nats_port* is given.
        persisters: number of persister processes.
        nodes: of the cluster: 3, or 1 for cheap tests.
        log: which log; ZeroMQ needs no cluster.
        env: settings of the services (FI_…), on top of this process's environment.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        nats_port: int | None = None,
        usual_nats_ports: bool = False,
        persisters: int = 2,
        nodes: int = 3,
        log: LogKind = LogKind.NATS,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.data_dir = self.folder / "corpus"
        self.logs = self.folder / "logs"
        self.log = log
        size = nodes if log is LogKind.NATS else 0
        self.cluster = Cluster(
            self.folder / "cluster",
            nodes=size,
            client_ports=() if nats_port is None else tuple(range(nats_port, nats_port + size)),
            usual_port=PREFERRED_NATS_PORT if usual_nats_ports and nats_port is None else None,
        )
        self._fixed_port = port
        self._count = persisters
        self._env = {**os.environ, **(env or {})}
        self.services: list[Service] = []

    @property
    def log_url(self) -> str:
        """Where the log is, in the form of FI_LOG_URL."""
        return self.cluster.url if self.log is LogKind.NATS else f"zmq+ipc://{_socket_directory(self.folder)}"

    @property
    def ingest(self) -> Service:
        """The HTTP edge."""
        return self.services[0]

    @property
    def persisters(self) -> list[Service]:
        """The persisters, by index."""
        return self.services[1:]

    @property
    def usual_port_taken(self) -> bool:
        """Whether ingest has another port than 7001, although none was asked for."""
        return self._fixed_port is None and self.ingest.port != PREFERRED_PORT

    @property
    def usual_nats_port_taken(self) -> bool:
        """Whether the nodes have other ports than 4222 and those after it, although none were asked for."""
        ports = self.cluster.ports
        return not self.cluster.client_ports and bool(ports) and ports[0].client != PREFERRED_NATS_PORT

    @property
    def token_file(self) -> Path | None:
        """File with the API tokens; None if requests need none."""
        name = self._env.get("FI_TOKEN_FILE", "").strip()
        return Path(name) if name else None

    @property
    def parts(self) -> list[str]:
        """Names of all processes, in the order in which they become ready."""
        return [*self.cluster.names, "ingest", *[f"persister-{index + 1}" for index in range(self._count)]]

    @property
    def processes(self) -> list[ManagedProcess]:
        """All processes that were started, nodes first."""
        return [*self.cluster.nodes, *[service.process for service in self.services]]

    def state(self) -> StackState:
        """Return the addresses and process ids of the running stack."""
        nodes = [
            Member(node.name, node.pid or 0, url, f"http://{LOOPBACK}:{ports.monitoring}")
            for node, url, ports in zip(self.cluster.nodes, self.cluster.urls, self.cluster.ports, strict=True)
        ]
        others = [Member(one.name, one.process.pid or 0, one.url, one.management_url) for one in self.services]
        return StackState(os.getpid(), self.log_url, self.ingest.url, str(self.data_dir), (*nodes, *others))

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, on_ready: Callable[[str], None] = lambda _: None) -> None:
        """Start everything and wait until all of it is ready; *on_ready* is called with the name of each part.

        Raises PortTakenError: the port that was asked for is taken; CommandError: the folder belongs to a stack with
        the other log; ChildFailedError: a process ended, or was not ready in time; everything is stopped again.
        """
        if self._fixed_port is not None and not is_free(self._fixed_port):
            raise PortTakenError(f"port {self._fixed_port} is taken: choose another one with --port")
        for port in self.cluster.client_ports:
            if not is_free(port):
                raise PortTakenError(f"port {port} is taken: choose others for the nodes with --nats-port")
        self._check_log()
        try:
            if self.cluster.size:
                self.cluster.start()
            for name in self.cluster.names:
                on_ready(name)
            if self.log is LogKind.ZMQ and not self.data_dir.exists():
                # a new folder: sockets outside of it are of one at its path that was deleted, and name its volume
                shutil.rmtree(_socket_directory(self.folder), ignore_errors=True)
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            self._start_services(on_ready)
        except BaseException:
            self.stop(grace=2.0)
            raise

    def is_ready(self, name: str) -> bool:
        """Whether the part *name* is: a service by its ``/readyz``, a node by its ``/healthz``."""
        for service in self.services:
            if service.name == name:
                return service.is_ready()
        ports = self.cluster.ports[self.cluster.names.index(name)]
        return monitoring.get(ports.monitoring, "/healthz")[0] == 200

    def restart(self, service: Service) -> None:
        """Start a service that ended, on its port, without waiting."""
        service.process.start()

    def wait_ready(self, service: Service, timeout: float = START_TIMEOUT) -> None:
        """Wait until *service* is ready.

        Raises PortTakenError: it could not listen; ChildFailedError: it ended, or the time is over.
        """
        self._wait_all([service], timeout)

    def stop(self, grace: float = STOP_GRACE) -> list[str]:
        """Stop ingest, then the persisters, then the nodes; return the names of services that had to be killed.

        Args:
            grace: seconds for each of the three steps.
        """
        killed = stop_together([service.process for service in self.services[:1]], grace)
        killed += stop_together([service.process for service in self.services[1:]], grace)
        self.cluster.stop_all(grace)
        return killed

    def kill_all(self) -> None:
        """Send SIGKILL to everything, without waiting; for the second Ctrl-C."""
        for process in self.processes:
            process.send(signal.SIGKILL)

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _check_log(self) -> None:
        """A corpus belongs to one log: sequences of the other one mean nothing to it. Its partitions never change."""
        # with all of services.log, which `fiq up` needs for nothing else
        from services.core.settings import load
        from services.log.settings import FORMED_FILE, LogSettings, formed_partitions

        other = {LogKind.NATS: self.data_dir / FORMED_FILE, LogKind.ZMQ: self.folder / "cluster"}[self.log]
        if other.exists():
            kind = next(kind for kind in LogKind if kind is not self.log)
            raise CommandError(f"{self.folder} belongs to a stack with --log {kind}: name that, or another --folder")
        try:
            made = formed_partitions(self.data_dir)
        except (OSError, ValueError):
            return  # the persisters say what is wrong with the file
        if made is None:
            return
        wanted = load(LogSettings, {"FI_PARTITIONS": self._env.get("FI_PARTITIONS", "")}).partitions
        if made != wanted:  # persisters would wait for another volume
            raise CommandError(f"{self.data_dir} has {made} partitions, not {wanted}: set FI_PARTITIONS={made}")

    def _start_services(self, on_ready: Callable[[str], None]) -> None:
        for attempt in range(1, _PORT_TRIES + 1):
            self.services = self._new_services()
            for service in self.services:
                service.process.start()
            try:
                self._wait_all(self.services, START_TIMEOUT, on_ready)
            except PortTakenError:
                stop_together([service.process for service in self.services], grace=2.0)
                if attempt == _PORT_TRIES or self._fixed_port is not None:
                    raise
            else:
                return

    def _wait_all(
        self, waiting: Sequence[Service], timeout: float, on_ready: Callable[[str], None] = lambda _: None
    ) -> None:
        # all at the same time: ingest is ready only when the persisters have claimed the partitions
        deadline = time.monotonic() + timeout
        while waiting:
            for service in [one for one in waiting if one.is_ready()]:
                on_ready(service.name)
                waiting = [other for other in waiting if other is not service]
            for service in waiting:
                if not service.process.running:
                    raise _ended(service.process)
            if waiting and time.monotonic() >= deadline:
                raise ChildFailedError(_not_ready(waiting[-1], timeout))
            time.sleep(_POLL)

    def _new_services(self) -> list[Service]:
        first, management, *others = free_ports(2 + self._count)
        port = self._fixed_port or (PREFERRED_PORT if is_free(PREFERRED_PORT) else first)
        addresses = {
            "FI_HOST": LOOPBACK,
            "FI_PORT": str(port),
            "FI_MANAGEMENT_HOST": LOOPBACK,
            "FI_MANAGEMENT_PORT": str(management),
        }
        persisters = [
            self._service(
                f"persister-{index + 1}",
                "services.persister",
                (other, other),
                {"FI_PERSISTER_HOST": LOOPBACK, "FI_PERSISTER_PORT": str(other)},
            )
            for index, other in enumerate(others)
        ]
        ingest = self._service("ingest", "services.ingest", (port, management), addresses)
        if self._env.get("FI_TLS_CERT", "").strip():
            ingest.scheme = "https"
        return [ingest, *persisters]

    def _service(self, name: str, module: str, ports: tuple[int, int], own: Mapping[str, str]) -> Service:
        env = {
            **self._env,
            # where fiq itself was imported from, not what is in the working directory (-P)
            "PYTHONPATH": os.pathsep.join(filter(None, [_IMPORT_ROOT, self._env.get("PYTHONPATH", "")])),
            "FI_LOG_URL": self.log_url,
            "FI_REPLICAS": str(min(3, self.cluster.size or 3)),
            "FI_DATA_DIR": str(self.data_dir),
            "FI_VOLUMES": "1",
            "FI_ALLOW_EPHEMERAL": "1",  # it is for development, and `fiq up` says where the data are
            **own,
        }
        command = [sys.executable, "-P", "-m", module]
        return Service(ManagedProcess(name, command, env=env, log=self.logs / f"{name}.log"), *ports)


def _socket_directory(folder: Path) -> Path:
    """Return a directory for Unix sockets: in *folder*, or among temporary files where that path is too long."""
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return folder / "sockets"
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"fiq-{os.getuid()}-{name}"


def _ended(process: ManagedProcess) -> ChildFailedError:
    tail = process.log_tail()
    message = f"{process.name} ended with code {process.exit_code}. {process.log_end()}"
    if "cannot listen" in tail or "address already in use" in tail.lower():
        return PortTakenError(message)
    return ChildFailedError(message)


def _not_ready(service: Service, timeout: float) -> str:
    _, body = monitoring.get(service.management_port, "/readyz")
    reason = monitoring.reasons(body)
    late = f"{service.name} was not ready within {timeout:g} s"
    return f"{late}: {reason}. {service.process.log_end()}" if reason else f"{late}. {service.process.log_end()}"


# -- How other commands find a running stack -------------------------------------------------------------------------

#: where `fiq up` keeps everything by default
DEFAULT_FOLDER = Path(".fiq")
#: a reader that checks the lock holds it for a moment: how long `up` tries to get it, seconds
_LOCK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a running stack: its name, process id, URL, and the URL of its monitoring or management port."""

    name: str
    pid: int
    url: str
    monitoring: str


@dataclass(frozen=True, slots=True)
class StackState:
    """A running ``fiq up`` (``state.json``): its process id, addresses, data directory, and processes."""

    pid: int
    log_url: str
    ingest_url: str
    data_dir: str
    members: tuple[Member, ...]

    @property
    def nodes(self) -> tuple[Member, ...]:
        """The nodes of the cluster."""
        return tuple(member for member in self.members if member.url.startswith("nats://"))

    @property
    def services(self) -> tuple[Member, ...]:
        """Ingest and the persisters."""
        return tuple(member for member in self.members if not member.url.startswith("nats://"))


class StackFolder:
    """The folder of a stack: ``./.fiq``, or the one given with ``--folder``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.corpus = path / "corpus"
        self._lock_path = path / "lock"
        self._state_path = path / "state.json"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder for the one process that runs a stack in it; make it when it is missing.

        Raises AlreadyRunningError: another process holds the lock; CommandError: the folder cannot be used.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CommandError(f"{self.path} is not a directory; name another with --folder")
        try:
            # medical data: for the owner only, and in no repository
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if stat.S_IMODE(self.path.stat().st_mode) & 0o077:  # it was made by another program
                self.path.chmod(0o700)
            if not (ignore := self.path / ".gitignore").exists():
                ignore.write_text("*\n", encoding="ascii")
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CommandError(
                f"cannot use the folder {self.path}: {error.strerror}; name another with --folder"
            ) from error
        try:
            self._lock(descriptor)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            yield
        finally:
            os.close(descriptor)

    def write(self, state: StackState) -> None:
        """Write *state*, atomically."""
        temporary = self._state_path.with_suffix(".tmp")
        temporary.write_bytes(orjson.dumps(asdict(state), option=orjson.OPT_INDENT_2) + b"\n")
        temporary.rename(self._state_path)

    def clear(self) -> None:
        """Remove the state."""
        self._state_path.unlink(missing_ok=True)

    def read(self) -> StackState:
        """Return the state of the stack that runs here. Raises NotRunningError: none runs, or it is not ready yet."""
        if not self._is_held():
            raise NotRunningError(
                f"no `fiq up` is running in {self.path.absolute()}: start it, or name the folder of one with --folder"
            )
        try:
            found = orjson.loads(self._state_path.read_bytes())
            members = tuple(Member(**member) for member in found.pop("members"))
            return StackState(**found, members=members)
        except FileNotFoundError:
            raise NotRunningError(f"the stack in {self.path} is not ready yet: wait for  fiq up") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise NotRunningError(f"{self._state_path} is damaged: stop  fiq up  and start it again") from error

    def _lock(self, descriptor: int) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                    raise AlreadyRunningError(
                        f"{self.path} is in use by process {holder or '(unknown)'}: stop that one, or name another "
                        "--folder"
                    ) from None
            time.sleep(_POLL)

    def _is_held(self) -> bool:
        try:
            descriptor = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False
