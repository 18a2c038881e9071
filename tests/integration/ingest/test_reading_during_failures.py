"""Reading over HTTP from real ingest, persisters and three nodes, also while some of them die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from aiohttp import ClientConnectorError, ClientSession

from services.cli.embedded.processes import Cluster
from services.log.jetstream.stream import STREAM
from tests.support.persisters import PARTITIONS, Persister
from tests.support.pipelines import follow
from tests.support.polling import eventually
from tests.support.service import Service

#: how long requests in flight may take after SIGTERM, seconds
GRACE = 20.0


class Reader:
    """Posts and reads through one ingest process.

    Attributes:
        cuts: how connections of followers ended that were not ended in an orderly way.
    """

    def __init__(self, session: ClientSession, port: int) -> None:
        self.cuts: list[Exception] = []
        self._session = session
        self.url = f"http://127.0.0.1:{port}"

    async def post(self, consultation: str, key: str) -> int:
        """Post until it is accepted, and return the sequence."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        body = orjson.dumps({"event_type": "T", "key": key})
        url = f"{self.url}/consultations/{consultation}/events"

        async def accepted() -> int:
            async with self._session.post(url, data=body, headers=headers) as response:
                document = orjson.loads(await response.read())
                assert response.status == 202, document
                return int(document["sequence"])

        return await eventually(accepted)

    async def get(self, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
        async with self._session.get(self.url + path, headers=headers) as response:
            return response.status, orjson.loads(await response.read())

    async def follow(self, consultation: str, seen: list[int]) -> None:
        """Append the ids of all events to *seen*, for ever."""
        await follow(self._session, self.url, consultation, seen, self.cuts)


@asynccontextmanager
async def ingesting(folder: Path, cluster: Cluster) -> AsyncIterator[tuple[Reader, Service]]:
    settings = {"FI_PORT": "0", "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "1MiB", "FI_LOG_URL": cluster.url}
    with Service(
        folder, "services.ingest", **settings, FI_PARTITIONS=str(PARTITIONS), FI_SHUTDOWN_GRACE=str(GRACE)
    ) as service:
        started = await asyncio.to_thread(service.wait_for, "INGEST_STARTED")
        async with ClientSession() as session:
            yield Reader(session, started["port"]), service


def persister(folder: Path, cluster: Cluster, data: Path, **settings: str) -> Persister:
    return Persister(folder, cluster, data, FI_DEAD_MAX_BYTES="1MiB", **settings)


async def test_an_event_is_queued_and_then_persisted(fresh_log: Cluster, tmp_path: Path) -> None:
    """Each read shows it from the moment of its 202 on; the list of consultations once it is in HDF5."""
    async with ingesting(tmp_path, fresh_log) as (reader, _):
        sequence = await reader.post("c-1", "k")
        status, page = await reader.get("/consultations/c-1/events")
        assert (200, [(sequence, "queued")]) == (status, [(e["sequence"], e["status"]) for e in page["events"]])
        event = f"/consultations/c-1/events/{page['events'][0]['message_id']}"
        assert (200, "queued") == ((await reader.get(event))[0], (await reader.get(event))[1]["status"])
        status, problem = await reader.get("/consultations")
        assert (503, "/problems/corpus-away") == (status, problem["type"])
        with persister(tmp_path, fresh_log, tmp_path / "data") as one:
            await one.ready()

            async def settled() -> bool:
                return (await reader.get(event))[1].get("status") == "persisted"

            await eventually(settled)
            _, page = await reader.get("/consultations/c-1/events")
            assert [(sequence, "persisted", {"event_type": "T", "key": "k"})] == [
                (e["sequence"], e["status"], e["event"]) for e in page["events"]
            ]
            _, listed = await reader.get("/consultations")
            assert [("c-1", 1)] == [(one["consultation_id"], one["events"]) for one in listed["consultations"]]
            status, problem = await reader.get("/consultations/c-1/events/6f1b1d4e-0000-4000-8000-000000000000")
            assert (404, "/problems/unknown-event") == (status, problem["type"])


async def test_a_follower_misses_and_repeats_nothing_when_processes_die(fresh_log: Cluster, tmp_path: Path) -> None:
    """The stream's leader, the owner of the partition, and then the very process that it follows through."""
    posted: list[int] = []
    seen: list[int] = []
    data = tmp_path / "data"

    async def post_some(reader: Reader, name: str) -> None:
        posted.extend([await reader.post("c-1", f"{name}-{number}") for number in range(40)])

    with (
        persister(tmp_path / "a", fresh_log, data) as first,
        persister(tmp_path / "b", fresh_log, data) as second,
    ):
        await first.ready()
        await second.ready()
        async with ingesting(tmp_path, fresh_log) as (reader, service):
            following = asyncio.create_task(reader.follow("c-1", seen))
            await post_some(reader, "before")
            await eventually(lambda: posted == seen)

            fresh_log.kill(await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM))
            await post_some(reader, "leader")
            await eventually(lambda: posted == seen)

            first.process.kill()
            await post_some(reader, "owner")
            await eventually(lambda: posted == seen)
            assert not following.done()

            service.terminate()
            assert 0 == await asyncio.to_thread(service.wait)
            following.cancel()
            assert not [cut for cut in reader.cuts if not isinstance(cut, ClientConnectorError)]
        (tmp_path / "again").mkdir()
        async with ingesting(tmp_path / "again", fresh_log) as (reader, _):
            following = asyncio.create_task(reader.follow("c-1", seen))
            await post_some(reader, "ingest")
            await eventually(lambda: posted == seen)
            following.cancel()
            _, page = await reader.get("/consultations/c-1/events?limit=1000")
            assert posted == [event["sequence"] for event in page["events"]]
    assert not [line for line in service.lines if line["event"] in ("REQUEST_FAILED", "FOLLOWING_FAILED")]
