"""Broken, slow and vanishing clients, over raw sockets: no 500, no hang, no leak."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ingest import Edge, running_edge
from tests.support.polling import eventually

BODY = b'{"event_type":"A"}'
POST = b"POST /consultations/c-1/events HTTP/1.1\r\nHost: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge(body_timeout=1) as edge:
        yield edge


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X%d: a\r\n" % n for n in range(200)) + b"\r\n",
        POST + JSON + b"Content-Length: -1\r\n\r\n",
        POST + JSON + b"Content-Length: 1e3\r\n\r\n",
        POST + JSON + b"Content-Length: 18\r\nContent-Length: 19\r\n\r\n" + BODY,
        POST + JSON + b"Content-Length: 18\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
        POST + JSON + JSON + b"Content-Length: 18\r\n\r\n" + BODY,
        POST + JSON + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
        POST + JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        POST + JSON + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}\r\n\r\nbroken",
        b"POST /consultations/c-1/events HTTP/1.1\r\nHost : t\r\n\r\n",
        b"POST /consultations/c-1/events HTTP/1.1\r\nH\x00st: t\r\n\r\n",
    ],
)
async def test_broken_http_is_400_as_a_problem(edge: Edge, request_bytes: bytes) -> None:
    """And the connection is closed: the start of the next request is unknown."""
    answer = await edge.raw(request_bytes)
    assert statuses(answer) == [400]
    assert b"/problems/malformed-request" in answer
    assert edge.log.events == []


#: three headers of 8,000 bytes
LONG = b"".join(b"X-%d: %b\r\n" % (n, b"a" * 8000) for n in range(3))


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /problems/not-found HTTP/1.1\r\nHost: localhost\r\n" + LONG + b"\r\n",
        b"GET /problems/not-found HTTP/1.1\r\nHost: localhost\r\n" + LONG,
        POST + JSON + LONG + b"Content-Length: 18\r\n\r\n" + BODY,
    ],
)
async def test_headers_that_are_too_long_together_are_431(edge: Edge, request_bytes: bytes) -> None:
    """Complete or not."""
    answer = await edge.raw(request_bytes)
    assert statuses(answer) == [431]
    assert b"/problems/headers-too-large" in answer
    assert edge.log.events == []


async def test_long_headers_after_a_request_close_the_connection(edge: Edge) -> None:
    """The request before gets its own answer."""
    first = POST + JSON + b"Content-Length: 18\r\n\r\n" + BODY
    edge.log.gate = asyncio.Event()
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(first)
    await eventually(lambda: edge.log.waiting == 1)
    writer.write(b"GET / HTTP/1.1\r\n" + LONG)
    await eventually(lambda: edge.metric("fi_ingest_bytes_in_flight") == 18.0)
    edge.log.gate.set()
    assert [202, 431] == statuses(await reader.read())
    writer.close()


async def test_what_is_around_a_body_is_bounded(edge: Edge) -> None:
    """Trailers, which no handler reads; chunks of one byte are within the bounds."""
    head = POST + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
    single = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"event_type":"A","x":"' + b"x" * 40_000 + b'"}')
    assert [202] == statuses(await edge.raw(head + single + b"0\r\n\r\n"))
    answer = await edge.raw(head + b"12\r\n" + BODY + b"\r\n0\r\n" + LONG[:-2])
    assert [400] == statuses(answer)
    assert 1 == len(edge.log.events)


@pytest.mark.parametrize("begin", [b"GET /problems/not-found HTTP/1.1\r\n", b"CONNECT localhost:80 HTTP/1.1\r\n"])
async def test_a_change_of_protocol_is_declined(edge: Edge, begin: bytes) -> None:
    """What follows is the next request, with the same bounds."""
    headers = b"Host: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    post = POST + JSON + b"Content-Length: 18\r\n\r\n" + BODY
    assert 202 == statuses(await edge.raw(begin + headers + post))[1]
    assert 431 == statuses(await edge.raw(begin + headers + post + b"GET / HTTP/1.1\r\n" + LONG))[-1]


async def test_many_requests_at_once_are_answered_in_their_order(edge: Edge) -> None:
    """Only two of them are parsed before they are handled."""
    posts = b"".join(
        POST + JSON + b"Idempotency-Key: %d\r\nContent-Length: 18\r\n\r\n%b" % (n, BODY) for n in range(1000)
    )
    assert [202] * 1000 == statuses(await edge.raw(posts))
    assert 1000 == len(edge.log.events)


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (POST + JSON + b"Content-Length: 18\r\n\r\n" + BODY, [202]),
        (POST + JSON + b"Transfer-Encoding: chunked\r\n\r\n12\r\n" + BODY + b"\r\n0\r\n\r\n", [202]),
        (b"POST /consultations/c-1/events HTTP/1.0\r\n" + JSON + b"Content-Length: 18\r\n\r\n" + BODY, [202]),
        ((POST + JSON + b"Content-Length: 18\r\n\r\n" + BODY) * 3, [202, 202, 202]),
        (POST + JSON + b"\r\n", [400]),
        (POST + JSON + b"Content-Length: 0\r\n\r\n", [400]),
        (POST + JSON + b"Expect: 100-continue\r\nContent-Length: 18\r\n\r\n" + BODY, [100, 202]),
        (POST + JSON + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n", [413]),
        (POST + b"Expect: 100-continue\r\nContent-Length: 18\r\n\r\n", [415]),
        (POST + JSON + b"Expect: tea\r\nContent-Length: 18\r\n\r\n" + BODY, [417]),
        (POST + JSON + b"Content-Length: 99999999\r\n\r\n", [413]),
        (b"GET /nope HTTP/1.1\r\nHost: localhost\r\nExpect: tea\r\n\r\n", [417]),
        (b"GET /nope HTTP/1.1\r\nHost: localhost\r\nExpect: \x80\r\n\r\n", [417]),
        (POST + JSON + b"Expect: \xe9\r\nContent-Length: 18\r\n\r\n" + BODY, [417]),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", [404]),
        (b"CONNECT t:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", [404]),
    ],
)
async def test_unusual_http_is_answered_in_its_kind(edge: Edge, request_bytes: bytes, expected: list[int]) -> None:
    """Pipelining, chunks, HTTP/1.0, expectations: a refusal comes before the body is asked for."""
    assert expected == statuses(await edge.raw(request_bytes))


@settings(max_examples=60, deadline=None, database=None)
@given(
    cut=st.integers(0, 200),
    junk=st.binary(max_size=40),
    head=st.sampled_from([POST + JSON, POST, b"GET / HTTP/1.1\r\n", b""]),
    framing=st.sampled_from([b"Content-Length: 18\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n12\r\n", b"\r\n", b""]),
)
def test_no_bytes_make_the_service_fail_or_hang(cut: int, junk: bytes, head: bytes, framing: bytes) -> None:
    """Whatever comes, the answer is no 5xx, and the next client is served."""

    async def one() -> None:
        async with running_edge() as edge:
            request = (head + framing + BODY)[:cut] + junk
            answer = await edge.raw(request, end=True)
            assert all(status < 500 for status in statuses(answer)), request
            assert (await edge.post(body=BODY)).status == 202
            await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 0.0)

    asyncio.run(one())


async def test_a_slow_body_is_408_within_its_time(edge: Edge) -> None:
    """A client that stops in the middle must not hold a request for ever; its connection is closed."""
    answer = await edge.raw(POST + JSON + b"Content-Length: 18\r\n\r\n{")
    assert statuses(answer) == [408]
    assert b"/problems/body-timeout" in answer


async def test_a_client_that_vanishes_while_sending_leaves_no_trace(
    edge: Edge, capsys: pytest.CaptureFixture[str]
) -> None:
    """No slot, no event, no line with an error."""
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(POST + JSON + b"Content-Length: 18\r\n\r\n{")
        await writer.drain()
        writer.transport.abort()
    await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 0.0)
    assert edge.log.events == []
    assert "REQUEST_FAILED" not in capsys.readouterr().out


async def test_a_client_that_vanishes_while_its_event_is_stored_does_not_stop_that(edge: Edge) -> None:
    """The event is stored as if the client had waited: its retry will find it."""
    edge.log.gate = asyncio.Event()
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(POST + JSON + b"Content-Length: 18\r\n\r\n" + BODY)
    await eventually(lambda: edge.log.waiting == 1)
    writer.transport.abort()
    edge.log.gate.set()
    await eventually(lambda: len(edge.log.events) == 1)
    await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 0.0)
