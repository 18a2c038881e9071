"""What an operator sees and does over HTTP, on a real pipeline: its state, and what became of bad messages."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.cli.embedded.cluster import Cluster
from tests.support.cluster import delete_streams, heal
from tests.support.persisters import PARTITIONS
from tests.support.pipelines import SMALL, Client, Pipeline
from tests.support.polling import eventually

BODY = b'{"event_type":"A","payload":"private"}'
#: a killed node must be shown within this time, seconds
SHOWN = 5.0


@pytest.fixture
async def nats_pipeline(cluster: Cluster, tmp_path: Path) -> Pipeline:
    """A pipeline on three nodes; nothing runs yet, and nothing is stored."""
    await heal(cluster)
    await delete_streams(cluster)
    return Pipeline(tmp_path, SMALL | {"FI_LOG_URL": cluster.url})


@pytest.fixture
def zmq_pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    with tempfile.TemporaryDirectory(prefix="fiq") as folder:  # paths of sockets are short
        yield Pipeline(tmp_path, SMALL | {"FI_LOG_URL": f"zmq+ipc://{folder}/s"})


async def pipeline_of(client: Client) -> dict[str, Any]:
    status, document = await client.get("/pipeline")
    assert 200 == status
    return document


async def healthy(client: Client, events: int) -> dict[str, Any]:
    """Wait until *events* are persisted and nothing is wrong."""

    async def look() -> dict[str, Any]:
        shown = await pipeline_of(client)
        assert [] == shown["conditions"]
        assert {"accepted": events, "persisted": events} == {
            key: value for key, value in shown["totals"].items() if key != "monotonic_seconds"
        }
        return shown

    return await eventually(look)


def check_partitions(shown: dict[str, Any]) -> None:
    """Each has an owner and nothing that waits; the volume has all of them, and a process with its version."""
    (volume,) = shown["volumes"]
    names = [f"{number:02d}" for number in range(PARTITIONS)]
    assert names == volume["partitions"]
    (process,) = volume["processes"]
    assert [process["version"]] == shown["versions"]["persisters"]
    assert process["version"] == shown["versions"]["fiq"]
    for name, one in zip(names, shown["partitions"], strict=True):
        assert ("main", name, 0, False, None) == tuple(
            one[key] for key in ("store", "partition", "lag", "stalled", "oldest_seconds")
        )
        assert ([process["worker"]], volume["volume"]) == (one["owners"], one["volume"])


async def test_the_state_of_the_pipeline_is_one_document(nats_pipeline: Pipeline, cluster: Cluster) -> None:
    """Nodes, partitions, volumes, totals; a second of load later the totals have risen."""
    async with nats_pipeline.ready_persister(), nats_pipeline.ingest() as (client, _):
        for number in range(10):
            await client.accepted(f"/consultations/c-{number}/events", BODY, "k")
        shown = await healthy(client, 10)
        check_partitions(shown)
        assert ("nats", 0, 0, 10) == (
            shown["log"],
            shown["dead_letters"],
            shown["conflicts"],
            shown["stream"]["last_sequence"],
        )
        assert cluster.names == [node["name"] for node in shown["nodes"]]
        assert [True] * 3 == [node["up"] and node["current"] for node in shown["nodes"]]
        assert [shown["stream"]["leader"]] == [node["name"] for node in shown["nodes"] if node["leader"]]
        assert shown["stream"]["quorum"]
        assert shown["seen_seconds"] < 5
        await client.accepted("/consultations/c-1/events", BODY, "k2")
        later = await healthy(client, 11)
        assert later["totals"]["monotonic_seconds"] > shown["totals"]["monotonic_seconds"]


@pytest.mark.parametrize("leads", [False, True])
async def test_a_killed_node_is_shown_within_five_seconds(
    nats_pipeline: Pipeline, cluster: Cluster, leads: bool
) -> None:
    """Whether it leads the stream, so that nobody answers for a while, or not; and when it is back."""
    async with nats_pipeline.ready_persister(), nats_pipeline.ingest() as (client, _):
        await client.accepted("/consultations/c-1/events", BODY, "k")
        leader = (await healthy(client, 1))["stream"]["leader"]
        name = next(node for node in cluster.names if (node == leader) is leads)
        cluster.kill(cluster.names.index(name))
        began = time.monotonic()
        try:

            async def down() -> bool:
                nodes = {node["name"]: node for node in (await pipeline_of(client))["nodes"]}
                return not nodes[name]["up"]

            await eventually(down)
            took = time.monotonic() - began
            assert took < SHOWN, took

            async def told() -> bool:
                found = [one for one in (await pipeline_of(client))["conditions"] if one["severity"] == "error"]
                return any(f"the copy on {name} is offline" == one["what"] and one["action"] for one in found)

            await eventually(told)
        finally:
            await heal(cluster)
        await healthy(client, 1)


async def test_a_stopped_persister_is_a_condition_with_what_to_do(nats_pipeline: Pipeline) -> None:
    """And what waits is counted."""
    async with nats_pipeline.ingest() as (client, _):
        async with nats_pipeline.ready_persister() as persister:
            await client.accepted("/consultations/c-1/events", BODY, "k")
            await healthy(client, 1)
            persister.terminate()
            assert 0 == await asyncio.to_thread(persister.wait)
        await client.accepted("/consultations/c-1/events", BODY, "k2")

        async def told() -> bool:
            shown = await pipeline_of(client)
            assert ["no persister answers"] == [one["what"] for one in shown["conditions"]]
            assert 1 == shown["backlog"]["events"]
            (one,) = [one for one in shown["partitions"] if one["lag"]]
            assert (1, True, []) == (one["lag"], one["stalled"], one["owners"])
            assert one["oldest_seconds"] is not None
            return True

        await eventually(told)


async def test_without_a_broker_the_document_has_what_there_is(zmq_pipeline: Pipeline) -> None:
    """No nodes, no stream, no dead letters; partitions and volumes as with a broker."""
    async with zmq_pipeline.ready_persister(), zmq_pipeline.ingest() as (client, _):
        for number in range(10):
            await client.accepted(f"/consultations/c-{number}/events", BODY, "k")
        shown = await healthy(client, 10)
        check_partitions(shown)
        assert ("zmq", [], None, None) == (shown["log"], shown["nodes"], shown["stream"], shown["dead_letters"])
        assert shown["versions"]["nats_server"] is None
