"""What each node reports of itself through the log; here a stand-in answers for the nodes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import nats
import orjson
import pytest
from nats.aio.msg import Msg

from services.log.jetstream.monitor import NodeState, ask_nodes
from services.log.jetstream.stream import NODES_HEALTH, NODES_STATE
from tests.support.broker import connected, plain_server


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
