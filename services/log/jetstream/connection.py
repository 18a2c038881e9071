"""The connection to the cluster: nats-py's client with the settings that matter (DESIGN, section 9), and what it lacks.

**Connect.** The first connect has a deadline and reports which node refused and why; nats-py may hang in it. After that
the client reconnects for ever (by default it gives up after 60 tries), a dead peer is noticed within seconds instead of
minutes, and a client that has stopped reconnecting is reported.

**Credentials.** The process signs with an nkey seed, which is read again at each connect, and accepts only certificates
of the authority that the settings name.

**Permissions.** nats-py raises no permission error: a request runs into its timeout, ``publish`` and ``subscribe``
return as usual, and the only sign is a line that the server sends later. Here that line ends the request that it
concerns at once, and is passed to listeners.

**Any bytes.** nats-server 2.15 stores and delivers subjects with bytes that are not UTF-8, with NUL, vertical tab, form
feed and carriage return, and header blocks that are not headers. nats-py 2.16 ends its reading task, or reconnects, on
each of them, and the message is delivered again afterwards: one would stop every partition of the process for good.
Here bytes that cannot be decoded become U+FFFD; whether the message is poison is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import re
import socket
import ssl
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import nats.errors
import nkeys
from nats.aio.client import DEFAULT_BUFFER_SIZE, Client, Srv
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.protocol import parser

from fiq.errors import ConfigurationError
from services.core.lifecycle import cancellable
from services.core.logs import get_logger
from services.log.errors import LogAccessError, LogForbiddenError, LogUnavailableError
from services.log.settings import LogSettings
from services.log.status import CertificateExpiry

CA_VARIABLE = "FI_NATS_CA_FILE"
SEED_VARIABLE = "FI_NATS_SEED_FILE"

#: the first connect may take this long over all nodes, seconds
CONNECT_DEADLINE_SECONDS = 10.0
#: one node's TCP connect, and each step of its handshake, seconds
CONNECT_TIMEOUT_SECONDS = 2
#: pause before the same node is tried again, seconds
RECONNECT_WAIT_SECONDS = 0.25
#: an idle connection is probed this often; two unanswered probes end it, seconds
PING_INTERVAL_SECONDS = 5
MAX_OUTSTANDING_PINGS = 2
#: what may be buffered for the socket; beyond it publishing waits, bytes
PENDING_BYTES = 8 * 2**20
#: unacknowledged TCP data ends the connection after this; half-open connections otherwise hang for minutes (nats.py
#: #671), milliseconds
TCP_USER_TIMEOUT_MS = 4000
#: an orderly close may take this long, seconds
CLOSE_TIMEOUT_SECONDS = 5.0
#: how often a lost connection is checked for whether nats-py still reconnects, seconds
WATCH_SECONDS = 2.0
#: more than the headers of an event take, bytes
HEADERS_BYTES = 1024
#: permission violations that are kept for later messages
_MAX_VIOLATIONS = 20

#: OpenSSL's X509_V_ERR_…
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_NAMES = frozenset({62, 64})
#: OpenSSL's reasons: the peer does not speak TLS, or only an older version
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"})
_OLD_TLS = frozenset({"TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL"})
#: what a node says to a connection whose user was changed or removed
_AUTHORIZATION = "authorization violation"
_VIOLATION = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')

_log = get_logger("eventlog.connection")


class Role(StrEnum):
    """What a process is to the broker: each role has a NATS user and an inbox prefix of its own."""

    INGEST = "ingest"
    PERSISTER = "persister"
    PROVISIONER = "provisioner"
    OPS = "ops"
    #: writes the keys of the placement: ``fiq restore``, ``fiq give-up`` and ``fiq place``
    PLACEMENT = "placement"


def inbox_prefix(role: Role) -> str:
    """Return the prefix of the subjects on which *role* receives answers; its user may subscribe to no others."""
    return f"_INBOX_{role}"


class Received(NamedTuple):
    """A message: its subject, its reply subject or nothing, its body, its headers or None."""

    subject: str
    reply: str
    data: bytes
    headers: Mapping[str, str] | None


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
        """Return whether a request on *subject*, whose answer is awaited below *inbox*, must fail because of this."""
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


class _Parser(parser.Parser):
    """nats-py's parser with other patterns: a subject may hold any byte but blank, tab and line feed.

    The server separates the parts of a line by blanks and ends it with CR LF; nats-py's patterns split at all white
    space. ``parse`` takes them from its module's globals, so it gets other globals here.
    """

    parse = types.FunctionType(
        parser.Parser.parse.__code__,
        vars(parser)
        | {
            "MSG_RE": re.compile(rb"\AMSG[ \t]+([^ \t\n]+)[ \t]+([^ \t\n]+)[ \t]+(([^ \t\n]+)[ \t]+)?(\d+)\r\n"),
            "HMSG_RE": re.compile(
                rb"\AHMSG[ \t]+([^ \t\n]+)[ \t]+([^ \t\n]+)[ \t]+(([^ \t\n]+)[ \t]+)?(\d+)[ \t]+(\d+)\r\n"
            ),
        },
        argdefs=parser.Parser.parse.__defaults__,
    )


class _Transport(TcpTransport):
    """nats-py's transport, but a write to a closed connection is an OSError on every event loop.

    uvloop raises RuntimeError there. In the handshake of a reconnect that would end nats-py's reconnecting task for
    good, and in ``close()`` the process.
    """

    def write(self, payload: Any) -> None:
        with _closed_is_reset():
            super().write(payload)  # type: ignore[no-untyped-call]

    def writelines(self, payload: Any) -> None:
        with _closed_is_reset():
            super().writelines(payload)  # type: ignore[no-untyped-call]

    async def drain(self) -> None:
        with _closed_is_reset():
            await super().drain()  # type: ignore[no-untyped-call]

    async def connect_tls(self, *arguments: Any, **options: Any) -> None:
        await super().connect_tls(*arguments, **options)
        protocol: Any = self._io_writer.transport.get_protocol() if self._io_writer is not None else None
        if protocol is not None:  # it may have ended already
            protocol._over_ssl = True  # nats-py makes it by hand; without this the loop warns of each end

    @property
    def writer(self) -> asyncio.StreamWriter | None:
        return self._io_writer


@contextlib.contextmanager
def _closed_is_reset() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionResetError("the connection is closed") from error


class Connection(Client):
    """A NATS client that connects or says why not, comes back by itself, and reports its end when it is not wanted.

    Args:
        settings: name the nodes and the files.
        on_closed: called with the reason when the connection ends for good without :func:`close`.

    Attributes:
        violations: permission violations that the server reported, oldest first, each once.
    """

    def __init__(self, settings: LogSettings, on_closed: Callable[[str], None]) -> None:
        super().__init__()
        self.violations: list[str] = []
        self._ps = _Parser(self)
        self._settings = settings
        self._on_closed = on_closed
        self._signer: Signer | None = None
        self._established = self._connecting = False
        self._reported = ""
        self._failures: list[str] = []
        self._direct: dict[int, Callable[[Received], None]] = {}
        self._listeners: list[Callable[[Refusal], None]] = []
        self._deaf: Refusal | None = None  # of our inbox: no answer can arrive until we connect anew

    async def open(self, *, name: str, inbox_prefix: str, deadline: float) -> None:
        """Connect to one of the nodes; see :func:`connect`."""
        self._signer = read_signer(self._settings)
        options: dict[str, Any] = {"name": name, "inbox_prefix": inbox_prefix}
        if self._signer is not None:
            options["signature_cb"] = self._sign
        if (context := tls_context(self._settings)) is not None:
            options |= {"tls": context, "tls_handshake_first": True}
        try:
            async with asyncio.timeout(deadline):
                await self._first_connect(options)
        except TimeoutError:
            await self._abandon()
            raise LogUnavailableError(self._unreachable(deadline)) from None
        except BaseException:
            await self._abandon()
            raise
        self._established = True
        self._failures.clear()
        self._limit_tcp_silence()
        _log.info("LOG_CONNECTED", server=self._server_name)

    async def finish(self) -> None:
        """Close in an orderly way; see :func:`close`."""
        self._established = False
        with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await self.close()

    @property
    def server_info(self) -> Mapping[str, Any]:
        """What the connected node said of itself when the connection was made: the protocol's INFO."""
        return self._server_info

    @property
    def reconnects(self) -> int:
        """How often the connection was made again."""
        return int(self.stats["reconnects"])

    def certificates(self) -> list[CertificateExpiry]:
        """Return the certificates of the connection; none when it is not encrypted."""
        tls: ssl.SSLObject | None = self._writer.get_extra_info("ssl_object") if self._writer is not None else None
        node = tls.getpeercert() if tls is not None else None
        if tls is None or not node:
            return []
        # the context knows all authorities of the file; only the one that signed matters
        authorities = [ca for ca in tls.context.get_ca_certs() if ca.get("subject") == node.get("issuer")]
        return [_expiry("node", node), *(_expiry("ca", ca) for ca in authorities)]

    # -- messages -----------------------------------------------------------------------------------------------------

    async def subscribe_directly(self, subject: str, take: Callable[[Received], None]) -> Subscription:
        """Subscribe to *subject*, and have *take* called with each message while it is read from the connection.

        nats-py puts each message into a queue from which a task of the subscription takes it, which costs more than
        most handlers. What *take* raises goes to the error callback.
        """
        subscription = await self.subscribe(subject, cb=_never)
        self._direct[subscription._id] = take
        return subscription

    async def unsubscribe_directly(self, subscription: Subscription) -> None:
        """End a subscription of :meth:`subscribe_directly`: take no more messages, also when this raises.

        Raises nats.errors.Error: the connection is closed.
        """
        self._direct.pop(subscription._id, None)
        await subscription.unsubscribe()

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
        except Exception as error:  # noqa: BLE001 - as nats-py does with what a callback raises
            await self._error_cb(error)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (ValueError, IndexError):  # UnicodeDecodeError is a ValueError; a block that just ends is an IndexError
            return {}

    async def parse_headers(self, block: bytes) -> dict[str, str]:
        """Return the headers of a message's header *block*."""
        return await self._process_headers(block) or {}

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """Do as nats-py, which looks at each character of each name: up to 4 µs a message of a persister's 40."""
        headers = {}
        for line in raw.split(b"\r\n"):
            name, separator, value = line.partition(b":")
            if separator and name.isascii():
                key = name.strip().decode()
                if len(key.split()) <= 1:  # white space within a name makes it none
                    headers[key] = value.strip().decode("utf-8", "replace")
        return headers

    async def write_block(self, block: bytes, messages: int) -> None:
        """Write *messages* complete messages as ``publish`` writes one."""
        self.stats["out_msgs"] += messages
        self.stats["out_bytes"] += len(block)
        await self._send_command(block)
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    def drop_unsent(self, prefix: str) -> None:
        """Forget commands that begin with *prefix* and could not be sent: nats-py sends them after a reconnect."""
        self._pending[:] = [one for one in self._pending if not one.startswith(prefix.encode())]
        self._pending_data_size = sum(map(len, self._pending))

    # -- permissions --------------------------------------------------------------------------------------------------

    def listen(self, listener: Callable[[Refusal], None]) -> Callable[[], None]:
        """Have *listener* called for each refusal from now on; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def note(self, refusal: Refusal, text: str) -> None:
        """Pass on what the server reported in *text*."""
        if refusal.verb == "subscription" and refusal.hits("", self._inbox_prefix.decode()):
            self._deaf = refusal
        for listener in list(self._listeners):
            listener(refusal)
        if text not in self.violations and len(self.violations) < _MAX_VIOLATIONS:
            self.violations.append(text)
            _log.error("LOG_PERMISSION_VIOLATION", detail=text, action="give the NATS user of this service the subject")

    def check_hearing(self) -> None:
        """Raise LogForbiddenError when answers cannot arrive: the user may not subscribe to its inbox."""
        if self._deaf is not None:
            raise self._deaf.error()

    async def confirm_hearing(self, *, timeout: float) -> None:
        """Check that the user may subscribe to what was subscribed to so far: the server answers in turn.

        It takes two round trips: the PING of a flush overtakes the buffer in which subscriptions may still wait.

        Raises LogForbiddenError: it may not.
        """
        with contextlib.suppress(nats.errors.Error, OSError):  # any other trouble shows in what follows
            for _ in range(2):
                await cancellable(self.flush(timeout=timeout))  # type: ignore[arg-type]  # annotated int, a float works
        self.check_hearing()

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,
        old_style: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        """Do as nats-py, but end at once when the user may not ask.

        Raises LogForbiddenError: the user may not publish on *subject*, or not subscribe to the answer.
        """
        self.check_hearing()
        refused: asyncio.Future[Refusal] = asyncio.get_running_loop().create_future()
        inbox = self._inbox_prefix.decode()

        def listener(refusal: Refusal) -> None:
            if refusal.hits(subject, inbox) and not refused.done():
                refused.set_result(refusal)

        answer: asyncio.Future[Any] = asyncio.ensure_future(
            super().request(subject, payload, timeout, old_style, headers)
        )
        stop_listening = self.listen(listener)
        try:
            await asyncio.wait({answer, refused}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise refused.result().error()
            message: Msg = answer.result()
            return message
        finally:
            stop_listening()
            answer.cancel()

    # -- what nats-py asks at each connect ----------------------------------------------------------------------------

    async def _connect_to_server(self, s: Srv) -> None:
        """Open TCP to a node with a transport of our own; TLS follows in nats-py."""
        s.last_attempt = time.monotonic()
        if not self._transport:
            self._transport = _Transport()  # type: ignore[no-untyped-call]
        await self._transport.connect(s.uri, DEFAULT_BUFFER_SIZE, self.options["connect_timeout"])

    def _connect_command(self) -> bytes:
        """Introduce ourselves with the seed as it is now: it may have been rotated since the last connect."""
        if self._established:
            try:
                self._signer = read_signer(self._settings)
            except ConfigurationError as error:  # it is being written, or gone: go on with the one we know
                self._report(str(error))
        self._public_nkey = None if self._signer is None else self._signer.public_key
        return super()._connect_command()

    def _sign(self, nonce: str) -> bytes:
        if self._signer is None:
            raise nats.errors.Error("no key to sign with")
        return self._signer.sign(nonce)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Learn of other nodes; each must show its own address in its certificate, not the first one's."""
        await super()._process_info(info, initial_connection)
        for server in self._server_pool:
            server.tls_name = None

    async def _process_err(self, err_msg: str) -> None:
        """Reconnect when a reload of the node has removed this user: the seed's file may hold its next one."""
        if self._established and _AUTHORIZATION in err_msg:
            await self._process_op_err(nats.errors.AuthorizationError())
            return
        await super()._process_err(err_msg)

    # -- the first connect --------------------------------------------------------------------------------------------

    async def _first_connect(self, options: dict[str, Any]) -> None:
        """Try one node after the other: nats-py's own loop over them hangs when a TLS handshake fails."""
        while True:
            refused: dict[str, str] = {}
            servers = random.sample(self._settings.servers, len(self._settings.servers))
            for server in servers:
                self._connecting = True
                try:
                    await self._try(server, options)
                except (OSError, nats.errors.Error) as error:  # a TimeoutError is an OSError
                    self._failures.append(_why(error))
                    if (reason := why_refused(error, self._settings, self._signer)) is not None:
                        refused[server] = reason
                else:
                    known = {server.uri.netloc for server in self._server_pool}
                    uris = [self._parse_server_uri(server) for server in servers]
                    self._server_pool[:0] = [Srv(uri) for uri in uris if uri.netloc not in known]
                    return
                finally:
                    self._connecting = False
                await self._abandon()
            if refused:
                raise LogAccessError(_refused(refused))
            await asyncio.sleep(RECONNECT_WAIT_SECONDS)

    async def _try(self, server: str, options: dict[str, Any]) -> None:
        self._server_pool.clear()
        attempt = self.connect(
            servers=[server],
            error_cb=self._when_error,
            disconnected_cb=self._when_disconnected,
            reconnected_cb=self._when_reconnected,
            closed_cb=self._when_closed,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_WAIT_SECONDS,  # type: ignore[arg-type]  # annotated int, used in sleep()
            ping_interval=PING_INTERVAL_SECONDS,
            max_outstanding_pings=MAX_OUTSTANDING_PINGS,
            pending_size=PENDING_BYTES,
            **options,
        )
        await cancellable(attempt)
        if not self.is_connected:
            # nats-py returns in state CONNECTING when a server says neither PONG nor -ERR (slow authentication)
            raise nats.errors.Error("the server ended the handshake")

    async def _abandon(self) -> None:
        if self._writer is not None and self._settings.ca_file:
            self._writer.transport.abort()
            self._transport = None  # or close() waits for the end of a TLS connection that was never established
        with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await self.close()

    def _unreachable(self, deadline: float) -> str:
        reasons = ", ".join(dict.fromkeys(self._failures)) or "no answer"
        servers = ", ".join(_without_secrets(url) for url in self._settings.servers)
        hint = "" if self._settings.ca_file else f"; nodes that speak TLS need {CA_VARIABLE}, too"
        return (
            f"no NATS server took the connection within {deadline:g} s: {servers} ({reasons}). "
            f"Start the cluster, or set FI_LOG_URL to its nodes{hint}"
        )

    @property
    def _server_name(self) -> str:
        return str(self._server_info.get("server_name", ""))

    @property
    def _writer(self) -> asyncio.StreamWriter | None:
        return self._transport.writer if isinstance(self._transport, _Transport) else None

    def _limit_tcp_silence(self) -> None:
        sock = self._writer.get_extra_info("socket") if self._writer is not None else None
        option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
        if sock is not None and option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, TCP_USER_TIMEOUT_MS)

    # -- callbacks: nats-py wants coroutine functions -----------------------------------------------------------------

    async def _when_error(self, error: Exception) -> None:
        if self._connecting:
            raise error  # nats-py would try for ever otherwise; the loop of the first connect is ours
        refusal = Refusal.parse(str(error))
        if refusal is not None:
            self.note(refusal, str(error))
            return
        reason = why_refused(error, self._settings, self._signer)
        if reason is not None:
            self._report(f"a node does not let this process in: {reason}")
            return
        # errors of our own callbacks come this way too, and their text might quote a message
        detail = str(error) if isinstance(error, nats.errors.Error | OSError) else ""
        _log.warning("LOG_CONNECTION_ERROR", error=type(error).__name__, detail=detail)

    def _report(self, reason: str) -> None:
        """Log why a node refuses, once: it is tried four times a second."""
        if reason != self._reported:
            self._reported = reason
            _log.error("LOG_ACCESS_REFUSED", reason=reason)

    async def _when_disconnected(self) -> None:
        if self._established:
            _log.warning("LOG_DISCONNECTED")
            asyncio.get_running_loop().call_later(WATCH_SECONDS, self._watch_reconnecting)

    async def _when_reconnected(self) -> None:
        self._limit_tcp_silence()
        self._deaf, self._reported = None, ""  # the permissions may be others now
        _log.info("LOG_RECONNECTED", server=self._server_name)

    def _watch_reconnecting(self) -> None:
        """Report the end when nats-py has stopped reconnecting.

        An error that it does not expect ends its task for that silently, and the process would look alive for ever.
        """
        if not self._established or self.is_connected:
            return
        task = self._reconnection_task
        if self.is_closed or (task is not None and task.done()):
            self._end("the client stopped reconnecting")
            return
        asyncio.get_running_loop().call_later(WATCH_SECONDS, self._watch_reconnecting)

    async def _when_closed(self) -> None:
        if self._established:
            self._end(str(self.last_error or "") or "the client gave the connection up")

    def _end(self, reason: str) -> None:
        self._established = False
        _log.error("LOG_CLOSED", reason=reason)
        self._on_closed(f"the connection to the log was closed: {reason}")


