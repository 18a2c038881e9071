"""What each node reports of itself through the log; here a stand-in answers for the nodes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nats
import nats.errors
import orjson
import pytest
from nats.aio.msg import Msg
from prometheus_client import CollectorRegistry

from fiq.errors import FiqError
from services.cli.embedded.processes import Cluster
from services.log.jetstream import monitor as module
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Role
from services.log.jetstream.monitor import NodeState, ask_nodes, monitoring
from services.log.jetstream.stream import NODES_HEALTH, NODES_STATE, provision
from services.log.metrics import LogMetrics
from tests.support.broker import connected, plain_server
from tests.support.polling import eventually
from tests.support.security import Secured, make_deployment
from tests.support.small_disk import fill, small_disk


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server without the system account's questions."""
    with plain_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@asynccontextmanager
async def nodes(url: str, health: Mapping[str, Mapping[str, Any] | None], ahead: float = 0.0) -> AsyncIterator[None]:
    """Answer as these nodes would, each with its *health*; None does not answer that question."""

    async def tell(question: Msg) -> None:
        for name, data in health.items():
            if question.subject == NODES_STATE:
                now = datetime.fromtimestamp(time.time() + ahead, UTC).isoformat()
                said: Mapping[str, Any] | None = {"server_name": name, "now": now}
            else:
                said = data
            if said is not None:
                await question.respond(orjson.dumps({"server": {"name": name}, "data": said}))

    connection = await nats.connect(url)
    for subject in (NODES_STATE, NODES_HEALTH):
        await connection.subscribe(subject, cb=tell)
    await connection.flush()
    yield
    await connection.close()


async def asked(url: str) -> list[NodeState]:
    connection = await connected(url)
    try:
        return await ask_nodes(connection)
    finally:
        await connection.close()


async def test_without_answers_there_are_no_nodes(url: str) -> None:
    """The embedded cluster has no accounts; it is known at once, not after a time-out."""
    began = time.monotonic()
    assert [] == await asked(url)
    assert time.monotonic() - began < 1.0


async def test_each_node_says_why_it_is_not_healthy(url: str) -> None:
    """One that said what it is and then nothing is not healthy either."""
    health = {"n2": {"status": "unavailable", "error": "JetStream is not current"}, "n1": {"status": "ok"}, "n3": None}
    async with nodes(url, health):
        found = await asked(url)
    expected = [("n1", ""), ("n2", "JetStream is not current"), ("n3", "no answer")]
    assert expected == [(node.name, node.trouble) for node in found]


@pytest.mark.parametrize("ahead", [-60.0, 0.0, 60.0])
async def test_each_node_tells_its_time(url: str, ahead: float) -> None:
    """Taken in the middle of question and answer, and no better known than by half of what lies between."""
    async with nodes(url, {"n1": {"status": "ok"}}, ahead):
        (node,) = await asked(url)
    assert abs(node.ahead - ahead) <= node.uncertain
    assert node.uncertain < 1.0


@pytest.mark.parametrize("leads", [True, False])
async def test_a_node_shows_that_it_stores_nothing_when_its_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leads: bool
) -> None:
    """JetStream is off then, whether it led the stream or not, also when there is room again; the others work on."""
    monkeypatch.setattr(module, "WHOLE_EVERY", 1)
    secured = Secured(Cluster(tmp_path / "cluster", security=tmp_path), make_deployment(tmp_path))
    folder, registry = secured.cluster.folder, CollectorRegistry()
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        disks = {name: stack.enter_context(small_disk("tmpfs", folder / name, size=64)) for name in ("n1", "n2", "n3")}
        await asyncio.to_thread(stack.enter_context, secured.cluster)
        settings = secured.settings(Role.INGEST, max_bytes=2**24, dead_max_bytes=2**20)
        async with secured.connected(Role.PROVISIONER) as provisioner:
            await provision(provisioner, settings)
        async with secured.connected(Role.INGEST) as nc:

            async def leader() -> str:
                info = await JetStreamApi(nc).stream_info("fi-events")
                return "" if info is None else str(info["cluster"].get("leader", ""))

            async def publish() -> bool:
                with contextlib.suppress(FiqError, nats.errors.Error):
                    return b'"seq"' in (await nc.request("fi.events.c1", bytes(100_000), timeout=2)).data
                return False

            led = await eventually(leader)
            full = led if leads else next(name for name in disks if name != led)

            def shown(name: str) -> float | None:
                return registry.get_sample_value(f"fi_node_{name}", {"node": full})

            async with monitoring(nc, settings, LogMetrics(registry), pytest.fail):
                await eventually(publish)
                await eventually(lambda: 1 == shown("jetstream") and shown("storage_bytes"))
                ballast = fill(disks[full])

                async def off() -> bool:
                    await publish()
                    return 0 == shown("jetstream")

                await eventually(off, 60)
                assert shown("storage_bytes") is None
                assert shown("memory_bytes") is not None
                ballast.unlink()
                await eventually(publish)
                assert 2 == sum(registry.get_sample_value("fi_node_jetstream", {"node": name}) or 0 for name in disks)
            assert [] == nc.violations
