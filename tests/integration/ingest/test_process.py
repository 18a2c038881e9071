"""The ingest process over a real cluster: stored, refused, stopped."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import nats
import pytest
from aiohttp import ClientConnectionError, ClientError, ClientSession, ClientTimeout
from nats.js import JetStreamContext

from fiq.event import event_id_from_key
from services.cli.embedded.processes import Cluster, free_ports
from services.log.jetstream.stream import STREAM
from services.log.partitions import partition_of
from tests.support.polling import eventually
from tests.support.service import Service

BODY = b'{"event_type":"MESSAGE_RECEIVED","payload":{"text":"hello"}}'
#: of most tests here: shorter than the default, longer than an election takes
DEADLINE = 3.0


@contextmanager
def ingest(folder: Path, cluster: Cluster, **settings: str) -> Iterator[Service]:
    values = {"FI_PORT": "0", "FI_STREAM_MAX_BYTES": "16MiB", "FI_DEAD_MAX_BYTES": "1MiB"}
    values["FI_PUBLISH_DEADLINE"] = str(DEADLINE)
    with Service(folder, "services.ingest", **(values | {"FI_LOG_URL": cluster.url} | settings)) as service:
        yield service


class Client:
    """Posts events to one ingest process."""

    def __init__(self, session: ClientSession, port: int, management_port: int) -> None:
        self._session = session
        self._url = f"http://127.0.0.1:{port}"
        self._management_url = f"http://127.0.0.1:{management_port}"

    async def post(self, consultation: str, key: str, body: bytes = BODY) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        url = f"{self._url}/consultations/{consultation}/events"
        async with self._session.post(url, data=body, headers=headers) as response:
            document = json.loads(await response.read())
            if response.status in {409, 429, 503}:
                assert int(response.headers["Retry-After"]) > 0
            return response.status, document

    async def manage(self, path: str) -> tuple[int, dict[str, Any]]:
        """Ask the management listener."""
        async with self._session.get(self._management_url + path) as response:
            return response.status, json.loads(await response.read())


@asynccontextmanager
async def client_of(service: Service) -> AsyncIterator[Client]:
    started = await asyncio.to_thread(service.wait_for, "INGEST_STARTED")
    async with ClientSession() as session:
        yield Client(session, started["port"], started["management_port"])


@asynccontextmanager
async def jetstream(cluster: Cluster) -> AsyncIterator[JetStreamContext]:
    connection = await nats.connect(cluster.urls)
    try:
        yield connection.jetstream()
    finally:
        await connection.close()


async def test_an_accepted_event_stands_in_the_stream(fresh_log: Cluster, tmp_path: Path) -> None:
    """In its partition, with its id and time, byte for byte; a retry finds it."""
    with ingest(tmp_path, fresh_log) as service:
        async with client_of(service) as client, jetstream(fresh_log) as js:
            before = time.time_ns()
            status, first = await client.post("c-1", "abc")
            again = await client.post("c-1", "abc")
            message = await js.get_msg(STREAM, first["sequence"])
            info = await js.stream_info(STREAM)
    event_id = str(event_id_from_key("abc"))
    assert (status, first["message_id"]) == (202, event_id)
    assert again == (202, first | {"duplicate": True})
    assert (message.subject, message.data) == (f"fi.events.{partition_of('c-1', 16)}.c-1", BODY)
    assert message.headers is not None
    assert message.headers["Nats-Msg-Id"] == f"c-1/{event_id}"
    assert before <= int(message.headers["Fi-Received-Ns"]) <= time.time_ns()
    assert info.state.messages == 1


async def test_readiness_waits_for_the_consumers(fresh_log: Cluster, tmp_path: Path) -> None:
    """Without persisters events are safe but not written; the process is alive."""
    with ingest(tmp_path, fresh_log) as service:
        async with client_of(service) as client:
            status, answer = await client.manage("/readyz")
            assert (status, len(answer["reasons"])) == (503, 1)
            assert "persisters" in answer["reasons"][0]
            assert (await client.manage("/healthz"))[0] == 200


async def test_a_full_stream_is_503_until_there_is_room(fresh_log: Cluster, tmp_path: Path) -> None:
    """Nothing of what was refused is stored, and everything accepted is there."""
    body = b'{"event_type":"A","payload":"' + b"x" * 60_000 + b'"}'
    with ingest(tmp_path, fresh_log, FI_STREAM_MAX_BYTES="1MiB") as service:
        async with client_of(service) as client, jetstream(fresh_log) as js:
            answers = [await client.post("c-1", f"k{number}", body) for number in range(25)]
            accepted = [answer for status, answer in answers if status == 202]
            assert {answer["type"] for status, answer in answers if status != 202} == {"/problems/log-full"}
            assert (await js.stream_info(STREAM)).state.messages == len(accepted)
            await js.purge_stream(STREAM)
            assert (await client.post("c-1", "k24", body))[0] == 202


async def test_posts_go_on_when_a_node_dies(fresh_log: Cluster, tmp_path: Path) -> None:
    """The leader's death is a few seconds of waiting or 503; every key is stored once in the end."""
    with ingest(tmp_path, fresh_log, FI_PUBLISH_DEADLINE="15") as service:
        async with client_of(service) as client, jetstream(fresh_log) as js:
            await client.post("c-1", "first")
            leader = await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM)
            fresh_log.kill(leader)
            answers = await asyncio.gather(*(client.post(f"c-{n % 7}", f"k{n}") for n in range(50)))
            assert {status for status, _ in answers} == {202}
            assert (await js.stream_info(STREAM)).state.messages == 51
            assert {answer["sequence"] for _, answer in answers} == set(range(2, 52))


