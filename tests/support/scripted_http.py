"""An HTTP server in the test's own process that answers what a test says, as the real one does on bad days only."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson
from aiohttp import web

#: set at the end of the test, for those that never answer
_CLOSING: ContextVar[asyncio.Event] = ContextVar("closing")
#: answers one request
Step = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def key(self) -> str:
        return self.headers["Idempotency-Key"]


@dataclass
class ScriptedHttp:
    """Answers the n-th request by the n-th step, and each further one by the last.

    Attributes:
        seen: the requests, in order.
    """

    steps: Sequence[Step]
    seen: list[Seen] = field(default_factory=list)
    url: str = ""
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        number = len(self.seen)
        _CLOSING.set(self.closing)
        self.seen.append(
            Seen(request.method, request.path_qs, dict(request.headers), await request.read(), time.monotonic())
        )
        return await self.steps[min(number, len(self.steps) - 1)](request)


@asynccontextmanager
async def scripted(*steps: Step) -> AsyncIterator[ScriptedHttp]:
    """Run a server on a free port of loopback until the block ends."""
    server = ScriptedHttp(steps)
    runner = web.ServerRunner(web.Server(server.answer), shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        server.closing.set()
        await runner.cleanup()


@contextmanager
def serving(*steps: Step) -> Iterator[ScriptedHttp]:
    """Run a scripted server in a thread: the test's own may wait for a client."""
    ready: list[ScriptedHttp] = []
    started, stop = threading.Event(), threading.Event()

    async def run() -> None:
        async with scripted(*steps) as server:
            ready.append(server)
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    started.wait()
    try:
        yield ready[0]
    finally:
        stop.set()
        thread.join()


def accepted(sequence: int = 1, *, duplicate: bool = False) -> Step:
    """Take the event, whichever it is."""

    async def step(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"status": "accepted", **result("c-1", sequence, duplicate=duplicate)}, status=202)

    return step


def accepted_batch(*results: dict[str, object]) -> Step:
    """Take the events of a batch."""

    async def step(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"status": "accepted", "results": results}, status=202)

    return step


def result(consultation: str, sequence: int, *, duplicate: bool = False) -> dict[str, object]:
    """Return what is said of one stored event."""
    document: dict[str, object] = {"message_id": str(UUID(int=sequence)), "consultation_id": consultation}
    return document | {"sequence": sequence} | ({"duplicate": True} if duplicate else {})


def refused(status: int, slug: str, *, retry_after: str | None = None, **members: object) -> Step:
    """Answer with a problem."""

    async def step(request: web.BaseRequest) -> web.StreamResponse:
        document = {"type": f"/problems/{slug}", "title": slug, "status": status, "detail": f"About {slug}.", **members}
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        body = orjson.dumps(document)
        return web.Response(status=status, body=body, content_type="application/problem+json", headers=headers)

    return step


def says(status: int, body: bytes, media_type: str = "text/plain", **headers: str) -> Step:
    """Answer with anything."""

    async def step(request: web.BaseRequest) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=body, content_type=media_type, headers=named)

    return step


async def lost(request: web.BaseRequest) -> web.StreamResponse:
    """Break the connection instead of an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def silent(request: web.BaseRequest) -> web.StreamResponse:
    """Never answer, until the test ends."""
    await _CLOSING.get().wait()
    return web.Response()


def cut(status: int, body: bytes, media_type: str = "application/json") -> Step:
    """Break the connection in the middle of an answer."""

    async def step(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(
            status=status, headers={"Content-Type": media_type, "Content-Length": str(len(body) + 100)}
        )
        await response.prepare(request)
        await response.write(body)
        assert request.transport is not None
        request.transport.close()
        return response

    return step


def stream(*pieces: bytes, open_end: bool = False) -> Step:
    """Answer with Server-Sent Events, and end, or go silent."""

    async def step(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if open_end:
            await _CLOSING.get().wait()
        return response

    return step


async def every_line(request: web.BaseRequest) -> web.StreamResponse:
    """Accept each line of a batch; its sequence is the member ``n`` of the event."""
    lines = [orjson.loads(line) for line in (await request.read()).split(b"\n") if line]
    results = [result("c-1", line["n"]) for line in lines]
    return web.json_response({"status": "accepted", "results": results}, status=202)


#: times of each record
RECEIVED, WRITTEN = "2026-11-25T01:02:03.000000004Z", "2026-11-25T01:02:03.050000006Z"


def record(sequence: int, *, status: str = "persisted") -> dict[str, Any]:
    """Return an event of c-1 as the service returns it."""
    return {
        "sequence": sequence,
        "message_id": str(UUID(int=sequence)),
        "received": RECEIVED,
        "status": status,
        "written": WRITTEN if status == "persisted" else None,
        "event": {"event_type": "A", "n": sequence},
    }


def page(*sequences: int, more: bool = False, reached: int = 0) -> Step:
    """Answer with a page of events, perhaps with a link to the next one, which begins after *reached* or the last."""
    following = f"/consultations/c-1/events?after={reached or (sequences or (9,))[-1]}" if more else None
    document = {"consultation_id": "c-1", "events": [record(number) for number in sequences], "next": following}
    return says(200, orjson.dumps(document), "application/json")


def sent(sequence: int) -> bytes:
    """Return an event as a message of a stream."""
    return f"id: {sequence}\ndata: {orjson.dumps(record(sequence)).decode()}\n\n".encode()
