"""What clients may rely on beyond what test_both_logs.py shows: what the broker, the stream and its trim add."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
from aiohttp import ClientSession
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from services.cli.embedded.processes import Cluster
from services.log.jetstream.stream import STREAM
from services.log.partitions import partition_of
from tests.support.persisters import PARTITIONS, Persister, corpus_of
from tests.support.polling import eventually
from tests.support.racing import Edge
from tests.support.service import Service

BODIES = (b'{"event_type":"A","payload":"one"}', b'{"event_type":"A","payload":"two"}')
REUSED = "/problems/idempotency-key-reused"
#: the broker's code of a message whose id is being stored just now
IN_PROCESS = 10158


@contextmanager
def ingest(folder: Path, cluster: Cluster, **settings: str) -> Iterator[Service]:
    values = {"FI_PORT": "0", "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "1MiB"}
    values |= {"FI_PUBLISH_DEADLINE": "15", "FI_LOG_URL": ",".join(cluster.urls)}
    folder.mkdir(parents=True, exist_ok=True)
    with Service(folder, "services.ingest", **(values | settings)) as service:
        yield service


class Client:
    """Posts to one ingest process."""

    def __init__(self, session: ClientSession, edge: Edge) -> None:
        self.edge = edge
        self._session = session
        self._url = f"http://127.0.0.1:{edge.port}"

    async def post(
        self, path: str, body: bytes, key: str = "", kind: str = "application/json"
    ) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": kind} | ({"Idempotency-Key": key} if key else {})
        async with self._session.post(self._url + path, data=body, headers=headers) as response:
            if response.status in {409, 429, 503}:
                assert int(response.headers["Retry-After"]) > 0
            return response.status, json.loads(await response.read())

    async def post_headers(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        async with self._session.post(self._url + path, data=body, headers=headers) as response:
            return response.status, json.loads(await response.read())


@asynccontextmanager
async def clients(folder: Path, cluster: Cluster, count: int = 1, **settings: str) -> AsyncIterator[list[Client]]:
    """Run *count* ingest processes, and yield a client for each."""
    async with AsyncExitStack() as stack:
        services = [stack.enter_context(ingest(folder / str(n), cluster, **settings)) for n in range(count)]
        session = await stack.enter_async_context(ClientSession())
        lines = [await asyncio.to_thread(service.wait_for, "INGEST_STARTED") for service in services]
        yield [Client(session, Edge(line["port"], line["management_port"])) for line in lines]


@asynccontextmanager
async def jetstream(cluster: Cluster) -> AsyncIterator[JetStreamContext]:
    connection = await nats.connect(cluster.urls)
    try:
        yield connection.jetstream()
    finally:
        await connection.close()


def lines(count: int, payload: str = "x") -> bytes:
    return b"\n".join(b'{"event_type":"A","n":%d,"payload":"%b"}' % (n, payload.encode()) for n in range(count))


@pytest.mark.parametrize("in_time", [True, False])
async def test_a_key_that_is_being_stored_is_tried_again_until_the_deadline(
    fresh_log: Cluster, tmp_path: Path, in_time: bool
) -> None:
    """The leader has the first one and no quorum yet, so the broker says of the second that it is in process."""
    path, settings = "/consultations/c-1/events", {"FI_MAX_BACKLOG": "0"}
    async with clients(tmp_path, fresh_log, 1, **settings) as (client,):
        assert 202 == (await client.post(path, BODIES[0], "before"))[0]
    leader = await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM)
    settings["FI_LOG_URL"] = fresh_log.urls[leader]
    patience = {"FI_PUBLISH_DEADLINE": "10" if in_time else "1"}
    async with (
        clients(tmp_path / "1", fresh_log, 1, **settings) as (first,),
        clients(tmp_path / "2", fresh_log, 1, **settings, **patience) as (second,),
        overhearing(fresh_log.urls[leader], "fi.events.c-1") as (nc, heard),
    ):
        # given
        with frozen(fresh_log, {*range(fresh_log.size)} - {leader}):
            one = asyncio.create_task(first.post(path, BODIES[0], "k"))
            await eventually(lambda: heard)
            message = heard[0]
            reply = await nc.request(message.subject, message.data, headers=message.headers, timeout=5)
            assert IN_PROCESS == json.loads(reply.data)["error"]["err_code"]

            # when
            before = [sent.reply for sent in heard]
            two = asyncio.create_task(second.post(path, BODIES[0], "k"))

            def tried_again() -> bool:
                tries = Counter(sent.reply for sent in heard if sent.reply not in before)
                return any(count > 1 for count in tries.values())

            await eventually(tried_again)
            if not in_time:
                status, problem = await two
                assert (409, "/problems/duplicate-in-flight") == (status, problem["type"])

        # then
        status, stored = await one
        assert 202 == status
        if not in_time:
            two = asyncio.create_task(second.post(path, BODIES[0], "k"))
        assert (202, stored | {"duplicate": True}) == await two


@contextmanager
def frozen(cluster: Cluster, nodes: set[int]) -> Iterator[None]:
    for node in nodes:
        cluster.pause(node)
    try:
        yield
    finally:
        for node in nodes:
            cluster.resume(node)


@asynccontextmanager
async def overhearing(url: str, subject: str) -> AsyncIterator[tuple[NatsClient, list[Msg]]]:
    """Collect what is published on *subject* at a node."""
    heard: list[Msg] = []

    async def hear(message: Msg) -> None:
        heard.append(message)

    connection = await nats.connect(url)
    try:
        await connection.subscribe(subject, cb=hear)
        await connection.flush()
        yield connection, heard
    finally:
        await connection.close()


async def test_batches_go_on_when_a_node_dies(fresh_log: Cluster, tmp_path: Path) -> None:
    """A client that retries with its key has each of its events once, wherever the leader's death struck."""
    async with clients(tmp_path, fresh_log) as (client,), jetstream(fresh_log) as js:
        path, kind = "/consultations/c-1/events/batch", "application/x-ndjson"

        async def accepted(key: str) -> bool:
            return (await client.post(path, lines(30), key, kind))[0] == 202

        async def insist(key: str) -> None:
            assert await eventually(lambda: accepted(key), timeout=60)

        await insist("first")
        leader = await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM)
        posts = [asyncio.create_task(insist(f"k{n}")) for n in range(20)]
        await asyncio.sleep(0)
        fresh_log.kill(leader)
        await asyncio.gather(*posts)
        assert (await js.stream_info(STREAM)).state.messages == 21 * 30


