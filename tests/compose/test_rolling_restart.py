"""An upgrade that clients do not notice."""

from __future__ import annotations

import asyncio
from datetime import datetime
from itertools import pairwise

import pytest

from tests.support.compose.clients import Client
from tests.support.compose.stack import NODES, Deployment, inspect

pytestmark = pytest.mark.timeout(600)

CLIENTS = 4
#: services whose containers are replaced, by new ones of another image as it were
REPLACED = ("persister", "ingest")
#: what the script says that it does: one after the other, and in this order
STEPS = [
    *(f"restarting {node}" for node in NODES),
    *(f"restarting {service}, {number} of 2" for service in REPLACED for number in (1, 2)),
    "everything was restarted and is healthy",
]


async def test_a_client_that_retries_once_sees_no_failure(stack: Deployment) -> None:
    """Nodes, persisters and ingests are restarted one after the other under load; nothing is lost either."""
    client = Client(stack.url, stack.token)
    before, replaced = await asyncio.to_thread(_lives, stack), await asyncio.to_thread(stack.containers, *REPLACED)
    async with client.posting(CLIENTS):
        said = await asyncio.to_thread(stack.rolling_restart)
    after = await asyncio.to_thread(_lives, stack)
    new = await asyncio.to_thread(stack.containers, *REPLACED)

    assert STEPS == said
    assert set() == await asyncio.to_thread(_changed, stack), "the next `up` would replace these, all at once"
    assert [] == [node for node in NODES if after[node][1] <= before[node][1]]
    for earlier, later in pairwise(NODES):
        assert after[earlier][1] < after[later][0], f"{later} ended before {earlier} was there again"
    assert (4, set()) == (len(new), set(new) & set(replaced))
    assert [] == client.failed
    assert len(client.accepted) > 100
    stack.accepted.update(client.accepted)
    await stack.is_whole()
    await stack.is_verified()


def _lives(stack: Deployment) -> dict[str, tuple[datetime, datetime]]:
    """Return when each node ended last, and when it was started after that."""
    states = {node: inspect(stack.container(node))["State"] for node in NODES}
    return {node: (_time(state["FinishedAt"]), _time(state["StartedAt"])) for node, state in states.items()}


def _changed(stack: Deployment) -> set[str]:
    """Return the services with a container that compose takes for one of another configuration."""
    wanted = dict(line.split() for line in stack("config", "--hash", "*").splitlines())
    labels = [inspect(one)["Config"]["Labels"] for one in stack.containers()]
    found = {(label["com.docker.compose.service"], label["com.docker.compose.config-hash"]) for label in labels}
    return {service for service, made in found if wanted[service] != made}


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
