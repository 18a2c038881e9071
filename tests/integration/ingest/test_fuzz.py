"""Whatever clients send: bodies, headers, ids, paths and broken HTTP; no 500, no hang, nothing of it in the log.

`test_broken_http.py` has the cases that are known; here they are drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from services.core.tokens import Scope, Token, digest_of, render
from tests.support.bodies import BARE, BODIES, MARK
from tests.support.ingest import Edge, running_edge
from tests.support.polling import eventually

#: more of them in `make torture`
EXAMPLES = 1500 if os.environ.get("FIQ_TORTURE") == "long" else 60
#: of a test, seconds: a request that has no end takes half a second until it is given up
pytestmark = pytest.mark.timeout(120 + EXAMPLES)
#: seconds within which each answer must be here
PATIENCE = 15.0
EVENTS = b"/consultations/c-1/events"
VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40)
NAMES = st.sampled_from(
    [
        "Content-Type",
        "Content-Encoding",
        "Idempotency-Key",
        "Accept",
        "Authorization",
        "Expect",
        "X-Forwarded-For",
        "Traceparent",
        "Range",
        "If-Match",
        "Upgrade",
        "Cookie",
        "Transfer-Encoding",
        "Content-Length",
        "Connection",
        "Host",
    ]
)
VALUES = st.one_of(
    VISIBLE,
    st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")),
    st.sampled_from(
        ["chunked", "gzip", "100-continue", "0", "18", "-1", "close", "keep-alive", "websocket", "h2c", "1" * 5000]
    ),
)
#: header fields that say where a request ends, or whether it is one at all
FRAMING = {"Transfer-Encoding", "Content-Length", "Connection", "Host", "Upgrade", "Content-Type"}
WORDS = st.sampled_from(["", "0", "1", "17", "-1", "9" * 30, "c-1", "application/json", "*/*;q=0", "bytes=0-1", "%"])
KINDS = [
    "application/json",
    "application/x-ndjson",
    "application/cloudevents+json",
    "application/cloudevents-batch+json",
    "application/json; charset=latin-1",
    "text/plain",
    MARK,
]
ROUTES = [
    "/consultations/c-1/events",
    "/consultations/c-1/events/batch",
    "/consultations/c-1/events/00000000-0000-0000-0000-000000000001",
    "/consultations",
    "/events",
    "/events/batch",
    "/problems/not-found",
    "/openapi.json",
    "/elsewhere",
]
PATHS = st.one_of(
    st.binary(max_size=80).map(lambda raw: b"/" + raw),
    VISIBLE.map(lambda text: f"/consultations/{text}/events".encode()),
    st.lists(
        st.sampled_from(["consultations", "events", "..", ".", "", "%2e", "%00", "%", "c-1", "*"]), max_size=6
    ).map(lambda parts: ("/" + "/".join(parts)).encode()),
    st.just(EVENTS),
)


class Records(logging.Handler):
    """All that libraries log through the standard module, with their exceptions."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@contextlib.contextmanager
def records() -> Iterator[list[str]]:
    handler, root = Records(), logging.getLogger()
    root.addHandler(handler)
    try:
        yield handler.texts
    finally:
        root.removeHandler(handler)


def run(check: Callable[[Edge], Awaitable[None]], **options: Any) -> None:
    """Run *check* on a server of its own; afterwards it serves, holds nothing, and its log is clean."""

    async def all_of_it() -> None:
        with capture_logs() as entries, records() as texts:
            async with running_edge(header_timeout=0.5, body_timeout=0.5, **options) as edge:
                async with asyncio.timeout(PATIENCE):
                    await check(edge)
                await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 0.0)
                assert 0.0 == edge.metric("fi_ingest_bytes_in_flight")
                assert (await edge.request("GET", "/problems/not-found")).status == 200
                for page in (await edge.manage("/metrics"), await edge.manage("/readyz")):
                    assert MARK.encode() not in page.content
        assert MARK not in str(entries)
        assert MARK not in "\n".join(texts)
        assert "REQUEST_FAILED" not in {entry["event"] for entry in entries}

    asyncio.run(all_of_it())


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


