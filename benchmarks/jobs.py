"""What the measuring process asks of the loading one, and what it gets back."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import orjson

from benchmarks.processes import ROOT

#: seconds that the start of a process and its connections may take, on top of its work
_START_SECONDS = 30.0
#: what the loading process writes when it is connected, and waits for before it begins
READY, GO = b"ready\n", b"go\n"


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Clients that each send the next event when the last one is accepted.

    Attributes:
        target: port of an HTTP server, or URL of a node.
        clients: how many at the same time.
        seconds: how long it is measured.
        warm_up: seconds before that.
        limit: requests at most.
        folder: where the dialogues are.
        consultations: how many are open at the same time.
        name: what the consultations' names begin with; another one for each load of the same server.
        pause: seconds between an answer and the next request of the same client.
    """

    target: str
    clients: int
    seconds: float
    warm_up: float
    limit: int
    folder: str
    consultations: int
    name: str = "bench"
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class PullJob:
    """A consumer a partition, whose messages are thrown away.

    Attributes:
        url: of a node.
        consumers: names of the durable consumers, which exist.
        events: how many there are in all.
        pull_events: messages that one request asks for.
        pull_bytes: the same in bytes.
        ack_events: every so many messages, and at the end, the last one is acknowledged.
    """

    url: str
    consumers: list[str]
    events: int
    pull_events: int
    pull_bytes: int
    ack_events: int


@dataclass(frozen=True, slots=True)
class AppendJob:
    """Events of a backlog, appended and flushed one by one.

    Attributes:
        path: of the HDF5 file, which is created.
        events: how many.
        spread: consultations that 500 events touch.
        folder: where the dialogues are.
    """

    path: str
    events: int
    spread: int
    folder: str


@dataclass(frozen=True, slots=True)
class Report:
    """What the process did.

    Attributes:
        seconds: the time that was measured.
        events: done in it.
        failures: requests that were not accepted, in and before it.
        latencies_us: of each request, in microseconds; empty where that means nothing.
        accepted: events that were accepted in and before it.
        begin_ns: when the measured time began, nanoseconds since the epoch.
        last_ns: when the last event was accepted.
        cpu_seconds: processor time that the load itself took.
    """

    seconds: float
    events: int
    failures: int = 0
    latencies_us: list[int] = field(default_factory=list)
    accepted: int = 0
    begin_ns: int = 0
    last_ns: int = 0
    cpu_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.events / self.seconds if self.seconds else 0.0


def run(
    kind: str,
    job: LoadJob | PullJob | AppendJob,
    *,
    seconds: float,
    on_ready: Callable[[], None] = lambda: None,
) -> Report:
    """Do *job* in a process of its own.

    Args:
        kind: http, publish, batch, bare_batch, pull or append.
        job: what to do.
        seconds: that it may take at most, besides starting.
        on_ready: called when the process is connected, just before it begins.

    Raises:
        RuntimeError: it failed; the message holds what it said.
    """
    timeout = seconds + _START_SECONDS
    order = orjson.dumps({"kind": kind, "job": asdict(job), "timeout": timeout}) + b"\n"
    command = [sys.executable, "-m", "benchmarks.agent"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(order)
            process.stdin.flush()
            answer = b""
            if process.stdout.readline() == READY:
                on_ready()
                process.stdin.write(GO)
                process.stdin.flush()
                answer = process.stdout.read()
            code = process.wait(timeout + 10)
        except BaseException:
            process.kill()
            raise
        if code != 0:
            errors.seek(0)
            raise RuntimeError(f"the {kind} process failed: {errors.read().decode('utf-8', 'replace')[-2000:]}")
    return Report(**orjson.loads(answer))
