"""The connection to the cluster, with the client settings that matter (DESIGN, section 9).

nats-py's defaults give a server up after 60 tries and then close the client for good, notice a dead peer after minutes,
show a permission violation nowhere but in the error callback, and may hang in the first connect. Here a connection
reconnects for ever, a dead peer is noticed within seconds, and the first connect has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import Callable
from typing import Any

import nats.errors
from nats.aio.client import Client, Srv

from fiq.errors import ConfigurationError
from services.core.lifecycle import cancellable
from services.core.logs import get_logger
from services.log.errors import LogAccessError, LogUnavailableError
from services.log.jetstream.credentials import CA_VARIABLE, SEED_VARIABLE, Signer, read_signer, tls_context
from services.log.jetstream.names import Role, inbox_prefix
from services.log.jetstream.refusals import Refusal, RefusalAwareClient
from services.log.settings import LogSettings

#: OpenSSL's X509_V_ERR_…
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_NAMES = frozenset({62, 64})
#: OpenSSL's reasons: what answered was no TLS at all, or an older version of it
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"})
_OLD_TLS = frozenset({"TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL"})

#: what a node says to a connection whose user was changed or removed
_AUTHORIZATION = "authorization violation"
#: the first connect may take this long over all servers, seconds
CONNECT_DEADLINE_SECONDS = 10.0
#: one server's TCP connect, and each step of its handshake, seconds
CONNECT_TIMEOUT_SECONDS = 2
#: pause before the same server is tried again, seconds
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
#: how often it is looked at whether a lost connection is still being made anew, seconds
WATCH_SECONDS = 2.0
#: more than the headers of any message of ours take, bytes
HEADERS_BYTES = 1024

_log = get_logger("eventlog.connection")


class Connection(RefusalAwareClient):
    """A NATS client that gets in or says why not, comes back by itself, and knows whether its end is wanted.

    It signs with the seed as it is now, and speaks TLS from the first byte where an authority is named.

    Args:
        settings: name the servers and the files.
        on_closed: called with the reason when the connection ends for good, and that is not wanted.
    """

    def __init__(self, settings: LogSettings, on_closed: Callable[[str], None]) -> None:
        super().__init__()
        self._settings = settings
        self._on_closed = on_closed
        self._signer: Signer | None = None
        self._established = self._connecting = False
        self._told = ""
        self._failures: list[str] = []

    async def open(self, *, name: str, inbox_prefix: str, deadline: float) -> None:
        """Connect to one of the servers; :func:`connect` is the way to call it.

        Raises ConfigurationError: the authority's or the seed's file cannot be used; LogAccessError: the servers that
        answer do not let us in; LogUnavailableError: no server took the connection within *deadline* seconds.
        """
        options: dict[str, Any] = {"name": name, "inbox_prefix": inbox_prefix, **self.credentials()}
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

    def expect_close(self) -> None:
        """Do not report the end of the connection as a failure."""
        self._established = False

    def credentials(self) -> dict[str, Any]:
        """Return the options of the first connect. Raises ConfigurationError: a file cannot be used."""
        self._signer = read_signer(self._settings)
        options: dict[str, Any] = {} if self._signer is None else {"signature_cb": self._sign}
        if (context := tls_context(self._settings)) is not None:
            options |= {"tls": context, "tls_handshake_first": True}
        return options

    def tell(self, reason: str) -> None:
        """Log why a node does not let us in, once: it is tried four times a second."""
        if reason != self._told:
            self._told = reason
            _log.error("LOG_ACCESS_REFUSED", reason=reason)

    def forget(self) -> None:
        """Begin anew after a connect that succeeded."""
        super().forget()
        self._told = ""

    @property
    def _writer(self) -> Any:
        return getattr(self._transport, "_io_writer", None)  # nats-py offers no way to its socket

    # -- what nats-py asks at each connect ----------------------------------------------------------------------------

    def _connect_command(self) -> bytes:
        """Introduce ourselves with the seed as it is now: it may have been rotated since the last connect."""
        if self._established:
            try:
                self._signer = read_signer(self._settings)
            except ConfigurationError as error:  # it is being written, or gone: go on with the one we know
                self.tell(str(error))
        self._public_nkey = None if self._signer is None else self._signer.public_key
        return super()._connect_command()

    def _sign(self, nonce: str) -> bytes:
        if self._signer is None:
            raise nats.errors.Error("no key to sign with")
        return self._signer.sign(nonce)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Learn of other servers; each has to show its own address in its certificate, and not the first one's."""
        await super()._process_info(info, initial_connection)
        for server in self._server_pool:
            server.tls_name = None
        if initial_connection and self._settings.ca_file:
            self._announce_tls()

    def _announce_tls(self) -> None:
        """Tell the protocol, which nats-py makes by hand, that it is over TLS: the loop warns of each end otherwise."""
        protocol = self._writer.transport.get_protocol() if self._writer is not None else None
        if protocol is not None:  # the connection may have ended already
            protocol._over_ssl = True

    async def _process_err(self, err_msg: str) -> None:
        """Come back when a reload of the node has thrown this user out: the seed's file may hold its next one."""
        if self._established and _AUTHORIZATION in err_msg:
            await self._process_op_err(nats.errors.AuthorizationError())
            return
        await super()._process_err(err_msg)

    # -- the first connect --------------------------------------------------------------------------------------------

    async def _first_connect(self, options: dict[str, Any]) -> None:
        """Try one server after the other: nats-py's own loop over them hangs when a TLS handshake fails."""
        while True:
            refused: dict[str, str] = {}
            servers = random.sample(self._settings.servers, len(self._settings.servers))
            for server in servers:
                self._connecting = True
                try:
                    await self._try(server, options)
                except (OSError, nats.errors.Error) as error:  # a TimeoutError is an OSError
                    self._failures.append(str(error) or type(error).__name__)
                    if (reason := why_refused(error, self._settings, self._signer)) is not None:
                        refused[server] = reason
                else:
                    self._add_to_pool(servers)
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

    def _add_to_pool(self, servers: list[str]) -> None:
        known = {server.uri.netloc for server in self._server_pool}
        uris = [self._parse_server_uri(server) for server in servers]
        self._server_pool[:0] = [Srv(uri) for uri in uris if uri.netloc not in known]

    async def _abandon(self) -> None:
        if self._writer is not None and self._settings.ca_file:
            self._writer.transport.abort()
            self._transport = None  # or close() waits for the end of a TLS connection that never came to be
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

    def _limit_tcp_silence(self) -> None:
        sock = self._writer.get_extra_info("socket") if self._writer is not None else None
        option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
        if sock is not None and option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, TCP_USER_TIMEOUT_MS)

    # -- callbacks: nats-py wants coroutine functions --------------------------------------------------------------

    async def _when_error(self, error: Exception) -> None:
        if self._connecting:
            raise error  # nats-py would try for ever otherwise; the loop of the first connect is ours
        refusal = Refusal.parse(str(error))
        if refusal is not None:
            self.note(refusal, str(error))
            return
        reason = why_refused(error, self._settings, self._signer)
        if reason is not None:
            self.tell(f"a node does not let this process in: {reason}")
            return
        # our callbacks' own errors come this way too, and their text might quote a message
        detail = str(error) if isinstance(error, nats.errors.Error | OSError) else ""
        _log.warning("LOG_CONNECTION_ERROR", error=type(error).__name__, detail=detail)

    async def _when_disconnected(self) -> None:
        if self._established:
            _log.warning("LOG_DISCONNECTED")
            asyncio.get_running_loop().call_later(WATCH_SECONDS, self._watch_reconnecting)

    async def _when_reconnected(self) -> None:
        self._limit_tcp_silence()
        self.forget()
        _log.info("LOG_RECONNECTED", server=self._server_name)

    def _watch_reconnecting(self) -> None:
        """End the connection when nobody tries to reconnect any more: an error that nats-py does not expect ends its
        task for that without a word, and a process with a dead client would look alive for ever."""
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
        settings: its servers are tried in random order, each again and again, until the deadline.
        name: shown in the server's monitoring, such as ``fi-ingest``.
        on_closed: called with a reason when the connection ends for good without :func:`close`: the process is of no
            use from then on and should stop. Losing a server is no such end; that reconnects for ever.
        role: of the process: its user hears answers under a prefix of its own. Without one, the prefix that a user
            without restrictions has.
        deadline: seconds for the whole first connect.

    Raises ConfigurationError: the file of FI_NATS_CA_FILE or FI_NATS_SEED_FILE cannot be used; LogAccessError: no
    server that answers lets this process in; it names each with the reason; LogUnavailableError: no server took the
    connection in time; it names the servers and their answers.
    """
    nc = Connection(settings, on_closed)
    prefix = "_INBOX" if role is None else inbox_prefix(role)
    await nc.open(name=name, inbox_prefix=prefix, deadline=deadline)
    return nc


async def close(nc: Client) -> None:
    """Close *nc* in an orderly way: what is buffered is sent, ``on_closed`` is not called. Idempotent."""
    if isinstance(nc, Connection):
        nc.expect_close()
    with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
        async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
            await nc.close()


def check_max_payload(nc: Client, event_bytes: int) -> None:
    """Check that the server takes events of *event_bytes* with their headers.

    A larger message does not come back as an error: the server ends the connection.

    Raises ConfigurationError: the server's ``max_payload`` is too small.
    """
    needed = event_bytes + HEADERS_BYTES
    if nc.max_payload < needed:
        problem = (
            f"the server's max_payload is {nc.max_payload} bytes, an event of {event_bytes} bytes needs {needed}: "
            "raise max_payload in nats.conf or lower FI_MAX_EVENT_BYTES"
        )
        raise ConfigurationError([problem])


def server_info(nc: Client) -> dict[str, Any]:
    """Return what the connected server said of itself when the connection was made (the INFO of the protocol)."""
    return dict(nc._server_info)


def _refused(reasons: dict[str, str]) -> str:
    """Say which servers refuse and why, servers with the same reason together."""
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
        return f"it wants to know who is there: set {SEED_VARIABLE} to the seed of this service's user"
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