async def test_a_process_that_remembers_nothing_compares_with_the_stream(fresh_log: Cluster, tmp_path: Path) -> None:
    """After a restart, and in every other process."""
    path = "/consultations/c-1/events"
    async with clients(tmp_path, fresh_log) as (client,):
        _, first = await client.post(path, BODIES[0], "k")
    async with clients(tmp_path, fresh_log) as (client,):
        assert await client.post(path, BODIES[0], "k") == (202, first | {"duplicate": True})
        status, problem = await client.post(path, BODIES[1], "k")
        assert (status, problem["type"]) == (422, REUSED)


async def test_a_key_whose_event_cannot_be_read_is_503(fresh_log: Cluster, tmp_path: Path) -> None:
    """The broker knows the id, the event has been trimmed, and no persister runs."""
    path = "/consultations/c-1/events"
    async with clients(tmp_path, fresh_log) as (client,), jetstream(fresh_log) as js:
        await client.post(path, BODIES[0], "k")
        await js.purge_stream(STREAM)
    async with clients(tmp_path, fresh_log) as (client,):
        status, problem = await client.post(path, BODIES[0], "k")
        assert (status, problem["type"]) == (503, "/problems/key-not-compared")


async def keys_are_known(client: Client, path: str, single: dict[str, Any], batch: dict[str, Any]) -> None:
    """Assert that a retry of *single* (key k) and *batch* (key b) is told as such, and other bodies are refused."""
    assert await client.post(path, BODIES[0], "k") == (202, single | {"duplicate": True})
    marked = [result | {"duplicate": True} for result in batch["results"]]
    assert (await client.post(f"{path}/batch", lines(3), "b", "application/x-ndjson"))[1]["results"] == marked
    status, problem = await client.post(path, BODIES[1], "k")
    assert (status, problem["type"]) == (422, REUSED)
    changed = lines(3).replace(b'"n":1', b'"n":9')
    status, problem = await client.post(f"{path}/batch", changed, "b", "application/x-ndjson")
    assert (status, [wrong["line"] for wrong in problem["lines"]]) == (422, [2])


