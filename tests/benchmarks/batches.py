"""Benchmark of batches: the endpoint against bare atomic batches, in rounds that take turns."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import nats
import nats.errors
import orjson

from services.eventlog.jetstream.batches import BATCH_COMMIT_HEADER, BATCH_ID_HEADER, BATCH_SEQUENCE_HEADER
from services.eventlog.jetstream.names import subject_of
from tests.benchmarks import dialogues, http_client, processes, streams
from tests.benchmarks.jobs import LoadJob, Report
from tests.benchmarks.plan import BATCH_CLIENTS, BATCH_EVENTS, PARTITIONS
from tests.benchmarks.posts import Bench, of_rounds
from tests.benchmarks.results import BARE_BATCH, BATCH, Throughput

#: sends one batch of a consultation; returns whether it was accepted
Send = Callable[[str, list[bytes]], Awaitable[bool]]


def batches(bench: Bench) -> list[Throughput]:
    """Measure batches over HTTP, and bare ones."""
    streams.fresh_stream(bench.cluster, PARTITIONS)
    url = bench.cluster.urls[0]
    reports: dict[str, list[Report]] = {BATCH: [], BARE_BATCH: []}
    with processes.ingest(url, bench.folder, partitions=PARTITIONS) as (_, port):
        for number in range(bench.plan.rounds):
            bench.tell(f"batches: round {number + 1}")
            reports[BATCH].append(bench.load(port, BATCH_CLIENTS, "batch"))
            reports[BARE_BATCH].append(bench.load(url, BATCH_CLIENTS, "bare_batch"))
    return [of_rounds(target, BATCH_CLIENTS, of) for target, of in reports.items()]


async def over_http(job: LoadJob) -> Report:
    """Post NDJSON, each client over a connection of its own, each batch under a key of its own."""
    port = int(job.target)
    connections = [await http_client.connect(port) for _ in range(job.clients)]

    def sender(connection: http_client.Connection) -> Send:
        async def send(consultation: str, bodies: list[bytes]) -> bool:
            request = http_client.post_batch(port, consultation, str(uuid4()), b"\n".join(bodies))
            return await connection.request(request) == 202

        return send

    try:
        return await _measure(job, [sender(connection) for connection in connections])
    finally:
        for connection in connections:
            connection.close()


async def over_nats(job: LoadJob) -> Report:
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

    try:
        return await _measure(job, [send] * job.clients)
    finally:
        await connection.close()


async def _measure(job: LoadJob, senders: list[Send]) -> Report:
    posts = _posts(dialogues.load(Path(job.folder)))
    begin = time.perf_counter() + job.warm_up
    end = begin + job.seconds
    events = failures = 0

    async def client(send: Send) -> None:
        nonlocal events, failures
        while time.perf_counter() < end:
            accepted = await send(*next(posts))
            if not accepted:
                failures += 1
            elif begin <= time.perf_counter() <= end:
                events += BATCH_EVENTS

    await asyncio.gather(*(client(send) for send in senders))
    return Report(min(time.perf_counter(), end) - begin, events, failures, [])


def _posts(source: dialogues.Dialogues) -> Iterator[tuple[str, list[bytes]]]:
    """Yield consultation and bodies of a batch without end; each batch is another consultation."""
    bodies = itertools.cycle(source.bodies)
    for number in itertools.count():
        yield f"bench-{number:07d}", list(itertools.islice(bodies, BATCH_EVENTS))
