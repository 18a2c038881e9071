"""Clients that do not complete a request's headers, over raw sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.ingest import Edge, running_edge

GET = b"GET /problems/not-found HTTP/1.1\r\nHost: localhost\r\n\r\n"
#: a request that needs a token where tokens are required
ALLOWED = b"GET /consultations HTTP/1.1\r\nHost: localhost\r\n\r\n"
#: what the tests set, seconds
LIMIT = 0.3
#: and what they wait for it at most
SOON = 10.0


@asynccontextmanager
async def connected(edge: Edge) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def drip(writer: asyncio.StreamWriter) -> None:
    """Send a header without end, a byte at a time."""
    while not writer.is_closing():
        writer.write(b"x")
        await asyncio.sleep(LIMIT / 5)


@pytest.mark.parametrize("before", [b"", GET])
@pytest.mark.parametrize("begun", [b"G", b"POST /consultations/c/events HTTP/1.1\r\nHost: localhost\r\nX-A: b"])
async def test_headers_that_stop_are_408(before: bytes, begun: bytes) -> None:
    """The first request's and a later one's."""
    async with running_edge(header_timeout=LIMIT) as edge, connected(edge) as (reader, writer):
        if before:
            writer.write(before)
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
        writer.write(begun)
        answer = await asyncio.wait_for(reader.read(), SOON)
        assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        for part in (
            b"Connection: close\r\n",
            b"Content-Type: application/problem+json\r\n",
            b"/problems/header-timeout",
        ):
            assert part in answer
        assert 1.0 == edge.metric("fi_ingest_requests_total", status="408", problem="header-timeout")


async def test_bytes_that_drip_in_gain_no_time() -> None:
    """The time is for the headers, not for each of their bytes."""
    async with running_edge(header_timeout=LIMIT) as edge, connected(edge) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nX-A: ")
        dripping = asyncio.create_task(drip(writer))
        answer = await asyncio.wait_for(reader.read(), SOON)
        dripping.cancel()
        assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_sends_nothing_is_closed_without_an_answer() -> None:
    """Browsers and balancers open connections that they may never use: an answer would belong to no request."""
    async with running_edge(header_timeout=LIMIT) as edge, connected(edge) as (reader, _):
        assert b"" == await asyncio.wait_for(reader.read(), SOON)
        assert 0.0 == edge.metric("fi_ingest_requests_total", status="408", problem="header-timeout")


async def test_a_connection_between_two_requests_may_idle_longer() -> None:
    """That is what keep-alive is for, once a request was allowed."""
    async with running_edge(header_timeout=LIMIT) as edge, connected(edge) as (reader, writer):
        for request in (ALLOWED, GET):
            writer.write(request)
            assert (await asyncio.wait_for(reader.readuntil(b"}"), SOON)).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(3 * LIMIT)


async def test_before_a_request_is_allowed_the_next_one_must_come_as_soon() -> None:
    """A client without a token does not keep a connection that it does not use."""
    async with running_edge(header_timeout=LIMIT) as edge, connected(edge) as (reader, writer):
        for _ in range(3):
            await asyncio.sleep(LIMIT / 3)
            writer.write(GET)
            assert (await asyncio.wait_for(reader.readuntil(b"}"), SOON)).startswith(b"HTTP/1.1 200 ")
        started = time.monotonic()
        assert b"" == await asyncio.wait_for(reader.read(), SOON)
        assert time.monotonic() - started < 10 * LIMIT


async def test_a_body_has_its_own_time() -> None:
    """Its bytes are no headers, neither while they come nor for the idle time behind them."""
    async with running_edge(header_timeout=LIMIT) as edge, connected(edge) as (reader, writer):
        writer.write(b"POST /consultations/c/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: 18\r\n\r\n")
        started = time.monotonic()
        for byte in b'{"event_type":"A"}':
            writer.write(bytes([byte]))
            await asyncio.sleep(LIMIT / 6)
        assert (await asyncio.wait_for(reader.readuntil(b"}"), SOON)).startswith(b"HTTP/1.1 202 ")
        assert time.monotonic() - started > 2 * LIMIT
        await asyncio.sleep(2 * LIMIT)
        writer.write(GET)
        assert (await asyncio.wait_for(reader.readuntil(b"}"), SOON)).startswith(b"HTTP/1.1 200 ")
