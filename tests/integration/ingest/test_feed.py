"""Following all consultations: what a client gets, what its token hides, and where it cannot go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import ClientResponse

from services.core.tokens import Scope, Token, digest_of, render
from services.ingest import following as module
from services.log.errors import LogUnavailableError
from tests.support.description import check_answer
from tests.support.ingest import Edge, MemoryLog, running_edge
from tests.support.polling import eventually

FEED = "/events?follow=1"


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge(follow_interval=0.01) as edge:
        yield edge


class Stream:
    """What a follower gets: lines until the next record, and the last position."""

    def __init__(self, response: ClientResponse) -> None:
        self.response = response
        self.position = -1

    async def line(self) -> str:
        async with asyncio.timeout(30):
            line = await self.response.content.readline()
        if not line:
            raise EOFError
        text = line.decode().rstrip("\n")
        if text.startswith("id: "):
            self.position = int(text[4:])
        return text

    async def take(self, count: int) -> list[dict[str, Any]]:
        """Return the next *count* records."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            text = await self.line()
            if text.startswith("data: "):
                found.append(orjson.loads(text[6:]))
                assert self.position == found[-1]["sequence"]
        return found

    async def until(self, position: int) -> None:
        """Read until the stream has told *position*."""
        while self.position != position:
            await self.line()


@asynccontextmanager
async def following(edge: Edge, query: str = "", **headers: str) -> AsyncIterator[Stream]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with edge.client.get(f"{edge.url}{FEED}{query}", headers=names) as response:
        assert response.status == 200, await response.read()
        check_answer(edge.description, "GET", FEED, response, b"")
        yield Stream(response)


def shown(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(one["consultation_id"], one["sequence"]) for one in records]


async def test_events_of_all_consultations_come_in_the_order_of_the_log(edge: Edge) -> None:
    """Without a position only new ones; each names its consultation, and not whether it is in HDF5."""
    await edge.post("a")
    async with following(edge) as stream:
        await stream.until(1)
        for name in ("b", "a", "c"):
            await edge.post(name, b'{"event_type":"T","of":"%b"}' % name.encode())
        records = await stream.take(3)
        assert [("b", 2), ("a", 3), ("c", 4)] == shown(records)
        assert ["consultation_id", "sequence", "message_id", "received", "event"] == list(records[0])
        assert {"event_type": "T", "of": "b"} == records[0]["event"]
        assert edge.log.events[1].event_id.hex == records[0]["message_id"].replace("-", "")


async def test_a_client_resumes_at_its_position(edge: Edge) -> None:
    """Last-Event-ID counts more than after, which a browser sends again."""
    for name in "abcd":
        await edge.post(name)
    async with following(edge, "&after=0") as stream:
        assert [("a", 1), ("b", 2), ("c", 3), ("d", 4)] == shown(await stream.take(4))
    async with following(edge, "&after=0", Last_Event_ID="2") as stream:
        assert [("c", 3), ("d", 4)] == shown(await stream.take(2))
        await edge.post("e")
        assert [("e", 5)] == shown(await stream.take(1))


async def test_events_are_chosen_and_shown_without_bodies(edge: Edge) -> None:
    """As when one consultation is followed."""
    await edge.post("a", b'{"event_type":"A"}')
    await edge.post("b", b'{"event_type":"B"}')
    async with following(edge, "&after=0&type=B&bodies=0&since=2000-01-01T00:00:00Z") as stream:
        (record,) = await stream.take(1)
    assert ("b", "B", 18) == (record["consultation_id"], record["event_type"], record["bytes"])
    assert "event" not in record


async def test_followers_of_all_share_the_looks_and_the_reads(edge: Edge) -> None:
    """Ten pages ask no more often than one."""
    streams = [following(edge) for _ in range(10)]
    opened = [await stream.__aenter__() for stream in streams]
    for stream in opened:
        await stream.until(0)
    before = edge.log.reads
    await edge.post("a")
    await edge.post("b")
    for stream in opened:
        assert [("a", 1), ("b", 2)] == shown(await stream.take(2))
    assert edge.log.reads - before <= 3
    for one in streams:
        await one.__aexit__(None, None, None)


async def test_a_token_sees_its_consultations_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its position moves on all the same; without the scope it sees nothing."""
    monkeypatch.setattr(module, "KEEP_ALIVE_SECONDS", 0.02)
    tokens = [
        Token("wards", digest_of("wards"), frozenset({Scope.READ}), prefix="ward-"),
        Token("poster", digest_of("poster"), frozenset({Scope.WRITE})),
    ]
    (tmp_path / "tokens").write_text(render(tokens))
    async with running_edge(follow_interval=0.01, token_file=str(tmp_path / "tokens")) as edge:
        poster = {"Authorization": "Bearer poster"}
        async with following(edge, Authorization="Bearer wards") as stream:
            await stream.until(0)
            for name in ("ward-1", "other", "ward-2", "other"):
                assert 202 == (await edge.post(name, Authorization=poster["Authorization"])).status
            assert [("ward-1", 1), ("ward-2", 3)] == shown(await stream.take(2))
            await stream.until(4)
        reply = await edge.request("GET", FEED, headers=poster)
        assert (403, "/problems/forbidden") == (reply.status, reply.json["type"])


async def test_a_position_that_the_log_no_longer_holds_is_410(edge: Edge) -> None:
    """And not a stream with a gap; the detail says from where on it goes."""
    for _ in range(5):
        await edge.post()
    edge.log.trimmed = 3
    reply = await edge.request("GET", FEED + "&after=2")
    assert (410, "/problems/position-gone") == (reply.status, reply.json["type"])
    assert "after=3" in reply.json["detail"]
    async with following(edge, "&after=3") as stream:
        assert [4, 5] == [one["sequence"] for one in await stream.take(2)]


async def test_a_stream_that_meets_a_gap_ends(edge: Edge) -> None:
    """In an orderly way, for all its followers: each gets the 410 when it connects again."""
    async with following(edge) as first, following(edge) as second:
        for stream in (first, second):
            await stream.until(0)
        edge.log.read_error = LogUnavailableError("an election")
        await edge.post()
        edge.log.trimmed = 1
        edge.log.read_error = None
        for stream in (first, second):
            with pytest.raises(EOFError):
                await stream.take(1)
    await eventually(lambda: edge.metric("fi_ingest_followers") == 0.0)
    assert 410 == (await edge.request("GET", FEED, headers={"Last-Event-ID": "0"})).status


async def test_a_log_without_one_order_is_501() -> None:
    """It says what to do instead."""
    async with running_edge(MemoryLog(has_feed=False)) as edge:
        reply = await edge.request("GET", FEED)
        assert (501, "/problems/no-feed") == (reply.status, reply.json["type"])


@pytest.mark.parametrize(
    "path", ["/events", "/events?follow=0", "/events?follow=1&after=x", "/events?follow=1&bodies=no"]
)
async def test_what_is_malformed_is_refused(edge: Edge, path: str) -> None:
    """Also a request for a page: there are none."""
    reply = await edge.request("GET", path)
    assert (400, "/problems/invalid-parameter") == (reply.status, reply.json["type"])
