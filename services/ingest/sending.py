"""Sends answers, each in a bounded time: who does not read what it asked for keeps nothing of ours for ever."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Protocol, cast

from aiohttp import web
from prometheus_client import Counter

#: of SO_LINGER: on, for no time
_DROP = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a client may take to take what was sent to it, and what counts those that did not."""

    seconds: float
    cut: Counter


class Sending:
    """What a connection still has to send. Costs nothing while the kernel takes all of it at once.

    The transport tells when it has to keep something (its high-water mark must be 1 byte) and when all has gone.
    """

    def __init__(self, patience: Patience) -> None:
        self._usual = self._patience = patience
        self._timer: asyncio.TimerHandle | None = None

    def allow(self, patience: Patience) -> None:
        """Be as patient until the end of this answer."""
        self._patience = patience

    def answered(self) -> None:
        """Be as patient as usual with the next answer."""
        self._patience = self._usual

    def waits(self, transport: asyncio.Transport) -> None:
        """Cut *transport* off, and count it, unless :meth:`goes_on` is called in time."""
        self._timer = asyncio.get_running_loop().call_later(self._patience.seconds, self._end, transport)

    def goes_on(self) -> None:
        """Everything was taken, or the client has gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, transport: asyncio.Transport) -> None:
        self._timer = None
        self._patience.cut.inc()
        cut_off(transport)


def allow(request: web.BaseRequest, patience: Patience) -> None:
    """Be as patient with the client of *request* until it has its answer."""
    cast("_Sender", request.protocol).sending.allow(patience)


class _Sender(Protocol):
    sending: Sending


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