async def test_a_key_is_known_when_its_event_has_been_persisted_trimmed_and_forgotten(
    fresh_log: Cluster, tmp_path: Path
) -> None:
    """The corpus is asked: the first sequence, however late; another body is 422. The corpus holds each event once."""
    # given
    path, kind = "/consultations/c-1/events", "application/x-ndjson"
    shared = {"FI_PARTITIONS": str(PARTITIONS), "FI_DUPLICATE_WINDOW": "1", "FI_DEAD_MAX_BYTES": "1MiB"}
    with Persister(tmp_path / "persister", fresh_log, tmp_path / "data", **shared) as persister:
        await persister.ready()
        async with clients(tmp_path, fresh_log, 1, **shared) as (client,):
            _, single = await client.post(path, BODIES[0], "k")
            _, batch = await client.post(f"{path}/batch", lines(3), "b", kind)
            await client.post(path, BODIES[0], "probe")
        await eventually(lambda: len(corpus_of(tmp_path / "data").get("c-1", [])) == 5)

        # when
        patient = shared | {"FI_KEY_LOOKUP_WAIT": "10"}
        async with clients(tmp_path, fresh_log, 1, **patient) as (client,), jetstream(fresh_log) as js:
            await js.purge_stream(STREAM)

            async def forgotten() -> bool:
                await client.post(path, BODIES[0], "probe")
                return (await js.stream_info(STREAM)).state.messages > 0

            await eventually(forgotten)

            # then
            await keys_are_known(client, path, single, batch)
        assert len(corpus_of(tmp_path / "data")["c-1"]) == 5


async def test_an_event_that_waits_for_longer_than_the_broker_remembers_is_taken_again_and_stored_once(
    fresh_log: Cluster, tmp_path: Path
) -> None:
    """The persisters have been away for longer than the window: intake comes first, and they drop the copies."""
    # given
    path, kind = "/consultations/c-1/events", "application/x-ndjson"
    shared = {"FI_PARTITIONS": str(PARTITIONS), "FI_DUPLICATE_WINDOW": "1"}
    async with clients(tmp_path, fresh_log, 1, **shared) as (client,), jetstream(fresh_log) as js:
        assert 202 == (await client.post(path, BODIES[0], "k"))[0]
        assert 202 == (await client.post(f"{path}/batch", lines(3), "b", kind))[0]

        # when
        async def taken_again() -> bool:
            assert 202 == (await client.post(path, BODIES[0], "k"))[0]
            assert 202 == (await client.post(f"{path}/batch", lines(3), "b", kind))[0]
            return (await js.stream_info(STREAM)).state.messages >= 8

        await eventually(taken_again)

    # then
    with Persister(tmp_path / "persister", fresh_log, tmp_path / "data", **shared, FI_DEAD_MAX_BYTES="1MiB") as one:
        await one.ready()

        async def all_written() -> bool:
            samples = await one.samples()
            return sum(value for name, value in samples.items() if "fi_persister_duplicates_total" in name) >= 4

        await eventually(all_written)
        assert 4 == len(corpus_of(tmp_path / "data")["c-1"])


async def test_a_frozen_persister_is_waited_for_by_few_and_keys_are_compared_when_it_goes_on(
    fresh_log: Cluster, tmp_path: Path
) -> None:
    """SIGSTOP, or a disk that hangs: three questions wait for FI_KEY_LOOKUP_WAIT, and nothing else does."""
    # given
    partition = partition_of("c-1", PARTITIONS)
    names = [name for name in (f"v-{n}" for n in range(400)) if partition_of(name, PARTITIONS) == partition]
    shared = {"FI_PARTITIONS": str(PARTITIONS), "FI_DUPLICATE_WINDOW": "1", "FI_DEAD_MAX_BYTES": "1MiB"}
    shared |= {"FI_KEY_LOOKUP_WAIT": "1"}

    async def post(client: Client, name: str, body: bytes, key: str) -> tuple[int, float]:
        started = time.monotonic()
        status, _ = await client.post(f"/consultations/{name}/events", body, key)
        return status, time.monotonic() - started

    with Persister(tmp_path / "persister", fresh_log, tmp_path / "data", **shared) as persister:
        await persister.ready()
        async with clients(tmp_path, fresh_log, 1, **shared) as (client,):
            assert 202 == (await post(client, "c-1", BODIES[0], "k"))[0]
            await eventually(lambda: "c-1" in corpus_of(tmp_path / "data"))

            # when
            persister.process.send_signal(signal.SIGSTOP)
            first = [await post(client, name, BODIES[0], "k") for name in names[:3]]
            rest = [await post(client, name, BODIES[0], "k") for name in names[3:40]]

            # then
            assert {202} == {status for status, _ in first + rest}
            assert all(seconds >= 1 for _, seconds in first)
            assert sum(seconds for _, seconds in rest) < 18

            # when
            persister.process.send_signal(signal.SIGCONT)

            # then
            async def compared() -> bool:
                return (await post(client, "c-1", BODIES[1], "k"))[0] == 422

            await eventually(compared)
            await eventually(lambda: set(names[:40]) <= corpus_of(tmp_path / "data").keys())
