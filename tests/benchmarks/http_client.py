"""A keep-alive HTTP client that costs little: it shares two cores with what it measures.

It sends requests that are complete already and reads only what it must of the answers: status and length.
"""

from __future__ import annotations

import asyncio
from typing import cast

from services.cli.ports import LOOPBACK

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length:"


class Connection(asyncio.Protocol):
    """One connection with at most one request under way."""

    def __init__(self) -> None:
        self._buffer = b""
        self._answer: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()

    async def request(self, request: bytes) -> int:
        """Send *request* and return the status of its answer.

        Raises:
            ConnectionError: the server closed the connection.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self._answer = self._loop.create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take note of the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses

    def data_received(self, data: bytes) -> None:
        """Complete the answer, or wait for the rest of it."""
        self._buffer = self._buffer + data if self._buffer else data
        status = answer_status(self._buffer)
        if status and self._answer is not None and not self._answer.done():
            self._buffer = b""
            self._answer.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request under way."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server closed the connection"))


def answer_status(data: bytes) -> int:
    """Return the status of the answer that *data* holds, or 0 as long as it is not complete."""
    head_end = data.find(_HEAD_END)
    if head_end < 0:
        return 0
    head = data[: head_end + 2].lower()
    place = head.find(_LENGTH)
    length = int(head[place + len(_LENGTH) : head.index(b"\r\n", place)]) if place >= 0 else 0
    return int(data[9:12]) if len(data) >= head_end + len(_HEAD_END) + length else 0


async def connect(port: int) -> Connection:
    """Open a connection to *port* of loopback."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, LOOPBACK, port)
    return connection


def post_batch(port: int, consultation: str, key: str, body: bytes) -> bytes:
    """Return the request that posts *body*, a line an event, to *consultation*."""
    head = (
        f"POST /consultations/{consultation}/events/batch HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\n"
        f"Content-Type: application/x-ndjson\r\nIdempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def post(port: int, consultation: str, key: str, body: bytes) -> bytes:
    """Return the request that posts *body* to *consultation*."""
    head = (
        f"POST /consultations/{consultation}/events HTTP/1.1\r\nHost: {LOOPBACK}:{port}\r\n"
        f"Content-Type: application/json\r\nIdempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
