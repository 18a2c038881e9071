"""A keep-alive HTTP client that costs little, because it shares the processor with what it measures.

It sends complete requests and reads only status and length of the answers. There is no coroutine and no future for a
request: the answer's callback sends the next one. `docs/benchmarks.md` says what an event costs it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import cast

from benchmarks.tally import Tally
from services.cli.embedded.processes import LOOPBACK

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length:"
_ACCEPTED = 202


class Connection(asyncio.Protocol):
    """One client: it sends the next request when the last one is answered."""

    def __init__(self, requests: Iterator[bytes], tally: Tally, pause: float) -> None:
        self._requests = requests
        self._tally = tally
        self._pause = pause
        self._buffer = b""
        self._started = 0.0
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self._loop.create_future()

    def send(self) -> None:
        """Send the next request, or end when there is to be none."""
        if self.done.done() or self._transport is None:
            return
        if not self._tally.more():
            self.done.set_result(None)
            return
        request = next(self._requests)
        self._started = time.perf_counter()
        self._transport.write(request)

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take note of the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses

    def data_received(self, data: bytes) -> None:
        """Count the answer and send the next request, or wait for the rest of the answer."""
        if self._buffer:
            data = self._buffer + data
        status = answer_status(data)
        if not status:
            self._buffer = data
            return
        self._buffer = b""
        self._tally.count(self._started, accepted=status == _ACCEPTED)
        if self._pause:
            self._loop.call_later(self._pause, self.send)
        else:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the load: a server that is measured keeps its connections."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionResetError("the server closed the connection"))


def answer_status(data: bytes) -> int:
    """Return the status of the answer that *data* holds, or 0 as long as it is not complete."""
    head_end = data.find(_HEAD_END)
    if head_end < 0:
        return 0
    head = data[: head_end + 2].lower()
    place = head.find(_LENGTH)
    length = int(head[place + len(_LENGTH) : head.index(b"\r\n", place)]) if place >= 0 else 0
    return int(data[9:12]) if len(data) >= head_end + len(_HEAD_END) + length else 0


async def post_all(
    port: int, clients: int, requests: Iterator[bytes], tally: Tally, start: Callable[[], None], *, pause: float = 0.0
) -> None:
    """Let *clients* connections post until *tally* says that it is enough.

    Args:
        port: of the server, on loopback.
        clients: how many connections.
        requests: complete ones, without end.
        tally: counts the answers.
        start: called when all are connected and before the first one sends.
        pause: seconds between an answer and the next request of the same client.
    """
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(lambda: Connection(requests, tally, pause), LOOPBACK, port))[1]
        for _ in range(clients)
    ]
    try:
        start()
        for connection in connections:
            connection.send()
        await asyncio.gather(*(connection.done for connection in connections))
    finally:
        for connection in connections:
            connection.close()


def post(port: int, consultation: str, key: str, body: bytes) -> bytes:
    """Return the request that posts *body* to *consultation*."""
    return _request(port, f"/consultations/{consultation}/events", "application/json", key, body)


def post_batch(port: int, consultation: str, key: str, body: bytes) -> bytes:
    """Return the request that posts *body*, a line an event, to *consultation*."""
    return _request(port, f"/consultations/{consultation}/events/batch", "application/x-ndjson", key, body)


def _request(port: int, path: str, kind: str, key: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\n"
        f"Content-Type: {kind}\r\nIdempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
