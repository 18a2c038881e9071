"""What is posted stands in the stream and in HDF5, and nowhere else: not in what the processes log, nor in metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import nats
import orjson
from aiohttp import ClientSession

from fiq.event import MESSAGE_ID_HEADER, RECEIVED_HEADER, event_id_from_key, message_id
from services.cli import monitoring
from services.cli.embedded.processes import Cluster
from tests.support.bodies import BARE, BODIES, MARK, drawn
from tests.support.persisters import Persister, corpus_of
from tests.support.polling import eventually
from tests.support.service import Service

#: bodies that are drawn
COUNT = 150
EVENTS, LINES = "application/json", "application/x-ndjson"
POISON = "fi_persister_dead_letters_total"
SHARED = {"FI_PARTITIONS": "4", "FI_REPLICAS": "1", "FI_STREAM_MAX_BYTES": "64MiB", "FI_LOG_LEVEL": "debug"}


async def test_no_log_and_no_metric_shows_a_payload(single_node: Cluster, tmp_path: Path) -> None:
    """Accepted, refused, posted again with another content, set aside as poison: whatever became of it."""
    bodies = drawn(BODIES, COUNT)
    assert all(MARK.encode() in body or body in BARE for body in bodies)
    settings = SHARED | {"FI_PORT": "0", "FI_LOG_URL": single_node.url}
    with (
        Persister(tmp_path, single_node, tmp_path / "data", **SHARED, FI_POISON_STREAK="0") as persister,
        Service(tmp_path, "services.ingest", **settings) as ingest,
    ):
        # given
        await persister.ready()
        started = await asyncio.to_thread(ingest.wait_for, "INGEST_STARTED")
        url = f"http://127.0.0.1:{started['port']}"

        # when
        stored = await post(url, bodies)
        poison = await publish(single_node.url, bodies)
        await eventually(lambda: sum(map(len, corpus_of(tmp_path / "data").values())) == stored)

        async def set_aside() -> bool:
            samples = await persister.samples()
            return sum(value for name, value in samples.items() if name.startswith(POISON)) >= poison

        await eventually(set_aside)

        # then
        for port in (started["management_port"], await persister.port()):
            for path in ("/metrics", "/readyz", "/healthz"):
                assert MARK not in (await asyncio.to_thread(monitoring.get, port, path))[1].decode()
        for process in (ingest, persister):
            process.terminate()
            assert 0 == await asyncio.to_thread(process.wait)
    events = {line["event"] for process in (ingest, persister) for line in process.lines}
    assert {"EVENT_QUEUED", "BATCH_QUEUED", "EVENT_PERSISTED", "EVENT_SET_ASIDE"} <= events
    logs = [path for process in (ingest, persister) for path in (process.log_path, process.error_path)]
    for log in [*logs, single_node.nodes[0].log]:
        assert MARK.encode() not in log.read_bytes(), log.name


async def post(url: str, bodies: Sequence[bytes]) -> int:
    """Post each as an event, another one with its key, each as a batch; return how many events are stored by that."""
    stored = 0
    async with ClientSession(url) as session:

        async def send(path: str, body: bytes, key: str, kind: str) -> int:
            headers = {"Content-Type": kind, "Idempotency-Key": key}
            async with session.post(path, data=body, headers=headers) as answer:
                content = await answer.read()
                assert answer.status in {202, 400, 422}, answer.status
                assert MARK.encode() not in content
                return len(orjson.loads(content).get("results", [1])) if answer.status == 202 else 0

        for number, body in enumerate(bodies):
            path, key = f"/consultations/c-{number % 7}/events", f"k{number}"
            first = await send(path, body, key, EVENTS)
            again = await send(path, b'{"event_type":"%b","other":1}' % MARK.encode(), key, EVENTS)
            assert {0, 1} == {first, again}
            stored += 1 + await send(f"{path}/batch", body, f"b{number}", LINES)
        good = b"\n".join(b'{"event_type":"%b","n":%d}' % (MARK.encode(), number) for number in range(20))
        return stored + await send("/consultations/c-1/events/batch", good, "good", LINES)


async def publish(url: str, bodies: Sequence[bytes]) -> int:
    """Put messages into the stream that ingest would not: none of them is an event. Return how many there are."""
    connection = await nats.connect(url)
    try:
        for number, body in enumerate(bodies):
            await connection.request("fi.events.p-1", body, timeout=10)
            name = message_id("p-1", event_id_from_key(f"p{number}"))
            for headers in ({MESSAGE_ID_HEADER: f"{MARK}{number}"}, {MESSAGE_ID_HEADER: name, RECEIVED_HEADER: MARK}):
                await connection.request("fi.events.p-1", body, headers=headers, timeout=10)
    finally:
        await connection.close()
    return 3 * len(bodies)
