"""Following a consultation: each event once, from a position on, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from aiohttp import ClientResponse

from services.ingest import following as module
from services.ingest.following import FOLLOWERS
from services.log.errors import CorpusAwayError, LogUnavailableError
from tests.support.description import check_answer
from tests.support.ingest import Edge, running_edge
from tests.support.polling import eventually

EVENTS = "/consultations/c-1/events"


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge(follow_interval=0.01) as edge:
        yield edge


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)


class Stream:
    """What a follower gets."""

    def __init__(self, response: ClientResponse) -> None:
        self.response = response
        self.ids: list[int] = []
        self.comments: list[str] = []
        self.records: list[dict[str, Any]] = []

    async def take(self, count: int) -> list[int]:
        """Return the ids of the next *count* events."""
        wanted = len(self.ids) + count
        async with asyncio.timeout(30):
            while len(self.ids) < wanted:
                await self.line()
        return self.ids[-count:]

    async def line(self) -> bytes:
        line = await self.response.content.readline()
        if not line:
            raise EOFError
        text = line.decode().rstrip("\n")
        if text.startswith("id: "):
            self.ids.append(int(text[4:]))
        elif text.startswith("data: "):
            self.records.append(orjson.loads(text[6:]))
        elif text.startswith(":"):
            self.comments.append(text)
        return line


@asynccontextmanager
async def following(edge: Edge, query: str = "", **headers: str) -> AsyncIterator[Stream]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with edge.client.get(f"{edge.url}{EVENTS}?follow=1{query}", headers=names) as response:
        assert response.status == 200, await response.read()
        # schemathesis sees no stream, for it has no end
        check_answer(edge.description, "GET", EVENTS, response, b"")
        yield Stream(response)


async def post(edge: Edge, count: int, consultation: str = "c-1") -> None:
    for number in range(count):
        await edge.post(consultation, b'{"event_type":"T","n":%d}' % number)


async def test_what_is_there_comes_first_and_then_what_is_new(edge: Edge) -> None:
    """As records, with the sequence as the event's id."""
    await post(edge, 3)
    async with following(edge) as stream:
        assert [1, 2, 3] == await stream.take(3)
        assert ("text/event-stream", "no-store") == (
            stream.response.headers["Content-Type"],
            stream.response.headers["Cache-Control"],
        )
        await post(edge, 1, "other")
        await post(edge, 2)
        assert [5, 6] == await stream.take(2)
        await stream.line()
        assert stream.ids == [record["sequence"] for record in stream.records]
    await eventually(lambda: edge.metric("fi_ingest_followers") == 0.0)
    assert 5.0 == edge.metric("fi_ingest_followed_events_total")


async def test_a_client_goes_on_where_it_was(edge: Edge) -> None:
    """Last-Event-ID counts more than after: the browser sends both when it connects again."""
    await post(edge, 5)
    async with following(edge, "&after=1", Last_Event_ID="3") as stream:
        assert [4, 5] == await stream.take(2)
    async with following(edge, "&after=4") as stream:
        assert [5] == await stream.take(1)
    async with following(edge, "&after=5") as stream:
        await post(edge, 1)
        assert [6] == await stream.take(1)


async def test_a_follower_may_choose_by_type_and_leave_bodies_out(edge: Edge) -> None:
    """What it does not get moves its position on all the same, which a comment tells from time to time."""
    await edge.post(body=b'{"event_type":"A"}')
    async with following(edge, "&type=B&bodies=0") as stream:
        await edge.post(body=b'{"event_type":"B"}')
        await edge.post(body=b'{"event_type":"A"}')
        await edge.post(body=b'{"event_type":"B","n":1}')
        assert [2, 4] == await stream.take(2)
        await stream.line()
        assert [("B", 18), ("B", 24)] == [(one["event_type"], one["bytes"]) for one in stream.records]
    assert 2.0 == edge.metric("fi_ingest_followed_events_total")