async def connect(
    settings: LogSettings,
    *,
    name: str,
    on_closed: Callable[[str], None],
    role: Role | None = None,
    deadline: float = CONNECT_DEADLINE_SECONDS,
) -> Connection:
    """Connect to the cluster of *settings*.

    Args:
        settings: its nodes are tried in random order, again and again until the deadline.
        name: shown in the nodes' monitoring, such as ``fi-ingest``.
        on_closed: called with a reason when the connection ends for good without :func:`close`: the process should
            stop. The loss of a node is no such end; the client reconnects for ever.
        role: of the process: its user receives answers under a prefix of its own. None: the prefix that a user without
            restrictions has.
        deadline: seconds for the whole first connect.

    Raises ConfigurationError: the file of FI_NATS_CA_FILE or FI_NATS_SEED_FILE cannot be used; LogAccessError: no node
    that answers lets this process in; it names each with the reason; LogUnavailableError: no node took the connection
    in time; it names the nodes and their answers.
    """
    nc = Connection(settings, on_closed)
    await nc.open(name=name, inbox_prefix="_INBOX" if role is None else inbox_prefix(role), deadline=deadline)
    return nc


async def close(nc: Connection) -> None:
    """Close *nc* in an orderly way: what is buffered is sent, ``on_closed`` is not called. Idempotent."""
    await nc.finish()