async def sent(edge: Edge, request: bytes) -> list[int]:
    """Send bytes, and return the statuses up to the answer, or to the end of the connection, one of which must come.

    That is so for half a request as well: it is given up when its time is over.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    writer.write(request)
    answer = b""
    try:
        async with asyncio.timeout(PATIENCE):
            while all(status < 200 for status in statuses(answer)) and (chunk := await reader.read(65536)):
                answer += chunk
    except ConnectionError:
        pass
    writer.transport.abort()
    assert MARK.encode() not in answer
    return statuses(answer)


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(st.lists(BODIES, min_size=1, max_size=8))
def test_no_body_makes_it_fail(bodies: list[bytes]) -> None:
    """Each is an event, or a problem that says why not; what is stored is what was sent."""

    async def check(edge: Edge) -> None:
        for number, body in enumerate(bodies):
            assert MARK.encode() in body or body in BARE
            reply = await edge.post(body=body, Idempotency_Key=f"k{number}")
            assert reply.status in {202, 400, 422}, reply
            if reply.status == 202:
                assert edge.log.events[-1].body == body.translate(bytes.maketrans(b"\r\n", b"  "))
                assert isinstance(orjson.loads(body)["event_type"], str)
            else:
                assert MARK.encode() not in reply.content

    run(check)


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(
    method=st.sampled_from([b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"DELETE", b"PROPFIND", b"BREW", b""]),
    path=PATHS,
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=8),
    body=BODIES,
    query=st.binary(max_size=20),
)
def test_no_request_makes_it_fail_or_hang(
    method: bytes, path: bytes, headers: list[tuple[str, str]], body: bytes, query: bytes
) -> None:
    """Written to the socket as it is, however broken."""
    lines = [f"{name}: {value}".encode("latin-1") for name, value in headers]
    target = path + b"?" + MARK.encode() + query
    head = b"\r\n".join(
        [method + b" " + target + b" HTTP/1.1", b"Host: localhost", b"X-Mark: " + MARK.encode(), *lines]
    )
    length = b"" if any(name == "Content-Length" for name, _ in headers) else b"\r\nContent-Length: %d" % len(body)

    async def check(edge: Edge) -> None:
        found = await sent(edge, head + length + b"\r\n\r\n" + body)
        assert all(status < 500 for status in found), found

    run(check)


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(
    method=st.sampled_from(["POST", "POST", "GET", "HEAD", "OPTIONS", "DELETE"]),
    path=st.sampled_from(ROUTES),
    query=st.lists(st.tuples(st.sampled_from(["after", "limit", "follow", "prefix", MARK]), WORDS), max_size=3),
    headers=st.dictionaries(NAMES.filter(lambda name: name not in FRAMING), VISIBLE | WORDS, max_size=4),
    kind=st.sampled_from(KINDS),
    body=BODIES,
    part=st.sampled_from([1.0] * 7 + [0.1, 0.5, 0.9]),
)
def test_no_request_that_is_good_http_makes_it_fail_or_hang(
    method: str,
    path: str,
    query: list[tuple[str, str]],
    headers: dict[str, str],
    kind: str,
    body: bytes,
    part: float,
) -> None:
    """The parser has nothing against it, so the handlers get it; now and then its end never comes."""
    lines = [
        f"{method} {path}?{urlencode(query)} HTTP/1.1",
        "Host: localhost",
        f"X-Mark: {MARK}",
        f"Content-Length: {len(body)}",
    ]
    lines += [f"{name}: {value}" for name, value in ({"Content-Type": kind} | headers).items()]
    request = "\r\n".join([*lines, "", ""]).encode() + body

    async def check(edge: Edge) -> None:
        sending = request[: math.ceil(len(request) * part)]
        # a client that has sent nothing in time gets no answer, and a busy machine may take that long to read it
        found = await sent(edge, sending) or await sent(edge, sending)
        assert found
        assert all(status < 500 for status in found), found

    run(check)


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(consultation=st.one_of(VISIBLE, st.text(max_size=140)), key=st.one_of(VISIBLE, st.text(max_size=300)))
def test_no_id_makes_it_fail(consultation: str, key: str) -> None:
    """What is none is refused as what it is, and never becomes a subject of the log."""
    shown = consultation.encode("utf-8", "surrogatepass").hex("%") if consultation else ""
    raw_key = key.encode("utf-8", "surrogatepass").replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")
    path = b"/consultations/%" + shown.encode() if shown else b"/consultations/"
    head = b"POST " + path + b"/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Idempotency-Key: " + raw_key + b"\r\nContent-Length: 18\r\n\r\n" + b'{"event_type":"A"}'

    async def check(edge: Edge) -> None:
        (status,) = await sent(edge, head)
        assert status in {202, 400, 404}
        assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,128}", event.consultation) for event in edge.log.events)
        assert (status == 202) == bool(edge.log.events)

    run(check)


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(value=st.one_of(VISIBLE, st.binary(max_size=80).map(lambda raw: raw.decode("latin-1"))))
def test_no_credentials_but_the_right_ones_get_through(tmp_path_factory: pytest.TempPathFactory, value: str) -> None:
    """Nor do they make it fail."""
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(render([Token("one", digest_of("the-right-one"), frozenset({Scope.WRITE}))]))
    clean = value.replace("\r", "").replace("\n", "")
    head = f"POST /consultations/c-1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: {clean}\r\n"
    request = (
        head.encode("latin-1") + b"Content-Type: application/json\r\nContent-Length: 18\r\n\r\n" + b'{"event_type":"A"}'
    )

    async def check(edge: Edge) -> None:
        (status,) = await sent(edge, request)
        assert status in {400, 401}
        assert [] == edge.log.events

    run(check, token_file=str(path))


def test_what_is_drawn_is_sent_and_answered() -> None:
    """The helpers see a good request through: or no example could fail."""

    async def check(edge: Edge) -> None:
        head = (
            b"POST "
            + EVENTS
            + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n"
        )
        assert [202] == await sent(edge, head + b'{"event_type":"A"}')

    run(check)
