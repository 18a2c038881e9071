"""Limits over the real server: the backlog, connections, the depth of a body, and the files that a process may open."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.core.tokens import Scope, Token, digest_of, render
from services.ingest import service as module
from services.log.partitions import partition_of
from services.log.settings import LogSettings
from services.log.status import Backlog, LogState, StreamReport, Waiting
from tests.support.ingest import Edge, MemoryLog, running_edge
from tests.support.polling import eventually

#: a consultation of partition 0 of 2, and one of the other
STOPPED_AND_OTHER = [next(n for n in map("c{}".format, range(9)) if partition_of(n, 2) == p) for p in (0, 1)]
GET = b"GET /problems/not-found HTTP/1.1\r\nHost: localhost\r\n\r\n"
#: a request that needs a token where tokens are required
ALLOWED = b"GET /consultations HTTP/1.1\r\nHost: localhost\r\n\r\n"


def backlog(at: float, sequence: int, *events: int, still: tuple[int, ...] = ()) -> Backlog:
    """Return what waits in each partition."""
    return Backlog(at, sequence, tuple(Waiting(count, sequence, p in still) for p, count in enumerate(events)))


def stored(edge: Edge, sequence: int) -> None:
    """Let the log's status say that it has reached *sequence*."""
    edge.log.state = LogState(stream=StreamReport("", 16, "n1", (), sequence, 0, 1, 1, sequence))


@pytest.mark.parametrize("expect", [False, True])
async def test_beyond_the_backlog_it_is_503_with_the_time_that_draining_takes(
    monkeypatch: pytest.MonkeyPatch, expect: bool
) -> None:
    """Before the body is asked for; events are taken again when there is room."""
    monkeypatch.setattr(module, "BACKLOG_SECONDS", 0.02)
    async with running_edge(max_backlog=100) as edge:
        now = time.monotonic()
        edge.log.backlog = backlog(now - 5, 1000, 600)
        await eventually(lambda: edge.metric("fi_ingest_backlog_events") == 600.0)
        edge.log.backlog = backlog(now, 1000, 500)
        await eventually(lambda: 0 < edge.metric("fi_ingest_backlog_events") <= 500.0)
        headers: dict[str, Any] = {"Expect": "100-continue"} if expect else {}
        reply = await edge.post(**headers)
        assert (503, "/problems/backlog-full") == (reply.status, reply.json["type"])
        assert 15 <= int(reply.headers["Retry-After"]) <= 21
        assert 200 == (await edge.request("GET", "/problems/backlog-full")).status
        edge.log.backlog = backlog(time.monotonic(), 1500, 10)
        await eventually(lambda: edge.metric("fi_ingest_backlog_events") <= 10.0)
        assert 202 == (await edge.post()).status


async def test_beyond_the_duplicate_window_it_is_503_until_the_nodes_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever process stored the events: the log's last sequence counts."""
    monkeypatch.setattr(module, "BACKLOG_SECONDS", 0.02)
    async with running_edge(max_window_events=100, log_settings=LogSettings(duplicate_window=1)) as edge:
        assert 202 == (await edge.post()).status
        stored(edge, 5000)
        await eventually(lambda: 0.0 == edge.metric("fi_ingest_window_events"))
        await asyncio.sleep(0.1)
        stored(edge, 5100)
        await eventually(lambda: 100.0 == edge.metric("fi_ingest_window_events"))
        reply = await edge.post()
        assert (503, "/problems/window-full", "1") == (reply.status, reply.json["type"], reply.headers["Retry-After"])
        await eventually(lambda: 0.0 == edge.metric("fi_ingest_window_events"))
        assert 202 == (await edge.post()).status


