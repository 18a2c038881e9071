"""The whole pipeline on one machine: an embedded cluster, one ingest, two persisters that share one volume."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import services
from services.cli import monitoring
from services.cli.embedded.cluster import Cluster
from services.cli.embedded.processes import LOOPBACK, ManagedProcess, free_ports, is_free
from services.cli.errors import ChildFailedError, PortTakenError

#: where ingest listens when nothing else is asked for and nobody else is there
PREFERRED_PORT = 7001
#: how long a service may take until it is ready, seconds
START_TIMEOUT = 60.0
#: how long a service gets to stop, seconds: what FI_SHUTDOWN_GRACE gives it, and some more
STOP_GRACE = 15.0
_PORT_TRIES = 5
_POLL = 0.05


@dataclass
class Service:
    """One of the pipeline's own processes and its HTTP ports.

    Attributes:
        process: runs it.
        port: of its HTTP interface; a persister has none but the management endpoints.
        management_port: of the management endpoints.
    """

    process: ManagedProcess
    port: int
    management_port: int

    @property
    def name(self) -> str:
        """What it is called here and in its log's name."""
        return self.process.name

    @property
    def url(self) -> str:
        """Where its HTTP interface is."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def management_url(self) -> str:
        """Where its management endpoints are."""
        return f"http://{LOOPBACK}:{self.management_port}"

    def is_ready(self) -> bool:
        """Whether ``/readyz`` says so, of this process: another stack's may have got the port first."""
        return monitoring.ready_pid(self.management_port) == self.process.pid and self.process.running


class Stack:
    """Everything in one folder: ``cluster/`` (stores, logs), ``logs/``, ``corpus/`` (the data directory).

    The data stay; a stack on the same folder goes on with them. Everything blocks; coroutines call it through
    ``asyncio.to_thread``. A context manager that starts and stops.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        persisters: int = 2,
        nodes: int = 3,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Describe a stack; nothing is started.

        Args:
            folder: for everything that is written.
            port: of ingest; by default 7001, or a free one when that is taken.
            persisters: number of persister processes.
            nodes: of the cluster: 3, or 1 for cheap tests.
            env: settings of the services (FI_…), on top of this process's environment.
        """
        self.folder = folder.absolute()
        self.cluster = Cluster(self.folder / "cluster", nodes=nodes)
        self._fixed_port = port
        self._count = persisters
        self._env = {**os.environ, **(env or {})}
        self.services: list[Service] = []

    # -- parts --------------------------------------------------------------------------------------------------------

    @property
    def data_dir(self) -> Path:
        """The data directory of the persisters' volume."""
        return self.folder / "corpus"

    @property
    def logs(self) -> Path:
        """The folder of the services' logs."""
        return self.folder / "logs"

    @property
    def ingest(self) -> Service:
        """The HTTP edge."""
        return self.services[0]

    @property
    def displaced(self) -> bool:
        """Whether ingest had to take another port than the usual one."""
        return self._fixed_port is None and self.ingest.port != PREFERRED_PORT

    @property
    def persisters(self) -> list[Service]:
        """The persisters, by index."""
        return self.services[1:]

    @property
    def parts(self) -> list[str]:
        """Names of all processes, in the order in which they become ready."""
        return [*self.cluster.names, "ingest", *[f"persister-{index + 1}" for index in range(self._count)]]

    @property
    def processes(self) -> list[ManagedProcess]:
        """All processes that were started, nodes first."""
        return [*self.cluster.nodes, *[service.process for service in self.services]]

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self, on_ready: Callable[[str], None] = lambda _: None) -> None:
        """Start everything and wait until all of it is ready; *on_ready* is called with the name of each part.

        Raises PortTakenError: the port that was asked for is taken; ChildFailedError: a process ended, or was not ready
        in time; everything is stopped again.
        """
        if self._fixed_port is not None and not is_free(self._fixed_port):
            raise PortTakenError(f"port {self._fixed_port} is taken: choose another one")
        try:
            self.cluster.start()
            for name in self.cluster.names:
                on_ready(name)
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            self._start_services(on_ready)
        except BaseException:
            self.stop(grace=2.0)
            raise

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
        killed = _stop_together([service.process for service in self.services[:1]], grace)
        killed += _stop_together([service.process for service in self.services[1:]], grace)
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

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _start_services(self, on_ready: Callable[[str], None]) -> None:
        for attempt in range(1, _PORT_TRIES + 1):
            self.services = self._describe()
            for service in self.services:
                service.process.start()
            try:
                self._wait_all(self.services, START_TIMEOUT, on_ready)
            except PortTakenError:
                _stop_together([service.process for service in self.services], grace=2.0)
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

    def _describe(self) -> list[Service]:
        first, management, *others = free_ports(2 + self._count)
        port = self._fixed_port or (PREFERRED_PORT if is_free(PREFERRED_PORT) else first)
        addresses = {
            "FI_HOST": LOOPBACK,
            "FI_PORT": str(port),
            "FI_MANAGEMENT_HOST": LOOPBACK,
            "FI_MANAGEMENT_PORT": str(management),
        }
        ingest = self._service("ingest", "services.ingest", (port, management), addresses)
        persisters = [
            self._service(
                f"persister-{index + 1}",
                "services.persister",
                (other, other),
                {"FI_PERSISTER_HOST": LOOPBACK, "FI_PERSISTER_PORT": str(other)},
            )
            for index, other in enumerate(others)
        ]
        return [ingest, *persisters]

    def _service(self, name: str, module: str, ports: tuple[int, int], own: Mapping[str, str]) -> Service:
        env = {
            **self._env,
            # where fiq itself was imported from, and not whatever the working directory holds (-P)
            "PYTHONPATH": os.pathsep.join(filter(None, [_IMPORT_ROOT, self._env.get("PYTHONPATH", "")])),
            "FI_LOG_URL": self.cluster.url,
            "FI_REPLICAS": str(min(3, self.cluster.size)),
            "FI_DATA_DIR": str(self.data_dir),
            "FI_VOLUMES": "1",
            **own,
        }
        command = [sys.executable, "-P", "-m", module]
        return Service(ManagedProcess(name, command, env=env, log=self.logs / f"{name}.log"), *ports)


_IMPORT_ROOT = str(Path(services.__path__[0]).absolute().parent)


def _ended(process: ManagedProcess) -> ChildFailedError:
    tail = process.log_tail()
    message = f"{process.name} ended with code {process.exit_code}:\n{tail}"
    if "cannot listen" in tail or "address already in use" in tail.lower():
        return PortTakenError(message)
    return ChildFailedError(message)


def _not_ready(service: Service, timeout: float) -> str:
    _, body = monitoring.get(service.management_port, "/readyz")
    said = body.decode("utf-8", "replace") or service.process.log_tail(3)
    return f"{service.name} was not ready within {timeout:g} s: {said}\nits log is {service.process.log}"


def _stop_together(processes: list[ManagedProcess], grace: float) -> list[str]:
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
