"""The whole pipeline with least privilege: everything works, and no node sees a single refused subject."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from uuid import UUID

import nats.errors
import orjson
import pytest
from aiohttp import ClientSession
from nats.aio.msg import Msg

from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, Role
from services.log.jetstream.stream import DEAD_STREAM, STREAM
from tests.support.persisters import Contents, Persister, joined, persisted
from tests.support.polling import eventually
from tests.support.security import Secured, fiq
from tests.support.service import Service

#: of a snapshot, bytes, and how many of them the stream holds
_CHUNK, _WINDOWS = 16 * 2**10, 20
#: the deployment's settings of the log
LOG = {"FI_PARTITIONS": "4", "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "16MiB"}


@pytest.fixture(scope="module")
def provisioned(secured: Secured) -> Secured:
    """The streams, made by the provisioner as an operator does it."""
    done = fiq(secured.environment(Role.PROVISIONER) | LOG, "provision")
    assert (0, []) == (done.code, done.errors)
    return secured


@contextmanager
def persister(secured: Secured, folder: Path, data: Path, **settings: str) -> Iterator[Persister]:
    own = {**secured.environment(Role.PERSISTER), **LOG, **settings}
    with Persister(folder, secured.cluster, data, **own) as process:
        yield process


@asynccontextmanager
async def ingest(secured: Secured, folder: Path) -> AsyncIterator[str]:
    """Run the HTTP edge and yield its URL."""
    with Service(folder, "services.ingest", **secured.environment(Role.INGEST), **LOG, FI_PORT="0") as service:
        started = await asyncio.to_thread(service.wait_for, "INGEST_STARTED")
        yield f"http://127.0.0.1:{started['port']}"
        service.terminate()
        assert 0 == await asyncio.to_thread(service.wait)


async def post(url: str, count: int) -> Contents:
    """Post *count* events over some consultations and return what was accepted."""
    made: Contents = {}
    async with ClientSession() as session:
        for number in range(count):
            body = orjson.dumps({"event_type": "T", "payload": number})
            target = f"{url}/consultations/c{number % 5}/events"
            async with session.post(target, data=body, headers={"Content-Type": "application/json"}) as answer:
                document = await answer.json()
                assert 202 == answer.status, document
            made.setdefault(document["consultation_id"], []).append(UUID(document["message_id"]))
    return made


async def test_everything_works_and_nothing_is_refused(provisioned: Secured, tmp_path: Path) -> None:
    """Post, persist, read back, set aside, acknowledge, trim, take over, show: each as its own user, over TLS."""
    secured, data = provisioned, tmp_path / "data"
    with persister(secured, tmp_path / "first", data, FI_RETENTION="0") as first:
        await first.ready()
        async with ingest(secured, tmp_path) as url:
            accepted = [await post(url, 40)]
            await persisted(data, *accepted)
            async with secured.connected(Role.INGEST) as nc:
                await nc.request("fi.events.c1", b"garbage", timeout=10)
            with persister(secured, tmp_path / "second", data, FI_RETENTION="0") as second:
                await second.ready()
                accepted.append(await post(url, 40))
                first.process.kill()
                accepted.append(await post(url, 40))
                await persisted(data, *accepted)
                await _read_back(url, accepted)
                await _shown(secured, data)
                async with secured.connected(Role.OPS) as nc:
                    await _set_aside(nc)
                    await _trimmed(nc)
                await _operated(url)
                assert 0 == await second.end()
                assert "" == second.errors
                assert "LIBRARY" not in {line["event"] for line in second.lines}
    assert [] == secured.violations()


async def _read_back(url: str, accepted: list[Contents]) -> None:
    """Pages from corpus and stream, one event, the list, and a follower, which asks in other ways."""
    expected = joined(accepted)
    async with ClientSession() as session:
        for name, ids in expected.items():
            async with session.get(f"{url}/consultations/{name}/events?limit=1000") as answer:
                assert [str(one) for one in ids] == [event["message_id"] for event in (await answer.json())["events"]]
            async with session.get(f"{url}/consultations/{name}/events/{ids[-1]}") as answer:
                assert 200 == answer.status
            async with session.get(f"{url}/consultations/{name}/events?follow=1") as answer:
                await answer.content.readuntil(str(ids[-1]).encode())
        async with session.get(f"{url}/consultations") as answer:
            listed = [one["consultation_id"] for one in (await answer.json())["consultations"]]
        assert sorted(expected) == listed


async def _shown(secured: Secured, data: Path) -> None:
    """`fiq status` as ops sees nodes, partitions and, through the service API, who runs them."""
    done = await asyncio.to_thread(fiq, secured.environment(Role.OPS) | LOG, "status", "--json", "--corpus", str(data))
    assert 0 == done.code, done.errors
    overview = json.loads(done.out)
    assert ["n1", "n2", "n3"] == [node["name"] for node in overview["nodes"]]
    assert [1, 1, 1, 1] == [len(partition["owners"]) for partition in overview["partitions"]]


async def _set_aside(nc: Connection) -> None:
    async def dead() -> bool:
        info = await JetStreamApi(nc).stream_info(DEAD_STREAM)
        return info is not None and info["state"]["messages"] == 1

    await eventually(dead)


async def _operated(url: str) -> None:
    """What an operator sees and does through ingest: state, a dead letter that is dropped, a verification."""
    async with ClientSession() as session:
        async with session.get(f"{url}/pipeline") as answer:
            assert (200, 1) == (answer.status, (await answer.json())["dead_letters"])
        async with session.get(f"{url}/dead-letters") as answer:
            (letter,) = (await answer.json())["dead_letters"]
        path = f"{url}/dead-letters/{letter['sequence']}"
        async with session.get(path) as answer:
            assert "garbage" == (await answer.json())["body"]
        async with session.post(f"{path}/drop", json={"reason": "a test"}) as answer:
            assert 200 == answer.status
        async with session.get(f"{url}/dead-letters") as answer:
            assert [] == (await answer.json())["dead_letters"]
        for name in ("conflicts", "verification"):
            async with session.get(f"{url}/consultations/c1/{name}") as answer:
                assert 200 == answer.status


async def _trimmed(nc: Connection) -> None:
    async def empty() -> bool:
        info = await JetStreamApi(nc).stream_info(STREAM)
        return info is not None and info["state"]["messages"] == 0

    await eventually(empty)


@pytest.mark.parametrize("verb", ["PING", "INFO", "STATS"])
async def test_ops_sees_the_persisters_in_the_service_api(provisioned: Secured, tmp_path: Path, verb: str) -> None:
    """What `nats micro ls`, `info` and `stats` ask; a persister may answer, once for each question."""
    with persister(provisioned, tmp_path, tmp_path / "data", FI_STORE="other") as process:
        await process.port()
        async with provisioned.connected(Role.OPS) as nc:

            async def answered() -> bool:
                with contextlib.suppress(nats.errors.NoRespondersError):  # not subscribed yet
                    return bool((await nc.request(f"$SRV.{verb}", timeout=10)).data)
                return False

            await eventually(answered)
    assert [] == provisioned.violations()


async def test_ops_reads_a_message_and_takes_a_snapshot(provisioned: Secured) -> None:
    """`nats stream get` and `nats backup stream` of the events, which ops may read but not change."""
    async with provisioned.connected(Role.INGEST) as ingest_nc:
        for _ in range(_WINDOWS):
            await ingest_nc.request("fi.events.c1", os.urandom(_CHUNK), timeout=10)
        stored = orjson.loads((await ingest_nc.request("fi.events.c1", b"x", timeout=10)).data)
    async with provisioned.connected(Role.OPS) as nc:
        message = await eventually(lambda: JetStreamApi(nc).get_message(STREAM, stored["seq"]))
        assert message is not None
        assert b"x" == message["data"]
        chunks: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
        inbox = nc.new_inbox()

        async def take(chunk: Msg) -> None:
            if chunk.reply:  # without an answer now and then the server sends no more
                await chunk.respond(b"")
            await chunks.put((len(chunk.data), chunk.reply))

        await nc.subscribe(inbox, cb=take)
        request = {"deliver_subject": inbox, "no_consumers": True, "chunk_size": _CHUNK, "window_size": 2 * _CHUNK}
        await JetStreamApi(nc).request(f"STREAM.SNAPSHOT.{STREAM}", request)
        received = []
        async with asyncio.timeout(30):
            while (chunk := await chunks.get())[0]:
                received.append(chunk)
        assert sum(size for size, _ in received) >= _WINDOWS * _CHUNK
        assert any(reply.startswith(f"$JS.SNAPSHOT.ACK.{STREAM}.") for _, reply in received)
        assert [] == nc.violations
