"""Benchmark of batches: the endpoint against bare atomic batches, in rounds that take turns."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import nats
import nats.errors
import orjson

from benchmarks import dialogues, http_client, processes, streams
from benchmarks.bench import Bench, of_rounds
from benchmarks.jobs import LoadJob, Report
from benchmarks.plan import BATCH_CLIENTS, BATCH_EVENTS, PARTITIONS
from benchmarks.results import BARE_BATCH, BATCH, Throughput
from benchmarks.tally import Tally
from services.log.jetstream.names import subject_of
from services.log.jetstream.publisher import BATCH_COMMIT_HEADER, BATCH_ID_HEADER, BATCH_SEQUENCE_HEADER


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


async def over_http(job: LoadJob, meet: Callable[[], None]) -> Report:
    """Post NDJSON, each client over a connection of its own, each batch under a key of its own."""
    port, tally = int(job.target), Tally(job, events=BATCH_EVENTS)
    requests = (
        http_client.post_batch(port, consultation, str(uuid4()), b"\n".join(bodies))
        for consultation, bodies in _posts(dialogues.load(Path(job.folder)))
    )

    def start() -> None:
        meet()
        tally.start()

    await http_client.post_all(port, job.clients, requests, tally, start)
    return tally.report()


async def over_nats(job: LoadJob, meet: Callable[[], None]) -> Report:
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

    tally, posts = Tally(job, events=BATCH_EVENTS), _posts(dialogues.load(Path(job.folder)))

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


def _posts(source: dialogues.Dialogues) -> Iterator[tuple[str, list[bytes]]]:
    """Yield consultation and bodies of a batch without end; each batch is another consultation."""
    bodies = itertools.cycle(source.bodies)
    for number in itertools.count():
        yield f"bench-{number:07d}", list(itertools.islice(bodies, BATCH_EVENTS))
