"""More than the persisters can drain: refusals that say when to come back, flat memory, and nothing lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import orjson
import psutil
import pytest
from aiohttp import ClientSession, ClientTimeout, TCPConnector

from services.cli import monitoring
from services.cli.embedded.processes import Cluster
from tests.support.persisters import PARTITIONS, Persister, corpus_of
from tests.support.polling import eventually
from tests.support.service import Service

#: how long clients post without a pause, seconds
SECONDS = 30.0
CLIENTS = 50
#: how often memory is looked at
LOOKS = 15
#: events that may wait
BACKLOG = 400
#: events are committed one by one, and only for moments: a few a second
WORKING, PAUSED = 0.03, 0.97
SLOW = {"FI_BATCH_EVENTS": "1", "FI_KNOWN_IDS": "100000"}
#: events that ingest stores at the same time: less than there are clients
IN_FLIGHT = 10
#: bytes that a process may grow by after the first third, which is less than 1 KB a request; a node's heap breathes
GROWTH = {"ingest": 8 * 2**20, "persister": 8 * 2**20} | dict.fromkeys(("n1", "n2", "n3"), 24 * 2**20)


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


async def growth(processes: Mapping[str, psutil.Process]) -> dict[str, int]:
    """Return by how many bytes each process has grown at most, between the first third and the end."""
    await asyncio.sleep(SECONDS / 3)
    first = {name: process.memory_info().rss for name, process in processes.items()}
    most = dict(first)
    for _ in range(LOOKS):
        await asyncio.sleep(SECONDS / 2 / LOOKS)
        most = {name: max(most[name], process.memory_info().rss) for name, process in processes.items()}
    return {name: most[name] - first[name] for name in processes}


@pytest.mark.timeout(240)
async def test_an_overload_is_refused_in_time_and_what_was_accepted_is_in_hdf5(
    fresh_log: Cluster, tmp_path: Path
) -> None:
    """Ten times of what is drained, for half a minute, without a pause: 202, 429 and 503, and no other answer."""
    seen = Seen()
    with ExitStack() as stack:
        persister = stack.enter_context(Persister(tmp_path, fresh_log, tmp_path / "data", **SLOW))
        settings = {"FI_LOG_URL": ",".join(fresh_log.urls), "FI_PARTITIONS": str(PARTITIONS), "FI_PORT": "0"}
        settings |= {"FI_STREAM_MAX_BYTES": "64MiB", "FI_MAX_BACKLOG": str(BACKLOG)}
        settings |= {"FI_MAX_IN_FLIGHT": str(IN_FLIGHT)}
        ingest = stack.enter_context(Service(tmp_path, "services.ingest", **settings))
        started = await asyncio.to_thread(ingest.wait_for, "INGEST_STARTED")
        await persister.ready()

        async def ready() -> bool:
            return (await asyncio.to_thread(monitoring.get, started["management_port"], "/readyz"))[0] == 200

        await eventually(ready)
        pids = {"ingest": ingest.process.pid, "persister": persister.process.pid}
        pids |= {node.name: node.pid for node in fresh_log.nodes if node.pid is not None}
        async with ClientSession(connector=TCPConnector(limit=CLIENTS), timeout=ClientTimeout(20)) as session:
            until = time.monotonic() + SECONDS
            urls = [f"http://127.0.0.1:{started['port']}/consultations/c-{one}/events" for one in range(CLIENTS)]
            throttled = asyncio.create_task(throttle(persister))
            async with asyncio.TaskGroup() as group:
                for url in urls:
                    group.create_task(post_on(session, url, seen, until))
                grown = await growth({name: psutil.Process(pid) for name, pid in pids.items()})
            throttled.cancel()
            await asyncio.wait([throttled])
        drained = sum(len(ids) for ids in corpus_of(tmp_path / "data").values())

        assert {202, 429, 503} == seen.statuses.keys()
        assert {"/problems/backlog-full", "/problems/too-many-in-flight"} <= seen.problems
        assert len(seen.seconds) >= 10 * drained > 0
        assert all(1 <= wait <= 60 for wait in seen.waits)
        assert sorted(seen.seconds)[int(len(seen.seconds) * 0.99)] < 2.0
        assert {} == {name: grew for name, grew in grown.items() if grew >= GROWTH[name]}

        await eventually(lambda: sum(map(len, corpus_of(tmp_path / "data").values())) >= len(seen.accepted), 120)
        stored = [event_id for ids in corpus_of(tmp_path / "data").values() for event_id in ids]
        assert len(seen.accepted) == len(stored)
        assert seen.accepted == set(stored)
