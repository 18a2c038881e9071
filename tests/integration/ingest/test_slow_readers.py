"""Clients that ask and then do not read: what they hold is let go in time, and they with it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from services.ingest import reading
from tests.support.ingest import Edge, running_edge
from tests.support.polling import eventually

Run = Callable[[Coroutine[Any, Any, None]], None]
EVENTS = "/consultations/c-1/events"
PAGE = f"GET {EVENTS} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
DESCRIPTION = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"


#: the service's own loop, and the one that the other tests have: each buffers in its own way
both_loops = pytest.mark.parametrize("run", [asyncio.run, uvloop.run])


@pytest.fixture(autouse=True)
def large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is larger than all buffers between the two sides, as with the buffers of a small machine."""
    monkeypatch.setattr(reading, "PAGE_BYTES", 1 << 30)


async def fill(edge: Edge) -> None:
    """Post more than all buffers between the two sides hold."""
    for _ in range(20):
        await edge.post(body=b'{"event_type":"' + b"x" * 900_000 + b'"}')


@asynccontextmanager
async def deaf(edge: Edge, *requests: bytes) -> AsyncIterator[socket.socket]:
    """Send *requests* on a connection from which nothing is read."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", edge.port))
        sending = asyncio.create_task(loop.sock_sendall(client, b"".join(requests)))
        try:
            yield client
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await sending


async def was_cut(client: socket.socket) -> bool:
    """Read what came, and say whether a cut came behind it."""
    loop = asyncio.get_running_loop()
    try:
        while await loop.sock_recv(client, 1 << 20):
            pass
    except ConnectionResetError:
        return True
    return False


@both_loops
def test_a_page_that_is_not_read_holds_its_share_until_its_client_is_cut_off(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for ever: the next one is answered then."""
    monkeypatch.setattr("services.ingest.service.MAX_READS", 1)
    run(_ask_for_a_page_and_not_read())


async def _ask_for_a_page_and_not_read() -> None:
    async with running_edge(answer_timeout=1.0) as edge:
        await fill(edge)
        async with deaf(edge, PAGE) as client:
            await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 1.0)
            await eventually(lambda: edge.metric("fi_ingest_read_duration_seconds_count") == 1.0)
            assert 429 == (await edge.request("GET", EVENTS + "?limit=1")).status
            await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 0.0)
            assert await was_cut(client)
        assert 1.0 == edge.metric("fi_ingest_answers_cut_total")
        assert 200 == (await edge.request("GET", EVENTS + "?limit=1")).status


async def test_a_client_that_reads_gets_all_of_it() -> None:
    """However many buffers it takes."""
    async with running_edge() as edge:
        await fill(edge)
        assert 20 == len((await edge.request("GET", EVENTS)).json["events"])
        assert 0.0 == edge.metric("fi_ingest_answers_cut_total")


@both_loops
def test_answers_of_any_kind_must_be_read(run: Run) -> None:
    """Asked for by the hundred, they fill what lies between, and then the connection is cut."""
    run(_ask_often_and_not_read())


async def _ask_often_and_not_read() -> None:
    async with running_edge(answer_timeout=0.3, max_connections=1) as edge:
        async with deaf(edge, *[DESCRIPTION] * 2000) as client:
            await eventually(lambda: edge.metric("fi_ingest_answers_cut_total") == 1.0)
            assert await was_cut(client)
        await eventually(lambda: _served(edge))


async def _served(edge: Edge) -> bool:
    return (await edge.request("GET", "/problems/not-found")).status == 200


async def test_a_page_on_its_way_holds_back_the_end_of_the_process() -> None:
    """It is whole when its client reads on within the grace."""
    async with running_edge(shutdown_grace=10.0) as edge:
        await fill(edge)
        async with deaf(edge, PAGE) as client:
            await eventually(lambda: edge.metric("fi_ingest_read_duration_seconds_count") == 1.0)
            stop = asyncio.create_task(edge.server.stop())
            answer, loop = b"", asyncio.get_running_loop()
            while chunk := await loop.sock_recv(client, 1 << 20):
                answer += chunk
            await stop
        head, _, body = answer.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
