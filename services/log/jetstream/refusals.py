"""What the user of a connection may not do.

nats-py raises no permission error: a request runs into its timeout, ``publish`` and ``subscribe`` return as if all were
well. The only sign is a line that the server sends later. Here it ends the request that it is about, at once, and is
passed on to whoever publishes or subscribes without a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import nats.errors
from nats.aio import client
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.protocol import parser

from services.core.lifecycle import cancellable
from services.core.logs import get_logger
from services.log.errors import LogForbiddenError
from services.log.jetstream.credentials import SEED_VARIABLE

# -- A NATS client that survives whatever bytes a subject or a header holds ------------------------------------------
#
# nats-server 2.15 checks neither: it stores and delivers subjects with bytes that are no UTF-8, with NUL, vertical tab,
# form feed and carriage return, and header blocks that are no headers at all. nats-py 2.16 ends its reading task, or
# reconnects, on each of them. The message is delivered again after the reconnect, so a single one would stop every
# partition of the process for good. What cannot be decoded gets U+FFFD here; whether it is poison is decided elsewhere.


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


#: violations that are kept for later messages
_MAX_VIOLATIONS = 20
_VIOLATION = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')

_log = get_logger("eventlog.connection")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A permission violation.

    Attributes:
        verb: ``publish`` or ``subscription``.
        subject: in lower case, as nats-py reports it.
    """

    verb: str
    subject: str

    @classmethod
    def parse(cls, text: str) -> Refusal | None:
        """Read what nats-py reports; None when it is about something else."""
        match = _VIOLATION.search(text.lower())
        return cls(match[1], match[2]) if match else None

    def hits(self, subject: str, inbox: str) -> bool:
        """Say whether a request on *subject*, whose answer is awaited below *inbox*, is in vain because of this."""
        if self.verb == "publish":
            return self.subject == subject.lower()
        return self.subject.startswith(inbox.lower())

    def error(self) -> LogForbiddenError:
        """Return what the caller of such a request gets."""
        verb = "publish on" if self.verb == "publish" else "subscribe to"
        return LogForbiddenError(
            f"the NATS user of this process may not {verb} {self.subject}: take the seed of the right role "
            f"({SEED_VARIABLE}), or give the subject to its user in accounts.conf"
        )


RefusalListener = Callable[[Refusal], None]


class RefusalAwareClient(TolerantClient):
    """A client whose requests end at once when its user may not make them.

    Attributes:
        violations: what the server reported, oldest first, each once.
        deaf: the refusal of an inbox of this connection: no answer can arrive until it connects anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.violations: list[str] = []
        self.deaf: Refusal | None = None
        self._listeners: list[RefusalListener] = []

    def listen(self, listener: RefusalListener) -> Callable[[], None]:
        """Have *listener* called for each refusal from now on; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def note(self, refusal: Refusal, text: str) -> None:
        """Pass on what the server reported in *text*."""
        if refusal.verb == "subscription" and refusal.hits("", self._inbox_prefix.decode()):
            self.deaf = refusal
        for listener in list(self._listeners):
            listener(refusal)
        if text in self.violations or len(self.violations) >= _MAX_VIOLATIONS:
            return
        self.violations.append(text)
        _log.error("LOG_PERMISSION_VIOLATION", detail=text, action="give the NATS user of this service the subject")

    def forget(self) -> None:
        """Try what was refused again: this is another connection, perhaps with other permissions."""
        self.deaf = None

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,
        old_style: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        """Do as nats-py does, but do not wait for the answer to what the user may not ask.

        Raises LogForbiddenError: the user may not publish on *subject*, or not hear the answer.
        """
        if self.deaf is not None:
            raise self.deaf.error()
        refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        inbox = self._inbox_prefix.decode()

        def listener(refusal: Refusal) -> None:
            if refusal.hits(subject, inbox) and not refused.done():
                refused.set_result(refusal)

        answer: asyncio.Future[Any] = asyncio.ensure_future(
            super().request(subject, payload, timeout, old_style, headers)
        )
        deafen = self.listen(listener)
        try:
            await asyncio.wait({answer, refused}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise refused.result().error()
            message: Msg = answer.result()
            return message
        finally:
            deafen()
            answer.cancel()


def listen(nc: Client, listener: RefusalListener) -> Callable[[], None]:
    """Have *listener* called for each refusal of *nc*, if that is a client that knows them; return what ends that."""
    return nc.listen(listener) if isinstance(nc, RefusalAwareClient) else _nothing


async def check_hearing(nc: Client, *, timeout: float) -> None:
    """Make sure that the inboxes subscribed to so far are heard; the broker answers in turn, so a round trip tells.

    It takes two: nats-py writes the PING of a flush past the buffer in which the subscriptions may still wait.

    Raises LogForbiddenError: the user may not listen to them.
    """
    with contextlib.suppress(nats.errors.Error, OSError):  # what the connection lacks otherwise, others will find out
        for _ in range(2):
            await cancellable(nc.flush(timeout=timeout))  # type: ignore[arg-type]  # annotated int, used in wait_for()
    must_hear(nc)


def must_hear(nc: Client) -> None:
    """Raise LogForbiddenError when answers on *nc* cannot arrive."""
    if isinstance(nc, RefusalAwareClient) and nc.deaf is not None:
        raise nc.deaf.error()


def _nothing() -> None:
    pass
