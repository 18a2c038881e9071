"""A NATS client that survives whatever bytes a subject or a header holds.

nats-server 2.15 checks neither: it stores and delivers subjects with bytes that are no UTF-8, with NUL, vertical tab,
form feed and carriage return, and header blocks that are no headers at all. nats-py 2.16 ends its reading task, or
reconnects, on each of them. The message is delivered again after the reconnect, so a single one would stop every
partition of the process for good. What cannot be decoded gets U+FFFD here; whether it is poison is decided elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from nats.aio import client
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.protocol import parser

# -- A TCP transport whose end is an OSError on every event loop -----------------------------------------------------
#
# uvloop raises a RuntimeError when a closed transport is written to; asyncio's own loop does not. nats-py 2.16 expects
# OSError: a RuntimeError in the handshake of a reconnect ends its reconnecting task for good, and one in ``close()``
# ends the process with a traceback.


class LoopNeutralTransport(TcpTransport):
    """The stock transport, but a write to a closed connection is a ConnectionResetError."""

    def write(self, payload: Any) -> None:
        """Buffer *payload*."""
        with _closed_is_reset():
            super().write(payload)  # type: ignore[no-untyped-call]

    def writelines(self, payload: Any) -> None:
        """Buffer all of *payload*."""
        with _closed_is_reset():
            super().writelines(payload)  # type: ignore[no-untyped-call]

    async def drain(self) -> None:
        """Wait until there is room in the buffer."""
        with _closed_is_reset():
            await super().drain()  # type: ignore[no-untyped-call]


@contextmanager
def _closed_is_reset() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionResetError("the connection is closed") from error


# The server separates the parts of a line by blanks and ends it by CR LF; nats-py's own patterns split at every white
# space, which a subject may hold. They are globals of its module, so every client of the process gets these.
parser.MSG_RE = re.compile(rb"\AMSG[ \t]+([^ \t\n]+)[ \t]+([^ \t\n]+)[ \t]+(([^ \t\n]+)[ \t]+)?(\d+)\r\n")
parser.HMSG_RE = re.compile(rb"\AHMSG[ \t]+([^ \t\n]+)[ \t]+([^ \t\n]+)[ \t]+(([^ \t\n]+)[ \t]+)?(\d+)[ \t]+(\d+)\r\n")
# a client makes its transports itself
client.TcpTransport = LoopNeutralTransport  # type: ignore[attr-defined]


class Received(NamedTuple):
    """A message: its subject, its reply subject or nothing, its body, its headers or None."""

    subject: str
    reply: str
    data: bytes
    headers: Mapping[str, str] | None


Take = Callable[[Received], None]


class TolerantClient(Client):
    """The stock client, but no message can end its reading task."""

    def __init__(self) -> None:
        super().__init__()
        self._direct: dict[int, Take] = {}

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """Return name and value of each line, by the stock client's rules at a fraction of its cost.

        It looks at each character of each name, which takes up to 4 µs a message of a persister's 40.
        """
        headers = {}
        for line in raw.split(b"\r\n"):
            name, separator, value = line.partition(b":")
            if separator and name.isascii():
                key = name.strip().decode()
                if len(key.split()) <= 1:  # white space within a name makes it none
                    headers[key] = value.strip().decode("utf-8", "replace")
        return headers

    async def subscribe_directly(self, subject: str, take: Take) -> DirectSubscription:
        """Subscribe to *subject*, and have *take* called with each message while it is read from the connection.

        The stock client puts each message into a queue, from which a task of the subscription takes it: that costs
        more than most of our handlers. What *take* raises goes to the error callback.
        """
        subscription = await self.subscribe(subject, cb=_never)
        self._direct[subscription._id] = take
        return DirectSubscription(self, subscription)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        take = self._direct.get(sid)
        if take is None or sid not in self._subs:
            await super()._process_msg(sid, _readable(subject), _readable(reply), data, headers)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        try:
            found = await self._process_headers(headers) if headers else None
            take(Received(_readable(subject).decode(), _readable(reply).decode(), data, found))
        except Exception as error:  # noqa: BLE001 - as the stock client does with what a callback raises
            await self._error_cb(error)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (ValueError, IndexError):  # UnicodeDecodeError is a ValueError; a block that just ends is an IndexError
            return {}


class DirectSubscription:
    """A subscription made by :meth:`TolerantClient.subscribe_directly`."""

    def __init__(self, nc: TolerantClient, subscription: Subscription) -> None:
        self._nc = nc
        self._subscription = subscription

    async def unsubscribe(self) -> None:
        """Take no more messages.

        Raises nats.errors.Error: the connection is closed; nothing is taken any more all the same.
        """
        self._nc._direct.pop(self._subscription._id, None)
        await self._subscription.unsubscribe()


async def _never(_: Msg) -> None:
    """Stand in for the callback that the stock client asks for."""


def _readable(raw: bytes) -> bytes:
    return raw if raw.isascii() else raw.decode("utf-8", "replace").encode()