def check_max_payload(nc: Client, event_bytes: int) -> None:
    """Check that the server takes events of *event_bytes* with their headers; it ends the connection otherwise.

    Raises ConfigurationError: the server's ``max_payload`` is too small.
    """
    needed = event_bytes + HEADERS_BYTES
    if nc.max_payload < needed:
        problem = (
            f"the server's max_payload is {nc.max_payload} bytes, an event of {event_bytes} bytes needs {needed}: "
            "raise max_payload in nats.conf or lower FI_MAX_EVENT_BYTES"
        )
        raise ConfigurationError([problem])


async def _never(_: Msg) -> None:
    """Stand in for the callback that nats-py asks for."""


def _readable(raw: bytes) -> bytes:
    return raw if raw.isascii() else raw.decode("utf-8", "replace").encode()


# -- credentials ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signer:
    """The key of a user; its text form shows the public half only."""

    _pair: nkeys.KeyPair
    public_key: str

    def __repr__(self) -> str:
        return f"Signer({self.public_key})"

    def sign(self, nonce: str) -> bytes:
        return base64.b64encode(self._pair.sign(nonce.encode()))


def tls_context(settings: LogSettings) -> ssl.SSLContext | None:
    """Return what certificates are checked with, or None when the settings ask for no TLS.

    Raises ConfigurationError: the authority's file is missing, unreadable, or no certificate.
    """
    if not settings.ca_file:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except ssl.SSLError:
        raise _problem(
            CA_VARIABLE, settings.ca_file, "no certificate in PEM form; it is ca.pem of `fiq init`"
        ) from None
    except OSError as error:
        raise _problem(CA_VARIABLE, settings.ca_file, f"{error.strerror}; it is ca.pem of `fiq init`") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _why(error: Exception) -> str:
    """Return why a node could not be reached, in the system's words and without those of libraries."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or 'failed').lower().replace('_', ' ')}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno) if error.errno > 0 else error.strerror or "the host name cannot be resolved"
    return str(error).removeprefix("nats: ").strip("'") or type(error).__name__


def read_signer(settings: LogSettings) -> Signer | None:
    """Return the user's key, or None when the settings name none.

    Raises ConfigurationError: the seed's file is missing, unreadable, or no seed.
    """
    if not settings.seed_file:
        return None
    try:
        seed = Path(settings.seed_file).read_bytes()
    except OSError as error:
        remedy = "it is users/<role>.seed of `fiq init`, and must belong to the user that this process runs as"
        raise _problem(SEED_VARIABLE, settings.seed_file, f"{error.strerror}; {remedy}") from None
    try:
        public = public_key(seed)
    except ValueError as error:
        raise _problem(SEED_VARIABLE, settings.seed_file, str(error)) from None
    return Signer(nkeys.from_seed(bytearray(seed.strip())), public)


def public_key(seed: bytes) -> str:
    """Return the public key that belongs to *seed*. Raises ValueError: it is no seed of a user."""
    text = seed.strip()
    try:
        # nkeys compares no checksum: a seed with a typing error would be another user's valid key
        prefix, raw = nkeys.decode_seed(text)
        good = prefix == nkeys.PREFIX_BYTE_USER and nkeys.encode_seed(bytes(raw), prefix) == text
    except (nkeys.NkeysError, ValueError):
        good = False
    if not good:
        raise ValueError("no nkey seed of a user, which begins with SU and has 58 characters")
    return bytes(nkeys.from_seed(bytearray(text)).public_key).decode("ascii")


def _problem(variable: str, path: str, what: str) -> ConfigurationError:
    return ConfigurationError([f"{variable}={path}: {what}"])


def _expiry(kind: str, certificate: Mapping[str, Any]) -> CertificateExpiry:
    attributes = dict(pair for group in certificate.get("subject", ()) for pair in group)
    return CertificateExpiry(kind, attributes.get("commonName", ""), ssl.cert_time_to_seconds(certificate["notAfter"]))


# -- why a node refuses a connection ----------------------------------------------------------------------------------


def _refused(reasons: dict[str, str]) -> str:
    """Return which nodes refuse and why, nodes with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for server, reason in reasons.items():
        by_reason.setdefault(reason, []).append(_without_secrets(server))
    return "; ".join(f"{', '.join(sorted(servers))}: {reason}" for reason, servers in by_reason.items())


