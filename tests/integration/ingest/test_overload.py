"""More than the persisters can drain: refusals that say when to come back, flat memory, and nothing lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import orjson
import psutil
import pytest
from aiohttp import ClientSession, ClientTimeout, TCPConnector

from services.cli import monitoring
from services.cli.cluster import Cluster
from tests.support.persisters import Persister, corpus_of
from tests.support.polling import eventually
from tests.support.service import Service

#: how long clients post without a pause, seconds
SECONDS = 30.0
CLIENTS = 50
#: events that may wait
BACKLOG = 400
#: events are committed one by one, and only for moments: ten or twenty a second
WORKING, PAUSED = 0.03, 0.97
SLOW = {"FI_BATCH_EVENTS": "1", "FI_PARTITIONS": "1", "FI_KNOWN_IDS": "100000"}
#: bytes that ingest may grow by after its first seconds
GROWTH = 24 * 2**20


@dataclass
class Seen:
    """What the clients saw."""

    accepted: set[UUID] = field(default_factory=set)
    statuses: Counter[int] = field(default_factory=Counter)
    problems: set[str] = field(default_factory=set)
    waits: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def post_on(session: ClientSession, url: str, seen: Seen, until: float) -> None:
    """Post new events without ever waiting as long as Retry-After asks for."""
    while time.monotonic() < until:
        started = time.monotonic()
        body, headers = b'{"event_type":"T"}', {"Content-Type": "application/json"}
        async with session.post(url, data=body, headers=headers) as answer:
            document = orjson.loads(await answer.read())
            seen.statuses[answer.status] += 1
            if answer.status == 202:
                seen.accepted.add(UUID(document["message_id"]))
            else:
                seen.problems.add(document["type"])
                seen.waits.append(int(answer.headers["Retry-After"]))
        seen.seconds.append(time.monotonic() - started)


async def throttle(persister: Persister) -> None:
    """Let it work and pause in turns; at the end it works."""
    try:
        while True:
            persister.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(PAUSED)
            persister.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(WORKING)
    finally:
        persister.process.send_signal(signal.SIGCONT)


@pytest.mark.timeout(240)
async def test_an_overload_is_refused_in_time_and_what_was_accepted_is_in_hdf5(
    single_node: Cluster, tmp_path: Path
) -> None:
    """Ten times of what is drained, for half a minute, without a pause: 202, 429 and 503, and no other answer."""
    seen = Seen()
    with ExitStack() as stack:
        persister = stack.enter_context(Persister(tmp_path, single_node, tmp_path / "data", **SLOW))
        settings = {"FI_NATS_URL": single_node.url, "FI_REPLICAS": "1", "FI_PARTITIONS": "1", "FI_PORT": "0"}
        settings |= {"FI_STREAM_MAX_BYTES": "64MiB", "FI_MAX_BACKLOG": str(BACKLOG)}
        ingest = stack.enter_context(Service(tmp_path, "services.ingest", **settings))
        started = await asyncio.to_thread(ingest.wait_for, "INGEST_STARTED")
        await persister.ready()

        async def ready() -> bool:
            return (await asyncio.to_thread(monitoring.get, started["management_port"], "/readyz"))[0] == 200

        await eventually(ready)
        memory = psutil.Process(ingest.process.pid).memory_info
        async with ClientSession(connector=TCPConnector(limit=CLIENTS), timeout=ClientTimeout(20)) as session:
            until = time.monotonic() + SECONDS
            urls = [f"http://127.0.0.1:{started['port']}/consultations/c-{one}/events" for one in range(CLIENTS)]
            throttled = asyncio.create_task(throttle(persister))
            async with asyncio.TaskGroup() as group:
                for url in urls:
                    group.create_task(post_on(session, url, seen, until))
                await asyncio.sleep(SECONDS / 3)
                early = memory().rss
                await asyncio.sleep(SECONDS / 2)
                late = memory().rss
            throttled.cancel()
            await asyncio.wait([throttled])
        drained = sum(len(ids) for ids in corpus_of(tmp_path / "data").values())

        assert {202, 503} <= seen.statuses.keys() <= {202, 429, 503}
        assert "/problems/backlog-full" in seen.problems
        assert len(seen.seconds) >= 10 * drained > 0
        assert all(1 <= wait <= 60 for wait in seen.waits)
        assert sorted(seen.seconds)[int(len(seen.seconds) * 0.99)] < 2.0
        assert late - early < GROWTH

        await eventually(lambda: sum(map(len, corpus_of(tmp_path / "data").values())) >= len(seen.accepted), 120)
        stored = [event_id for ids in corpus_of(tmp_path / "data").values() for event_id in ids]
        assert len(seen.accepted) == len(stored)
        assert seen.accepted == set(stored)