async def test_without_a_quorum_it_is_503_in_time_and_the_key_is_safe_to_retry(
    fresh_log: Cluster, tmp_path: Path
) -> None:
    """Two of three nodes down: no answer hangs, nothing is stored twice when they are back."""
    with ingest(tmp_path, fresh_log) as service:
        async with client_of(service) as client, jetstream(fresh_log) as js:
            await client.post("c-1", "first")
            for index in (0, 1):
                fresh_log.kill(index)
            started = time.monotonic()
            answers = await asyncio.gather(*(client.post("c-1", f"k{n}") for n in range(10)))
            assert time.monotonic() - started < DEADLINE + 15
            assert {(status, answer["type"]) for status, answer in answers} == {(503, "/problems/log-unavailable")}
            status, ready = await client.manage("/readyz")
            assert (status, bool(ready["reasons"])) == (503, True)

            for index in (0, 1):
                fresh_log.start_node(index)
            await asyncio.to_thread(fresh_log.wait_ready)

            async def accepted(key: str) -> bool:
                return (await client.post("c-1", key))[0] == 202

            for number in range(10):
                assert await eventually(partial(accepted, f"k{number}"))
            assert (await js.stream_info(STREAM)).state.messages == 11


async def test_sigterm_loses_nothing_that_was_accepted(fresh_log: Cluster, tmp_path: Path) -> None:
    """Clients post without a pause; then the process ends with 0, and exactly the accepted events are stored."""
    accepted: list[str] = []
    with ingest(tmp_path, fresh_log) as service:
        async with client_of(service) as client:

            async def post_on(name: str) -> None:
                for number in range(100_000):
                    try:
                        status, answer = await client.post(name, f"{name}-{number}")
                    except (ClientConnectionError, ConnectionError):
                        return
                    assert status == 202
                    accepted.append(answer["message_id"])

            posts = [asyncio.create_task(post_on(f"c-{number}")) for number in range(20)]
            await eventually(lambda: len(accepted) > 200)
            service.terminate()
            await asyncio.gather(*posts)
        assert await asyncio.to_thread(service.wait) == 0
        assert service.errors == ""
    events = [line["event"] for line in service.lines]
    assert events[-1] == "INGEST_STOPPED"
    assert "REQUEST_FAILED" not in events
    async with jetstream(fresh_log) as js:
        stored = (await js.stream_info(STREAM)).state.messages
    # a connection may be closed between a client's bytes and our reading them, never between storing and answering
    assert stored == len(accepted) == len(set(accepted))


async def test_a_service_that_starts_before_its_cluster_waits_for_it(tmp_path: Path, unused_tcp_port: int) -> None:
    """And says what it waits for."""
    settings = {"FI_LOG_URL": f"nats://127.0.0.1:{unused_tcp_port}", "FI_REPLICAS": "1", "FI_PORT": "0"}
    with Service(tmp_path, "services.ingest", FI_STREAM_MAX_BYTES="16MiB", **settings) as service:
        await asyncio.to_thread(service.wait_for, "LOG_AWAITED")
        node = Cluster(tmp_path / "node", nodes=1, client_ports=(unused_tcp_port,))
        try:
            await asyncio.to_thread(node.start)
            async with client_of(service) as client:
                assert (await client.post("c-1", "k"))[0] == 202
        finally:
            await asyncio.to_thread(node.stop_all)


def test_sigterm_while_it_waits_for_its_cluster_ends_it(tmp_path: Path) -> None:
    """In order, with 0, not after the whole startup timeout."""
    with Service(tmp_path, "services.ingest", FI_LOG_URL="nats://127.0.0.1:1", FI_PORT="0") as service:
        service.wait_for("LOG_AWAITED")
        service.terminate()
        assert service.wait() == 0
        assert service.errors == ""


def test_an_event_size_that_the_broker_does_not_take_is_refused_at_start(cluster: Cluster, tmp_path: Path) -> None:
    """Otherwise the broker would cut the connection at the first large event."""
    with ingest(tmp_path, cluster, FI_MAX_EVENT_BYTES="8MiB") as service:
        assert service.wait() == 2
        assert len(service.errors.splitlines()) == 1
        assert "max_payload" in service.errors


@pytest.fixture
def unused_tcp_port() -> int:
    """A free port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


async def test_an_ingest_whose_event_loop_hangs_ends_itself(fresh_log: Cluster) -> None:
    """Nothing reads its log, so a write to it blocks the loop; its supervisor starts it again then."""
    settings = {"FI_LOG_URL": fresh_log.url, "FI_STREAM_MAX_BYTES": "16MiB", "FI_DEAD_MAX_BYTES": "1MiB"}
    settings |= {"FI_PORT": str(port := free_ports(1)[0]), "FI_MANAGEMENT_PORT": "0", "FI_WATCHDOG": "2"}
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    command = [sys.executable, "-m", "services.ingest"]
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | settings, stdout=write)
    try:
        url = f"http://127.0.0.1:{port}/consultations/c-1/events"
        async with ClientSession(timeout=ClientTimeout(total=5)) as session:

            async def ended() -> bool:
                with suppress(ClientError, TimeoutError):
                    async with session.post(url, json={"event_type": "A"}) as response:
                        await response.read()
                return process.returncode is not None

            await eventually(ended)
    finally:
        if process.returncode is None:
            process.kill()
        os.close(read)
        os.close(write)
    assert 1 == await process.wait()