def _without_secrets(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def why_refused(error: Exception, settings: LogSettings, signer: Signer | None) -> str | None:
    """Return why a node refused a connection, or None when *error* has nothing to do with access.

    Args:
        error: what the attempt to connect raised.
        settings: that it was made with.
        signer: the user, when there is one.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate(error, settings)
    if isinstance(error, ssl.SSLError):
        return _handshake(error)
    if _AUTHORIZATION not in str(error).lower():
        return None
    if signer is None:
        return f"the node requires authentication: set {SEED_VARIABLE} to the seed of this service's user"
    return (
        f"it does not know the user of {SEED_VARIABLE}={settings.seed_file} (public key {signer.public_key}): take the "
        "seed of this deployment, and reload the nodes after a rotation"
    )


def _certificate(error: ssl.SSLCertVerificationError, settings: LogSettings) -> str:
    if error.verify_code == _EXPIRED:
        return "its certificate has expired: run `fiq init FOLDER --rotate certificates` and reload the node"
    if error.verify_code == _NOT_YET_VALID:
        return "its certificate is not valid yet: compare the clocks of the machines"
    if error.verify_code in _OTHER_NAMES:
        return (
            f"its certificate has other names ({error.verify_message}): connect to one of them, or renew it with "
            "`fiq init FOLDER --rotate certificates --hosts …`"
        )
    if not settings.ca_file:
        return f"it speaks TLS: set {CA_VARIABLE} to ca.pem of the deployment"
    return (
        f"its certificate is not from the authority in {CA_VARIABLE}={settings.ca_file}: take ca.pem of the deployment"
    )


def _handshake(error: ssl.SSLError) -> str:
    reason = error.reason or type(error).__name__
    if reason in _NO_TLS:
        return f"it does not speak TLS from the first byte: correct its nats.conf, or unset {CA_VARIABLE}"
    if reason in _OLD_TLS:
        return "it speaks no TLS 1.3: correct the tls block of its nats.conf"
    return f"it refused the TLS handshake ({reason}): look at its log"
