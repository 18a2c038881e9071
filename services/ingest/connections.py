"""How many connections one process has, and what those beyond it get.

A connection counts from the end of its TLS handshake on; only time bounds handshakes, as asyncio does not show them.
There are files for all connections and for those that are turned away (:func:`within`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import resource
import socket
import struct
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol, cast

from aiohttp import web
from prometheus_client import Counter

from services.ingest import problems
from services.ingest.answers import Answers
from services.ingest.settings import Settings

#: of SO_LINGER: on, for no time
_DROP = struct.pack("ii", 1, 0)
#: seconds in which a client that is turned away gets to send its request and to read the answer
_PATIENCE = 2.0
#: clients that are being turned away at the same time; more are cut off without an answer
_MOST_TURNED = 100
#: files that a process has open besides its clients' connections: the log, both listeners, the libraries
_OTHER_FILES = 64


class Connections:
    """Counts the connections of one process.

    Args:
        limit: of connections that are served at the same time.
        answers: makes the answer of those beyond it.
    """

    def __init__(self, limit: int, answers: Answers) -> None:
        self._limit = limit
        self._answers = answers
        self._open = 0
        self._turned = 0
        self._closed = False

    def enter(self, transport: asyncio.BaseTransport | None) -> bool:
        """Count a new connection, or turn it away when there are as many as may be; say which."""
        if self._open < self._limit and not self._closed:
            self._open += 1
            return True
        sender = cast("asyncio.Transport", transport)
        if self._turned >= _MOST_TURNED or self._closed:
            sender.set_protocol(asyncio.Protocol())  # which does not care how it ends
            sender.abort()
        else:
            self._turned += 1
            sender.set_protocol(_Turned(sender, self))
        return False

    def leave(self) -> None:
        """Count the end of one that was served."""
        self._open -= 1

    def close(self) -> None:
        """Cut off whoever comes from now on: out of a handshake that was begun before the listener was closed."""
        self._closed = True

    def _refusal(self) -> bytes:
        return in_bytes(self._answers.refused(problems.TOO_MANY_CONNECTIONS))

    def _turned_away(self) -> None:
        self._turned -= 1


class _Turned(asyncio.Protocol):
    """A connection beyond the limit: its first request is answered, and it is closed when that has been read."""

    def __init__(self, transport: asyncio.Transport, connections: Connections) -> None:
        self._transport = transport
        self._connections = connections
        self._answered = False
        self._timer = asyncio.get_running_loop().call_later(_PATIENCE, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Answer the first bytes, whatever they are, and drop the others."""
        if self._answered:
            return
        self._answered = True
        self._transport.write(self._connections._refusal())
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room for the next one."""
        self._timer.cancel()
        self._connections._turned_away()


def in_bytes(response: web.Response) -> bytes:
    """Return *response* as the last one of a connection, for whom there is no request that it could belong to."""
    body = cast("bytes", response.body)
    response.headers["Content-Length"] = str(len(body))
    response.headers["Connection"] = "close"
    head = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
    return f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}\r\n{head}\r\n".encode() + body


def within(settings: Settings) -> Settings:
    """Return *settings* with as many connections as it may have files; that limit is raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + _MOST_TURNED + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    room = max(1, soft - _MOST_TURNED - _OTHER_FILES)
    return dataclasses.replace(settings, max_connections=room)


# -- Sends answers, each in a bounded time: who does not read what it asked for keeps nothing of ours for ever -------


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
