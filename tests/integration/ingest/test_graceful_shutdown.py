"""Stopping."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import ClientConnectionError

from tests.support.ingest import MemoryLog, running_edge
from tests.support.polling import eventually

BODY = b'{"event_type":"A"}'


async def test_a_stop_finishes_what_is_in_flight_and_refuses_the_rest() -> None:
    """Also a request whose body is still on its way; then the log is closed."""
    log = MemoryLog(gate=asyncio.Event())
    assert log.gate is not None
    async with running_edge(log) as edge:
        stored = asyncio.create_task(edge.post(body=BODY))
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(b"POST /consultations/c/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: 18\r\n\r\n{")
        await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 2.0)

        stop = asyncio.create_task(edge.server.stop())
        await asyncio.sleep(0)
        with pytest.raises(ClientConnectionError):
            await edge.client.get(edge.url + "/problems/not-found")
        assert not log.closed
        writer.write(BODY[1:])
        log.gate.set()

        assert (await stored).status == 202
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(b"HTTP/1.1 202 ")
        assert b"Connection: close" in answer
        await stop
        writer.close()
        assert (len(log.events), log.closed) == (2, True)


async def test_while_it_stops_probes_are_told_so() -> None:
    """The management listener ends last: a balancer sees why no connection is accepted any more."""
    log = MemoryLog(gate=asyncio.Event())
    assert log.gate is not None
    async with running_edge(log) as edge:
        stored = asyncio.create_task(edge.post(body=BODY))
        await eventually(lambda: log.waiting == 1)
        stop = asyncio.create_task(edge.server.stop())
        await asyncio.sleep(0)
        reply = await edge.manage("/readyz")
        log.gate.set()
        await stop
        assert (503, ["the service is stopping"]) == (reply.status, reply.json["reasons"])
        assert 202 == (await stored).status


async def test_a_stop_waits_no_longer_than_the_grace_period() -> None:
    """What then is still in flight is cut off; its client retries with the same key."""
    log = MemoryLog(gate=asyncio.Event())
    async with running_edge(log, shutdown_grace=0.1) as edge:
        post = asyncio.create_task(edge.post(body=BODY))
        await eventually(lambda: log.waiting == 1)
        await asyncio.wait_for(edge.server.stop(), 5)
        with pytest.raises(ClientConnectionError):
            await post
        assert log.closed


async def test_a_second_stop_does_nothing() -> None:
    """The end of the block stops once more."""
    async with running_edge() as edge:
        await edge.server.stop()
