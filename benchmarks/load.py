"""The load, in a process of its own: ``python -m benchmarks.load`` takes a job on stdin, JSON both ways."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import nats
import orjson
import uvloop
from nats.aio.msg import Msg

from benchmarks import dialogues, peers
from benchmarks.processes import ROOT
from services.cli.embedded.processes import LOOPBACK
from services.log.jetstream.publisher import BATCH_COMMIT_HEADER, BATCH_ID_HEADER, BATCH_SEQUENCE_HEADER
from services.log.jetstream.stream import subject_of

#: events of a batch: the most that a batch may have
BATCH_EVENTS = 1000
#: called when everything is prepared; returns when the load is to begin
Meet = Callable[[], None]
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
        rate: requests a second of all clients (kind http only), also while earlier ones are not answered, as long as a
            client is free; a latency begins when the request was due. 0 is as fast as the answers come.
        busiest: how many consultations get a tenth of the events each; :func:`busiest` has their names.
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
    rate: float = 0.0
    busiest: int = 0


def busiest(name: str, count: int) -> list[str]:
    """Return the names of the *count* consultations of the load *name* that get a tenth of its events each."""
    return [f"{name}-busiest-{number}" for number in range(count)]


@dataclass(frozen=True, slots=True)
class Report:
    """What the process did.

    Attributes:
        seconds: the time that was measured.
        events: done in it.
        failures: requests that were not accepted, in and before it.
        refusals: status and problem of the answers that accepted nothing, and how many there were of each.
        latencies_us: of each request, in microseconds; empty where that means nothing.
        accepted: events that were accepted in and before it.
        begin_ns: when the measured time began, nanoseconds since the epoch.
        last_ns: when the last event was accepted.
        cpu_seconds: processor time that the load itself took.
    """

    seconds: float
    events: int
    failures: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
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
    job: LoadJob,
    *,
    seconds: float,
    on_ready: Callable[[], None] = lambda: None,
) -> Report:
    """Do *job* in a process of its own.

    Args:
        kind: http, publish, batch or bare_batch.
        job: what to do.
        seconds: that it may take at most, besides starting.
        on_ready: called when the process is connected, just before it begins.

    Raises:
        RuntimeError: it failed; the message holds what it said.
    """
    timeout = seconds + _START_SECONDS
    order = orjson.dumps({"kind": kind, "job": asdict(job), "timeout": timeout}) + b"\n"
    command = [sys.executable, "-m", "benchmarks.load"]
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


class Tally:
    """Answers of one load: those of the measured time with their latencies, all of them by number.

    Args:
        job: says how long and how many.
        events: that one request carries.
    """

    def __init__(self, job: LoadJob, *, events: int = 1) -> None:
        self._job = job
        self._events = events
        self._latencies: list[int] = []
        self._sent = self._accepted = self._failures = 0
        self._refusals: Counter[str] = Counter()
        self._start = self._begin = self._end = 0.0
        self._begin_ns = self._last_ns = 0
        self._cpu = 0.0

    def start(self) -> None:
        """Begin the warm-up."""
        self._start = time.perf_counter()
        self._begin = self._start + self._job.warm_up
        self._begin_ns = time.time_ns() + int(self._job.warm_up * 1e9)
        self._end = self._begin + self._job.seconds
        self._cpu = time.process_time()

    def more(self) -> bool:
        """Whether another request is to be sent; counts it."""
        if self._sent >= self._job.limit or max(time.perf_counter(), self._due()) >= self._end:
            return False
        self._sent += 1
        return True

    def wait(self) -> float:
        """Return the seconds until the next request is due; negative when it is late."""
        return self._due() - time.perf_counter() if self._job.rate else 0.0

    def _due(self) -> float:
        return self._start + self._sent / self._job.rate if self._job.rate else 0.0

    def count(self, started: float, *, accepted: bool) -> None:
        """Count the answer to a request that was sent at *started*."""
        done = time.perf_counter()
        if not accepted:
            self._failures += 1
            return
        self._accepted += 1
        self._last_ns = time.time_ns()
        if self._begin <= done <= self._end:
            self._latencies.append(round((done - started) * 1e6))

    def refuse(self, started: float, answer: bytes) -> None:
        """Count *answer*, which accepted nothing, to a request sent at *started*, under its status and problem."""
        self.count(started, accepted=False)
        _, _, body = answer.partition(_HEAD_END)
        try:
            problem = str(orjson.loads(body)["type"]).rpartition("/")[2]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            problem = "without a problem's type"
        self._refusals[f"{answer_status(answer)} {problem}"] += 1

    def report(self) -> Report:
        """Return what was counted, now that all requests are answered."""
        return Report(
            seconds=min(time.perf_counter(), self._end) - self._begin,
            events=len(self._latencies) * self._events,
            failures=self._failures,
            refusals=dict(self._refusals),
            latencies_us=self._latencies,
            accepted=self._accepted * self._events,
            begin_ns=self._begin_ns,
            last_ns=self._last_ns,
            cpu_seconds=time.process_time() - self._cpu,
        )


_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length:"
_ACCEPTED = 202


class Connection(asyncio.Protocol):
    """One client: it sends the next request when the last one is answered."""

    def __init__(self, requests: Iterator[bytes], tally: Tally, pause: float) -> None:
        self._requests = requests
        self._tally = tally
        self._pause = pause
        self._buffer = b""
        self._started = 0.0
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()

    def send(self) -> None:
        """Send the next request, or end when there is to be none."""
        if self.done.done() or self._transport is None:
            return
        wait = self._tally.wait()
        if not self._tally.more():
            self.done.set_result(None)
            return
        self._started = time.perf_counter() + wait
        if wait > 0:
            self._loop.call_later(wait, self._write)
        else:
            self._write()

    def _write(self) -> None:
        if not self.done.done() and self._transport is not None:
            self._transport.write(next(self._requests))

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take note of the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses

    def data_received(self, data: bytes) -> None:
        """Count the answer and send the next request, or wait for the rest of the answer."""
        if self._buffer:
            data = self._buffer + data
        status = answer_status(data)
        if not status:
            self._buffer = data
            return
        self._buffer = b""
        if status == _ACCEPTED:
            self._tally.count(self._started, accepted=True)
        else:
            self._tally.refuse(self._started, data)
        if self._pause:
            self._loop.call_later(self._pause, self.send)
        else:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the load: a server that is measured keeps its connections."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionResetError("the server closed the connection"))


def answer_status(data: bytes) -> int:
    """Return the status of the answer that *data* holds, or 0 as long as it is not complete."""
    head_end = data.find(_HEAD_END)
    if head_end < 0:
        return 0
    head = data[: head_end + 2].lower()
    place = head.find(_LENGTH)
    length = int(head[place + len(_LENGTH) : head.index(b"\r\n", place)]) if place >= 0 else 0
    return int(data[9:12]) if len(data) >= head_end + len(_HEAD_END) + length else 0


async def post_all(
    port: int, clients: int, requests: Iterator[bytes], tally: Tally, start: Callable[[], None], *, pause: float = 0.0
) -> None:
    """Let *clients* connections post until *tally* says that it is enough.

    Args:
        port: of the server, on loopback.
        clients: how many connections.
        requests: complete ones, without end.
        tally: counts the answers.
        start: called when all are connected and before the first one sends.
        pause: seconds between an answer and the next request of the same client.
    """
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(lambda: Connection(requests, tally, pause), LOOPBACK, port))[1]
        for _ in range(clients)
    ]
    try:
        start()
        for connection in connections:
            connection.send()
        await asyncio.gather(*(connection.done for connection in connections))
    finally:
        for connection in connections:
            connection.close()


def post(port: int, consultation: str, key: str, body: bytes) -> bytes:
    """Return the request that posts *body* to *consultation*."""
    return _request(port, f"/consultations/{consultation}/events", "application/json", key, body)


def post_batch(port: int, consultation: str, key: str, body: bytes) -> bytes:
    """Return the request that posts *body*, a line an event, to *consultation*."""
    return _request(port, f"/consultations/{consultation}/events/batch", "application/x-ndjson", key, body)


def _request(port: int, path: str, kind: str, key: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\n"
        f"Content-Type: {kind}\r\nIdempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def over_http(job: LoadJob, meet: Meet) -> Report:
    """Post to a server, each client over a connection of its own, each event with a fresh key."""
    port, tally = int(job.target), Tally(job)
    requests = (
        post(port, consultation, key, body) for key, (consultation, body) in zip(_keys(), _posts(job), strict=True)
    )

    def start() -> None:
        meet()
        tally.start()

    await post_all(port, job.clients, requests, tally, start, pause=job.pause)
    return tally.report()


async def over_nats(job: LoadJob, meet: Meet) -> Report:
    """Publish with nats-py to a bare R3 file stream, all clients over one connection, all answers to one inbox."""
    tally, posts, keys = Tally(job), _posts(job), _keys()
    connection = await nats.connect(job.target, name="bench publish")
    await peers.prepare(connection.jetstream())
    inbox = connection.new_inbox()
    waiting: dict[str, asyncio.Future[bool]] = {}

    async def answered(message: Msg) -> None:
        waiting.pop(message.subject).set_result(b'"error"' not in message.data)

    async def client() -> None:
        while tally.more():
            key, (consultation, body) = next(keys), next(posts)
            reply = f"{inbox}.{key}"
            answer = waiting[reply] = asyncio.get_running_loop().create_future()
            started = time.perf_counter()
            headers = {"Nats-Msg-Id": f"{consultation}/{key}"}
            await connection.publish(f"plain.{consultation}", body, reply=reply, headers=headers)
            tally.count(started, accepted=await answer)
            if job.pause:
                await asyncio.sleep(job.pause)

    try:
        await connection.subscribe(f"{inbox}.*", cb=answered)
        await connection.flush()
        meet()
        tally.start()
        await asyncio.gather(*(client() for _ in range(job.clients)))
    finally:
        await connection.close()
    return tally.report()


async def batches_over_http(job: LoadJob, meet: Meet) -> Report:
    """Post NDJSON, each client over a connection of its own, each batch under a key of its own."""
    port, tally = int(job.target), Tally(job, events=BATCH_EVENTS)
    requests = (
        post_batch(port, consultation, str(uuid4()), b"\n".join(bodies))
        for consultation, bodies in _batches(dialogues.load(Path(job.folder)))
    )

    def start() -> None:
        meet()
        tally.start()

    await post_all(port, job.clients, requests, tally, start)
    return tally.report()


async def batches_over_nats(job: LoadJob, meet: Meet) -> Report:
    """Publish atomic batches with nats-py as it is: a publish for each message, a request for the last one."""
    connection = await nats.connect(job.target, name="bench batch", pending_size=64 * 2**20)

    async def send(consultation: str, bodies: list[bytes]) -> bool:
        batch, subject = uuid4().hex, subject_of(consultation)
        headers: dict[str, str] = {}
        for number, body in enumerate(bodies, start=1):
            headers = {
                BATCH_ID_HEADER: batch,
                BATCH_SEQUENCE_HEADER: str(number),
                "Nats-Msg-Id": f"{consultation}/{uuid4()}",
            }
            if number < len(bodies):
                await connection.publish(subject, body, headers=headers)
        last = headers | {BATCH_COMMIT_HEADER: "1"}
        try:
            answer = await connection.request(subject, bodies[-1], timeout=10, headers=last)
        except (nats.errors.Error, OSError):
            return False
        return int(orjson.loads(answer.data).get("count", 0)) == len(bodies)

    tally, posts = Tally(job, events=BATCH_EVENTS), _batches(dialogues.load(Path(job.folder)))

    async def client() -> None:
        while tally.more():
            consultation, bodies = next(posts)
            started = time.perf_counter()
            tally.count(started, accepted=await send(consultation, bodies))

    try:
        meet()
        tally.start()
        await asyncio.gather(*(client() for _ in range(job.clients)))
    finally:
        await connection.close()
    return tally.report()


def _batches(source: dialogues.Dialogues) -> Iterator[tuple[str, list[bytes]]]:
    """Yield consultation and bodies of a batch without end; each batch is another consultation."""
    bodies = itertools.cycle(source.bodies)
    for number in itertools.count():
        yield f"bench-{number:07d}", list(itertools.islice(bodies, BATCH_EVENTS))


def _keys() -> Iterator[str]:
    run = uuid4().hex
    return (f"{run}-{number}" for number in itertools.count())


def _posts(job: LoadJob) -> Iterator[tuple[str, bytes]]:
    posts = dialogues.posts(dialogues.load(Path(job.folder)), job.consultations, job.name)
    return dialogues.with_busiest(posts, busiest(job.name, job.busiest))


_WORK: dict[str, Callable[[LoadJob, Meet], Awaitable[Report]]] = {
    "http": over_http,
    "publish": over_nats,
    "batch": batches_over_http,
    "bare_batch": batches_over_nats,
}


async def _do(order: dict[str, Any]) -> Report:
    async with asyncio.timeout(order["timeout"]):
        return await _WORK[order["kind"]](LoadJob(**order["job"]), _meet)


def _meet() -> None:
    """Say that everything is prepared, and wait for the word to begin."""
    gc.collect()
    gc.freeze()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    if sys.stdin.buffer.readline() != GO:
        raise RuntimeError("the measuring process is gone")


def main() -> None:
    """Read the order, print the report."""
    report = uvloop.run(_do(orjson.loads(sys.stdin.buffer.readline())))
    os.set_blocking(sys.stdout.fileno(), True)  # a long report does not fit into the pipe at once
    with open(sys.stdout.fileno(), "wb", closefd=False) as out:  # whole, also where stdout is unbuffered
        out.write(orjson.dumps(report))


if __name__ == "__main__":
    main()
