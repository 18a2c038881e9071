"""What goes wrong between and inside containers, done to them on purpose and undone at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.compose.engine import PACE, EngineError, docker, run
from tests.support.compose.stack import Deployment
from tests.support.polling import eventually_sync

#: what a slow and lossy network needs on the host
TOOLS = ("nsenter", "tc", "iptables")


@contextmanager
def killed(deployment: Deployment, *services: str) -> Iterator[None]:
    """``kill -9`` of every container of *services*; started again at the end."""
    found = deployment.containers(*services)
    docker("kill", "-s", "KILL", *found)
    try:
        yield
    finally:
        docker("start", *found)


@contextmanager
def paused(deployment: Deployment, service: str) -> Iterator[None]:
    """A frozen container: its connections stay open and answer nothing."""
    container = deployment.container(service)
    eventually_sync(lambda: _paused(container), 30, PACE)
    try:
        yield
    finally:
        docker("unpause", container)


def _paused(container: str) -> bool:
    """Freeze *container*; on a busy machine the kernel may not manage it at once, and the engine then gives up."""
    try:
        docker("pause", container)
    except EngineError as error:
        if "unable to freeze" in str(error):
            return False
        raise
    return True


@contextmanager
def disconnected(deployment: Deployment, service: str, network: str = "log") -> Iterator[None]:
    """A container whose cable was pulled out."""
    container, name = deployment.container(service), f"{deployment.project}_{network}"
    docker("network", "disconnect", name, container)
    try:
        yield
    finally:
        docker("network", "connect", "--alias", service, name, container)


@contextmanager
def slow(deployment: Deployment, service: str, *, rate: str = "400kbit", loss: float = 0.15) -> Iterator[None]:
    """A container that sends slowly, with a queue, and loses a share of what comes to it. Needs root and TOOLS."""
    container = deployment.container(service)
    pid = docker("inspect", "--format", "{{.State.Pid}}", container).strip()
    interface = _enter(pid, "ip", "-o", "route", "show", "default").split(" dev ")[1].split()[0]
    lossy = ("INPUT", "-i", interface, "-p", "tcp", "-m", "statistic", "--mode", "random", "--probability", f"{loss}")
    queue = ("tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
    _enter(pid, "tc", "qdisc", "add", "dev", interface, "root", *queue)
    _enter(pid, "iptables", "-A", *lossy, "-j", "DROP")
    try:
        yield
    finally:
        _enter(pid, "iptables", "-D", *lossy, "-j", "DROP")
        _enter(pid, "tc", "qdisc", "del", "dev", interface, "root")


def no_slow_network() -> str | None:
    """Return why :func:`slow` cannot be done here, or None."""
    if os.geteuid() != 0:
        return "only root may change the network of a container"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"this needs {', '.join(absent)}" if absent else None


def restarts(deployment: Deployment, service: str) -> int:
    """Return how often the engine has restarted the containers of *service*."""
    counts = docker("inspect", "--format", "{{.RestartCount}}", *deployment.containers(service))
    return sum(int(count) for count in counts.split())


def crash(deployment: Deployment, service: str) -> None:
    """End the first process of each container of *service* with SIGKILL, as the kernel does when memory is short."""
    for container in deployment.containers(service):
        pid = docker("inspect", "--format", "{{.State.Pid}}", container).strip()
        try:
            run("kill", "-9", pid)
        except EngineError as error:
            raise EngineError(f"{service}: {error}") from error


def _enter(pid: str, *command: str) -> str:
    return run("nsenter", "-t", pid, "-n", *command)
