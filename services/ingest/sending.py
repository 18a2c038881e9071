"""Sends answers, each in a bounded time: who does not read what it asked for keeps nothing of ours for ever."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import Counter

#: of SO_LINGER: on, for no time
_DROP = struct.pack("ii", 1, 0)


@asynccontextmanager
async def taken_within(seconds: float, request: web.BaseRequest, cut: Counter) -> AsyncIterator[None]:
    """Give the client of *request* so many *seconds* to take what is sent inside; cut it off then, and count it.

    Raises:
        ConnectionResetError: it was cut off.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        cut.inc()
        if request.transport is not None:
            cut_off(request.transport)
        raise ConnectionResetError("the client did not take what was sent") from None


def cut_off(transport: asyncio.Transport) -> None:
    """End a connection without waiting for the other side; the kernel drops what it would have sent, too."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):  # it has gone
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DROP)
    transport.abort()


async def send(response: web.StreamResponse, request: web.Request) -> None:
    """Send *response* as a whole; aiohttp then finds nothing left to send."""
    await response.prepare(request)
    await response.write_eof()
