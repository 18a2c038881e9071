"""Requests in progress are bounded in number and memory, and slow clients keep no other client out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from services.ingest import admission
from services.ingest.admission import Admission, Reservation
from tests.support.ingest import Edge, MemoryLog, Reply, running_edge
from tests.support.polling import eventually

HEAD = (
    b"POST /consultations/c-1/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\n"
)


def body(size: int) -> bytes:
    """Return an event of so many bytes."""
    head, tail = b'{"event_type":"A","payload":"', b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


def refused(reply: Reply) -> bool:
    return reply.status == 429 and reply.json["type"].endswith("/too-many-in-flight") and "Retry-After" in reply.headers


@dataclass
class SlowClient:
    """A client that has sent a part of its body."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def status(self) -> int:
        """Return the status of its answer, which comes without more of the body."""
        return int((await self.reader.readline()).split()[1])


@asynccontextmanager
async def slow_clients(edge: Edge, count: int, promised: int, sent: bytes) -> AsyncIterator[list[SlowClient]]:
    """Connect *count* clients that promise a body of *promised* bytes and send *sent* of it."""
    clients = [SlowClient(*await asyncio.open_connection("127.0.0.1", edge.port)) for _ in range(count)]
    for client in clients:
        client.writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % promised + sent)
    await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == count)
    await eventually(lambda: edge.metric("fi_ingest_bytes_in_flight") == count * len(sent))
    yield clients
    for client in clients:
        client.writer.transport.abort()


async def test_bodies_that_wait_for_the_log_take_no_more_memory_than_they_may() -> None:
    """However many clients there are, and however long the cluster is frozen: the rest is told to come back."""
    gate = asyncio.Event()
    log = MemoryLog(gate=gate)
    async with running_edge(log, max_in_flight_bytes=2500, max_event_bytes=1000) as edge:
        posts = [asyncio.create_task(edge.post(body=body(1000))) for _ in range(10)]
        await eventually(lambda: sum(post.done() for post in posts) == 8)
        assert 2000 == edge.metric("fi_ingest_bytes_in_flight")
        assert 2 == log.waiting
        gate.set()
        replies = await asyncio.gather(*posts)
        assert [202, 202] == [reply.status for reply in replies if not refused(reply)]
        assert 8.0 == edge.metric("fi_ingest_publishes_total", outcome="too_many_in_flight")
        assert 202 == (await edge.post(body=body(1000))).status
        assert 0 == edge.metric("fi_ingest_bytes_in_flight")


async def test_a_body_in_chunks_counts_as_it_comes() -> None:
    """Its length is not known before."""

    async def chunks() -> AsyncIterator[bytes]:
        yield body(600)[:300]
        yield body(600)[300:]

    gate = asyncio.Event()
    async with running_edge(MemoryLog(gate=gate), max_in_flight_bytes=1000, max_event_bytes=1000) as edge:
        headers = {"Content-Type": "application/json"}
        first = asyncio.create_task(edge.request("POST", "/consultations/c-1/events", data=chunks(), headers=headers))
        await eventually(lambda: edge.metric("fi_ingest_bytes_in_flight") == 600)
        assert refused(await edge.request("POST", "/consultations/c-1/events", data=chunks(), headers=headers))
        gate.set()
        assert 202 == (await first).status


async def test_an_event_of_the_largest_size_is_always_taken_alone() -> None:
    """A smaller limit of the memory would refuse it for ever."""
    async with running_edge(max_in_flight_bytes=10, max_event_bytes=1000) as edge:
        assert 202 == (await edge.post(body=body(1000))).status


async def test_headers_alone_keep_no_client_out() -> None:
    """They hold nothing: the limits are of events that are stored, and of bytes that are here."""
    async with running_edge(max_in_flight=2, max_in_flight_bytes=1000, max_event_bytes=1000) as edge:
        async with slow_clients(edge, 50, promised=1000, sent=b""):
            assert 202 == (await edge.post(body=body(1000))).status
        await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 0)


async def test_slow_bodies_give_way_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is given up, and only as many as have to be; its client gets 429, the memory is free again."""
    monkeypatch.setattr(admission, "SLOW_SECONDS", 0.0)
    async with running_edge(max_in_flight_bytes=1000, max_event_bytes=1000) as edge:
        async with slow_clients(edge, 2, promised=600, sent=body(600)[:450]) as (first, second):
            assert 202 == (await edge.post(body=body(500))).status
            answered = {asyncio.create_task(client.status()): client for client in (first, second)}
            done, pending = await asyncio.wait(answered, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            assert [429] == [task.result() for task in done]
            (left,) = pending
            answered[left].writer.write(body(600)[450:])
            assert 202 == await left
        assert 0 == edge.metric("fi_ingest_bytes_in_flight")


async def test_bodies_that_are_on_their_way_for_a_moment_do_not_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a rush of clients would throw each other out, and none would be served."""
    monkeypatch.setattr(admission, "SLOW_SECONDS", 1000.0)
    async with (
        running_edge(max_in_flight_bytes=1000, max_event_bytes=1000) as edge,
        slow_clients(edge, 1, promised=1000, sent=body(1000)[:900]) as (first,),
    ):
        assert refused(await edge.post(body=body(500)))
        first.writer.write(body(1000)[900:])
        assert 202 == await first.status()