async def test_a_comment_names_the_position(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a client which is shown nothing does not begin anew when it reconnects."""
    monkeypatch.setattr(module, "KEEP_ALIVE_SECONDS", 0.02)
    async with following(edge, "&type=B") as stream:
        await post(edge, 3)
        async with asyncio.timeout(30):
            while 3 not in stream.ids:
                await stream.line()
    assert [] == stream.records


async def test_a_consultation_may_be_followed_before_its_first_event(edge: Edge) -> None:
    """A display is opened, then the visit begins."""
    async with following(edge) as stream:
        await post(edge, 1)
        assert [1] == await stream.take(1)


async def test_followers_of_one_consultation_share_the_looks_and_the_reads(edge: Edge) -> None:
    """Ten displays ask no more often than one; and each gets everything."""
    await post(edge, 2)
    async with following(edge) as first:
        assert [1, 2] == await first.take(2)
        others = [following(edge) for _ in range(9)]
        streams = [first, *[await other.__aenter__() for other in others]]
        for stream in streams[1:]:
            assert [1, 2] == await stream.take(2)
        before = edge.log.reads
        await post(edge, 3)
        for stream in streams:
            assert [3, 4, 5] == await stream.take(3)
        assert edge.log.reads - before <= 3
        for other in others:
            await other.__aexit__(None, None, None)


async def test_who_falls_behind_what_is_kept_reads_by_himself(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is skipped, whatever is kept for others."""
    monkeypatch.setattr(module, "_KEPT_EVENTS", 4)
    edge.log.page_events = 7
    async with following(edge) as stream:
        await post(edge, 60)
        assert list(range(1, 61)) == await stream.take(60)
        async with following(edge, "&after=20") as late:
            assert list(range(21, 61)) == await late.take(40)


async def test_an_outage_delays_and_skips_nothing(edge: Edge) -> None:
    """An election, a persister that is handed over: the connection stays."""
    await post(edge, 1)
    async with following(edge) as stream:
        assert [1] == await stream.take(1)
        edge.log.read_error = LogUnavailableError("an election")
        looks = edge.log.looks
        await post(edge, 3)
        await eventually(lambda: edge.log.looks > looks + 3)
        edge.log.read_error = None
        assert [2, 3, 4] == await stream.take(3)


async def test_an_outage_at_the_start_is_a_problem(edge: Edge) -> None:
    """As long as nothing was sent, it can be said properly."""
    edge.log.read_error = CorpusAwayError("nobody")
    reply = await edge.request("GET", EVENTS + "?follow=1")
    assert (503, "/problems/corpus-away") == (reply.status, reply.json["type"])
    assert 0.0 == edge.metric("fi_ingest_followers")


async def test_silence_is_broken_by_comments(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies close what is silent for long."""
    monkeypatch.setattr(module, "KEEP_ALIVE_SECONDS", 0.02)
    async with following(edge) as stream:
        async with asyncio.timeout(30):
            while len(stream.comments) < 3:
                await stream.line()


async def test_followers_beyond_the_limit_are_429() -> None:
    """Until one goes."""
    async with running_edge(max_followers=2, follow_interval=0.01) as edge:
        await post(edge, 1)
        async with following(edge) as first, following(edge):
            reply = await edge.request("GET", EVENTS + "?follow=1")
            assert (429, "/problems/too-many-followers") == (reply.status, reply.json["type"])
            assert reply.headers["Retry-After"]
            assert [1] == await first.take(1)
        await post(edge, 1)

        async def admitted() -> bool:
            async with edge.client.get(f"{edge.url}{EVENTS}?follow=1") as response:
                return response.status == 200

        await eventually(admitted)


async def test_a_client_that_goes_makes_room_at_once(edge: Edge) -> None:
    """Not with the next comment: who connects anew again and again would be kept out by himself."""
    await post(edge, 1)
    async with following(edge) as stream:
        assert [1] == await stream.take(1)
    await eventually(lambda: edge.metric("fi_ingest_followers") == 0.0, timeout=module.KEEP_ALIVE_SECONDS / 2)


async def test_a_client_that_does_not_read_is_let_go(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not take is not kept for it."""
    monkeypatch.setattr(edge.app[FOLLOWERS], "_slow", 0.2)
    for _ in range(40):
        await edge.post(body=b'{"event_type":"' + b"x" * 900_000 + b'"}')
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port, limit=1024)
    writer.write(f"GET {EVENTS}?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await eventually(lambda: edge.metric("fi_ingest_followers_dropped_total") == 1.0)
    await eventually(lambda: edge.metric("fi_ingest_followers") == 0.0)
    writer.close()


async def test_a_stop_ends_all_streams_in_an_orderly_way(edge: Edge) -> None:
    """With the end of the body, not with a cut: the client connects again with Last-Event-ID."""
    await post(edge, 1)
    async with following(edge) as stream:
        assert [1] == await stream.take(1)
        async with asyncio.timeout(5):
            await edge.server.stop()
            with pytest.raises(EOFError):
                await stream.take(1)
        assert stream.response.content.exception() is None


async def test_head_gets_the_headers_and_no_stream(edge: Edge) -> None:
    """It must not wait for news."""
    reply = await edge.request("HEAD", EVENTS + "?follow=1")
    assert (200, "text/event-stream", b"") == (reply.status, reply.headers["Content-Type"], reply.content)


async def test_what_cannot_take_a_stream_is_told(edge: Edge) -> None:
    """Accept without text/event-stream."""
    reply = await edge.request("GET", EVENTS + "?follow=1", headers={"Accept": "application/json"})
    assert (406, "/problems/not-acceptable") == (reply.status, reply.json["type"])


@pytest.mark.parametrize("parameter", ["limit=3", "before=3", "key=k"])
async def test_parameters_of_pages_do_not_go_with_a_stream(edge: Edge, parameter: str) -> None:
    """A client that asks for three events would otherwise wait for ever."""
    reply = await edge.request("GET", f"{EVENTS}?follow=1&{parameter}")
    assert (400, "before, key and limit do not go with follow=1.") == (reply.status, reply.json["detail"])


@pytest.mark.parametrize("value", ["", "x", "-1"])
async def test_a_malformed_last_event_id_is_refused(edge: Edge, value: str) -> None:
    """Rather than starting from the first event."""
    reply = await edge.request("GET", EVENTS + "?follow=1", headers={"Last-Event-ID": value})
    assert (400, "/problems/invalid-parameter") == (reply.status, reply.json["type"])


async def test_what_is_persisted_and_trimmed_between_two_looks_is_shown(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log shows nothing new then; now and then the corpus is asked all the same."""
    monkeypatch.setattr(module, "READ_ANYWAY_SECONDS", 0.05)

    async def nothing(consultation: str, after: int) -> bool:
        return False

    monkeypatch.setattr(edge.log.reader, "has_news", nothing)
    async with following(edge) as stream:
        await post(edge, 2)
        assert [1, 2] == await stream.take(2)


async def test_a_follower_that_begins_beyond_the_end_does_not_make_others_read_without_a_pause(edge: Edge) -> None:
    """What is new is shared from where the first of them is; the other asks for what is in between, now and then."""
    await post(edge, 1)
    async with following(edge, "&after=999999"), following(edge) as stream:
        assert [1] == await stream.take(1)
        before = edge.log.reads
        await asyncio.sleep(0.5)
        assert edge.log.reads - before < 100
        await post(edge, 1)
        assert [2] == await stream.take(1)
