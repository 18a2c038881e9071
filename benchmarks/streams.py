"""The stream under the benchmarks: made anew, filled with a backlog, given consumers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable
from dataclasses import replace

import nats
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from fiq.event import Event
from services.cli.embedded.processes import Cluster
from services.log.jetstream.connection import close, connect
from services.log.jetstream.stream import STREAM, provision, subject_of
from services.log.settings import LogSettings
from tests.support.cluster import delete_streams

#: messages of one atomic batch (ADR-50 allows 1,000), and how many batches are under way
_BATCH = 500
_BATCHES_IN_FLIGHT = 8
#: the acknowledgement of a batch may take this long, seconds
_TIMEOUT = 20.0


def fresh_stream(cluster: Cluster, partitions: int) -> None:
    """Delete the product's streams and let the product make them again with *partitions*."""
    asyncio.run(_fresh_stream(cluster, LogSettings(servers=tuple(cluster.urls), partitions=partitions)))


def fill(url: str, events: Iterable[Event]) -> int:
    """Publish *events* as ingest would, but in atomic batches, which is several times as fast; return how many."""
    return asyncio.run(_fill(url, events))


def delete_consumers(url: str) -> None:
    """Delete all consumers of the stream of events, so that every round meets none but its own."""
    asyncio.run(_delete_consumers(url))


async def _fresh_stream(cluster: Cluster, settings: LogSettings) -> None:
    await delete_streams(cluster)
    connection = await connect(replace(settings, servers=tuple(cluster.urls)), name="bench", on_closed=lambda _: None)
    try:
        await provision(connection, settings)
    finally:
        await close(connection)


async def _delete_consumers(url: str) -> None:
    async with await nats.connect(url, name="bench") as connection:
        stream = connection.jetstream(timeout=_TIMEOUT)
        for found in await stream.consumers_info(STREAM):
            await stream.delete_consumer(STREAM, found.name)


async def _fill(url: str, events: Iterable[Event]) -> int:
    count = 0
    under_way: set[asyncio.Task[Msg]] = set()
    async with await nats.connect(url, name="bench fill", pending_size=64 * 2**20) as connection:
        batch: list[Event] = []
        for event in events:
            batch.append(event)
            count += 1
            if len(batch) == _BATCH:
                under_way.add(await _send(connection, batch))
                batch = []
            if len(under_way) >= _BATCHES_IN_FLIGHT:
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                _check(done)
        if batch:
            under_way.add(await _send(connection, batch))
        if under_way:
            _check((await asyncio.wait(under_way))[0])
    return count


async def _send(connection: Client, batch: list[Event]) -> asyncio.Task[Msg]:
    """Send a batch whole, so that batches are committed in the order of their calls; its answer is the result."""
    name = uuid.uuid4().hex
    for number, event in enumerate(batch, start=1):
        headers = {**event.headers(), "Nats-Batch-Id": name, "Nats-Batch-Sequence": str(number)}
        subject = subject_of(event.consultation)
        if number < len(batch):
            await connection.publish(subject, event.body, headers=headers)
    headers["Nats-Batch-Commit"] = "1"
    answer = asyncio.create_task(connection.request(subject, event.body, timeout=_TIMEOUT, headers=headers))
    await asyncio.sleep(0)  # the request is written before the next batch begins
    return answer


def _check(done: Iterable[asyncio.Task[Msg]]) -> None:
    for task in done:
        answer = orjson.loads(task.result().data)
        if "error" in answer:
            raise RuntimeError(f"the broker refuses a batch: {answer['error']}")
