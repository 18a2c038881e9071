"""The least that a persister can do: pull everything with nats-py and throw it away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import nats
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.jobs import PullJob, Report
from services.log.jetstream.names import STREAM

_EXPIRES_NS = 30_000_000_000


async def pull(job: PullJob, meet: Callable[[], None]) -> Report:
    """Take all events of all consumers over one connection, two requests of each under way."""
    connection = await nats.connect(job.url, name="bench pull")
    try:
        done = asyncio.Event()
        left = job.events

        def took(count: int) -> None:
            nonlocal left
            left -= count
            if left <= 0:
                done.set()

        consumers = [_Consumer(connection, name, job, took) for name in job.consumers]
        meet()
        started = time.perf_counter()
        for consumer in consumers:
            await consumer.start()
        await done.wait()
        for consumer in consumers:
            await consumer.acknowledge()
        await connection.flush()
        return Report(time.perf_counter() - started, job.events)
    finally:
        await connection.close()


class _Consumer:
    def __init__(self, connection: Client, name: str, job: PullJob, took: Callable[[int], None]) -> None:
        self._connection = connection
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{name}"
        self._job = job
        self._took = took
        self._request = orjson.dumps(
            {"batch": job.pull_events, "max_bytes": job.pull_bytes, "expires": _EXPIRES_NS, "idle_heartbeat": 10**9}
        )
        self._inbox = connection.new_inbox()
        self._count = 0
        self._last: str | None = None

    async def start(self) -> None:
        await self._connection.subscribe(self._inbox, cb=self._take, pending_msgs_limit=-1, pending_bytes_limit=-1)
        await self._ask()
        await self._ask()

    async def acknowledge(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            await self._connection.publish(last, b"")

    async def _ask(self) -> None:
        await self._connection.publish(self._subject, self._request, reply=self._inbox)

    async def _take(self, message: Msg) -> None:
        if not message.reply:
            if (message.headers or {}).get("Status") == "409":  # the request's bytes are used up
                await self._ask()
            return
        self._last = message.reply
        self._count += 1
        if self._count % self._job.pull_events == 0:
            await self._ask()
        if self._count % self._job.ack_events == 0:
            await self.acknowledge()
        self._took(1)