async def test_what_is_stored_is_never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client may get 202 any moment."""
    monkeypatch.setattr(admission, "SLOW_SECONDS", 0.0)
    gate = asyncio.Event()
    async with (
        running_edge(MemoryLog(gate=gate), max_in_flight_bytes=1000, max_event_bytes=1000) as edge,
        slow_clients(edge, 1, promised=1000, sent=body(1000)[:900]) as (slow,),
    ):
        slow.writer.write(body(1000)[900:])
        await eventually(lambda: edge.log.waiting == 1)
        assert refused(await edge.post(body=body(500)))
        gate.set()
        assert 202 == await slow.status()


async def test_a_client_that_goes_away_leaves_nothing_behind() -> None:
    """In the middle of its body."""
    async with running_edge() as edge:
        async with slow_clients(edge, 3, promised=1000, sent=b"{"):
            pass
        await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 0)
        assert 0 == edge.metric("fi_ingest_bytes_in_flight")


#: unfinished headers that count
UNFINISHED = b"GET /nope HTTP/1.1\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"a" * 5000) for n in range(2))


@asynccontextmanager
async def unfinished(edge: Edge, count: int) -> AsyncIterator[list[SlowClient]]:
    """Have *count* clients with unfinished headers."""
    clients = [SlowClient(*await asyncio.open_connection("127.0.0.1", edge.port)) for _ in range(count)]
    for client in clients:
        client.writer.write(UNFINISHED)
    await eventually(lambda: edge.metric("fi_ingest_bytes_in_flight") >= count * 10_000)
    yield clients
    for client in clients:
        client.writer.transport.abort()
    await eventually(lambda: edge.metric("fi_ingest_bytes_in_flight") == 0)


async def test_headers_count_like_bodies() -> None:
    """Unfinished ones, and those of a request until it is answered; beyond the limit it is 429."""
    gate = asyncio.Event()
    async with running_edge(MemoryLog(gate=gate), max_in_flight_bytes=25_000, max_event_bytes=1000) as edge:
        async with unfinished(edge, 2):
            answer = await edge.raw(UNFINISHED)
            assert b" 429 " in answer.partition(b"\r\n")[0]
            assert b"/problems/too-many-in-flight" in answer
        posting = asyncio.create_task(edge.post(X_Long="a" * 6000))
        await eventually(lambda: edge.log.waiting == 1)
        assert edge.metric("fi_ingest_bytes_in_flight") > 6000
        gate.set()
        assert 202 == (await posting).status
        await eventually(lambda: edge.metric("fi_ingest_bytes_in_flight") == 0)


async def test_slow_headers_give_way_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest, as with bodies."""
    monkeypatch.setattr(admission, "SLOW_SECONDS", 0.0)
    async with running_edge(max_in_flight_bytes=25_000, max_event_bytes=25_000) as edge, unfinished(edge, 2) as clients:
        assert 202 == (await edge.post(body=body(6000))).status
        assert 429 == await clients[0].status()
        clients[1].writer.write(b"Host: localhost\r\n\r\n")
        assert 404 == await clients[1].status()


async def test_long_headers_of_a_slow_body_give_way_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the body, also while nothing of it has come."""
    monkeypatch.setattr(admission, "SLOW_SECONDS", 0.0)
    async with running_edge(max_in_flight_bytes=15_000, max_event_bytes=15_000) as edge:
        slow = SlowClient(*await asyncio.open_connection("127.0.0.1", edge.port))
        slow.writer.write(HEAD + b"X: " + b"a" * 6000 + b"\r\nContent-Length: 10\r\n\r\n")
        await eventually(lambda: edge.metric("fi_ingest_bytes_in_flight") > 6000)
        assert 202 == (await edge.post(body=body(12_000))).status
        assert 429 == await slow.status()
        slow.writer.close()
        await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 0)
        assert 0 == edge.metric("fi_ingest_bytes_in_flight")


@pytest.mark.parametrize("end", [Reservation.release, Reservation.give_up])
def test_a_reservation_is_released_once(end: Callable[[Reservation], None]) -> None:
    """However it ends, and whatever ends it again."""
    whole = Admission(events=1, size=10)
    held = whole.reserve()
    held.take(b"12345")
    held.store()
    end(held)
    held.release()
    held.release()
    assert (0, 0) == (whole.size, whole.storing)
