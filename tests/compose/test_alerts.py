"""The alert that should fire does, in the real Prometheus of the deployment, and stops when all is well again."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import ClientSession

from tests.support.compose.faults import killed
from tests.support.compose.stack import NODES, Deployment
from tests.support.polling import eventually

pytestmark = pytest.mark.timeout(420)

#: 30 s that the rules wait, several looks at the broker before that, and a busy machine
FIRES = 150.0


async def firing(stack: Deployment, session: ClientSession) -> set[str]:
    """Return the names of the alerts that fire just now."""
    async with session.get(f"http://{stack.address('prometheus', 9090)}/api/v1/alerts") as answer:
        alerts = (await answer.json())["data"]["alerts"]
    return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


async def test_a_dead_node_and_a_volume_without_processes_are_told_until_they_are_back(stack: Deployment) -> None:
    """One node and all persisters are killed: nothing is lost, and an operator is called for both."""
    leader = await stack.leader()
    dead = next(node for node in NODES if node != leader)
    expected = {"FiqReplicaOffline", "FiqVolumeAway"}
    async with ClientSession() as session:

        async def told() -> bool:
            return expected <= await firing(stack, session)

        async def quiet() -> bool:
            return not expected & await firing(stack, session)

        await eventually(quiet, timeout=FIRES)
        with killed(stack, dead), killed(stack, "persister"):
            await eventually(told, timeout=FIRES)
        await eventually(quiet, timeout=FIRES)
    await stack.is_whole()


async def test_every_target_answers(stack: Deployment) -> None:
    """Scaled services are found by their names: two ingests, two persisters."""
    async with ClientSession() as session:

        async def up() -> list[str]:
            query = {"query": 'up{job=~"ingest|persister"} == 1'}
            url = f"http://{stack.address('prometheus', 9090)}/api/v1/query"
            async with session.get(url, params=query) as answer:
                result = (await answer.json())["data"]["result"]
            return sorted(one["metric"]["job"] for one in result)

        async def all_up() -> bool:
            return ["ingest", "ingest", "persister", "persister"] == await up()

        await eventually(all_up, timeout=60)
    assert await asyncio.to_thread(stack.states) == {"healthy"}