async def test_what_the_backlog_refuses_does_not_count_against_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits and retries as it was told has its whole rate still."""
    monkeypatch.setattr(module, "BACKLOG_SECONDS", 0.02)
    async with running_edge(max_backlog=100, rate=0.001, rate_burst=1) as edge:
        edge.log.backlog = backlog(time.monotonic(), 1000, 600)
        await eventually(lambda: edge.metric("fi_ingest_backlog_events") == 600.0)
        assert [503] * 3 == [(await edge.post()).status for _ in range(3)]
        edge.log.backlog = backlog(time.monotonic(), 1500, 10)
        await eventually(lambda: edge.metric("fi_ingest_backlog_events") <= 10.0)
        assert [202, 429] == [(await edge.post()).status for _ in range(2)]


async def test_a_partition_that_stands_still_stops_its_own_clients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """G6: the others go on, although more waits in it than may wait in all."""
    monkeypatch.setattr(module, "BACKLOG_SECONDS", 0.02)
    async with running_edge(max_backlog=100) as edge:
        edge.log.backlog = backlog(time.monotonic(), 5000, 5000, 3, still=(0,))
        await eventually(lambda: edge.metric("fi_ingest_backlog_events") == 5003.0)
        stopped, other = [await edge.post(name) for name in STOPPED_AND_OTHER]
        assert (503, "/problems/backlog-full", "60") == (
            stopped.status,
            stopped.json["type"],
            stopped.headers["Retry-After"],
        )
        assert "Partition 00" in stopped.json["detail"]
        assert 202 == other.status
        edge.log.backlog = backlog(time.monotonic(), 5000, 40, 3)
        await eventually(lambda: edge.metric("fi_ingest_backlog_events") == 43.0)
        assert 202 == (await edge.post(STOPPED_AND_OTHER[0])).status


@pytest.mark.parametrize(("levels", "expected"), [(5, 202), (6, 422)])
async def test_a_body_that_is_too_deep_is_422(levels: int, expected: int) -> None:
    """The limit counts the event itself; brackets in strings mean nothing."""
    async with running_edge(max_json_depth=5) as edge:
        payload = b'["[[[[[[[[",' + b"[" * (levels - 2) + b"]" * (levels - 1)
        reply = await edge.post(body=b'{"event_type":"A","payload":' + payload + b"}")
        assert expected == reply.status
        assert expected == 202 or "more than 5 levels" in reply.json["detail"]


@asynccontextmanager
async def connected(
    edge: Edge, count: int, request: bytes = ALLOWED
) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """Have *count* connections, each with an answer to *request* already."""
    made = [await asyncio.open_connection("127.0.0.1", edge.port) for _ in range(count)]
    for reader, writer in made:
        writer.write(request)
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
    try:
        yield made
    finally:
        await close(writer for _, writer in made)


async def close(writers: Iterable[asyncio.StreamWriter]) -> None:
    """Close connections, whatever has become of them."""
    for writer in list(writers):
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_one_connection_too_many_is_told_so_and_closed() -> None:
    """Those that are served go on, and there is room again when one of them ends."""
    async with running_edge(max_connections=3) as edge, connected(edge, 3) as made:
        answer = await edge.raw(GET)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        for part in (b"Connection: close\r\n", b"Retry-After: 2\r\n", b"Content-Type: application/problem+json\r\n"):
            assert part in answer
        assert b"/problems/too-many-connections" in answer
        reader, writer = made[0]
        writer.write(GET)
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
        writer.close()

        async def served() -> bool:
            return (await edge.raw(GET)).startswith(b"HTTP/1.1 200 ")

        await eventually(served)


async def test_a_flood_of_connections_does_not_end_open_ones() -> None:
    """Silent ones are cut off after a moment, those beyond a hundred at once."""
    async with running_edge(max_connections=1) as edge, connected(edge, 1) as ((reader, writer),):
        flood = [await asyncio.open_connection("127.0.0.1", edge.port) for _ in range(150)]
        ends = [asyncio.create_task(one.read()) for one, _ in flood]
        writer.write(GET)
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
        results = await asyncio.wait_for(asyncio.gather(*ends, return_exceptions=True), 20)
        assert all(result == b"" or isinstance(result, ConnectionError) for result in results)
        await close(other for _, other in flood)


async def test_strangers_make_room_for_a_new_connection(tmp_path: Path) -> None:
    """The one that was answered longest ago; one on which a request was allowed is not closed."""
    tokens = tmp_path / "tokens"
    tokens.write_text(render([Token("writer", digest_of("secret"), frozenset(Scope))]))
    allowed = ALLOWED.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer secret\r\n\r\n")
    async with (
        running_edge(max_connections=5, token_file=str(tokens)) as edge,
        connected(edge, 2, allowed) as known,
        connected(edge, 3, GET) as strangers,
    ):

        async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            writer.write(GET)
            return (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")

        assert await served(*strangers[0])
        async with connected(edge, 1, allowed):
            assert b"" == await asyncio.wait_for(strangers[1][0].read(), 10)
            async with connected(edge, 1, allowed):
                assert b"" == await asyncio.wait_for(strangers[2][0].read(), 10)
                assert 2.0 == edge.metric("fi_ingest_connections_evicted_total")
                assert all([await served(*one) for one in (*known, strangers[0])])


async def test_a_stranger_whose_request_is_handled_is_not_closed() -> None:
    """It may be about to become known."""
    gate = asyncio.Event()
    async with running_edge(MemoryLog(gate=gate), max_connections=1) as edge:
        posting = asyncio.create_task(edge.post())
        await eventually(lambda: edge.log.waiting == 1)
        assert (await edge.raw(GET)).startswith(b"HTTP/1.1 503 ")
        gate.set()
        assert 202 == (await posting).status
        assert 0.0 == edge.metric("fi_ingest_connections_evicted_total")


@pytest.mark.parametrize(
    ("soft", "hard", "expected"), [(256, 256, "92 256"), (256, 4096, "2000 2164"), (4096, 4096, "2000 4096")]
)
def test_connections_fit_into_the_files_that_may_be_open(soft: int, hard: int, expected: str) -> None:
    """The limit is raised as far as it may be; a process without files could not even say what is wrong."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "from services.ingest.service import fit_open_files\nfrom services.ingest.settings import Settings\n"
        "found = fit_open_files(Settings())\n"
        "print(found.max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert f"{expected}\n" == done.stdout
