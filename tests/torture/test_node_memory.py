"""What the ids of the duplicate window cost a node: FI_MAX_WINDOW_EVENTS and docs/deploy.md count on it.

With FIQ_TORTURE=long, three nodes with the GOMEMLIMIT of compose take twice the default of FI_MAX_WINDOW_EVENTS: so
many can come together when all ingest processes restart at full rate. `-rP` shows the figures.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from fiq.event import Event, new_event_id
from services.cli.doctor.cluster import ID_MEMORY, NODE_MEMORY
from services.cli.embedded.processes import Cluster
from services.ingest.settings import Settings
from services.log.jetstream.connection import close, connect
from services.log.jetstream.publisher import Publisher
from services.log.jetstream.stream import provision
from services.log.settings import LogSettings
from tests.support.torture import LONG, times

#: of the nodes in deploy/nats-cluster/compose.yaml: NATS_GOMEMLIMIT and NATS_MEMORY
GOMEMLIMIT, MEMORY = "920MiB", 2**30
IDS = times(100_000, 2 * Settings().max_window_events)
_BATCH, _AT_ONCE = 1000, 4


@pytest.mark.timeout(1200 if LONG else 240)
async def test_an_id_takes_no_more_memory_than_the_limit_of_events_assumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a node with that many stays below its limit."""
    monkeypatch.setenv("GOMEMLIMIT", GOMEMLIMIT)
    cluster = Cluster(tmp_path, nodes=times(1, 3))
    await asyncio.to_thread(cluster.start)
    try:
        await _publish(cluster, times(1, 3))
        used = [psutil.Process(node.pid).memory_info().rss for node in cluster.nodes]
    finally:
        await asyncio.to_thread(cluster.stop_all)
    print(  # noqa: T201
        f"{IDS:,} ids: {[round(one / 1e6) for one in used]} MB, at most {max(used) / IDS:.0f} bytes an id in all"
    )
    assert max(used) <= NODE_MEMORY + ID_MEMORY * IDS
    assert max(used) < MEMORY


async def _publish(cluster: Cluster, replicas: int) -> None:
    settings = LogSettings(servers=tuple(cluster.urls), replicas=replicas, duplicate_window=3600)
    nc = await connect(settings, name="test", on_closed=lambda _: None)
    await provision(nc, settings)
    publisher = Publisher(nc, deadline=60, max_in_flight=2 * _BATCH * _AT_ONCE)
    await publisher.start()
    batches = iter(range(IDS // _BATCH))

    async def post() -> None:
        for batch in batches:
            names = (f"consultation-{(batch * _BATCH + n) % 2000:06d}" for n in range(_BATCH))
            await publisher.append_batch([Event(name, new_event_id(), 1, b'{"event_type":"A"}') for name in names])

    await asyncio.gather(*(post() for _ in range(_AT_ONCE)))
    await publisher.close()
    await close(nc)
