"""The connection to the cluster, with the client settings that matter (DESIGN, section 9).

nats-py's defaults give a server up after 60 tries and then close the client for good, notice a dead peer after minutes,
show a permission violation nowhere but in the error callback, and may hang in the first connect. Here a connection
reconnects for ever, a dead peer is noticed within seconds, and the first connect has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import nats.errors
from nats.aio.client import Client

from services.contract.errors import ConfigurationError
from services.contract.lifecycle import cancellable
from services.contract.logs import get_logger
from services.eventlog.errors import LogUnavailableError
from services.eventlog.jetstream.tolerance import TolerantClient
from services.eventlog.settings import LogSettings

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
#: more than the headers of any message of ours take, bytes
HEADERS_BYTES = 1024

#: violations that are kept for later messages
_MAX_VIOLATIONS = 20
_VIOLATION = "permissions violation"

_log = get_logger("eventlog.connection")


class Connection(TolerantClient):
    """A NATS client that knows what it was refused and whether its end is wanted.

    Attributes:
        violations: the permission violations that the server reported, oldest first: the only sign of a request that
            the user of this connection may not send.
    """

    def __init__(self, on_closed: Callable[[str], None]) -> None:
        super().__init__()
        self.violations: list[str] = []
        self._on_closed = on_closed
        self._established = False
        self._failures: list[str] = []

    async def open(self, settings: LogSettings, *, name: str, inbox_prefix: str, deadline: float) -> None:
        """Connect to one of the servers; :func:`connect` is the way to call it.

        Raises:
            LogUnavailableError: no server took the connection within *deadline* seconds.
        """
        try:
            async with asyncio.timeout(deadline):
                await self._first_connect(settings, name, inbox_prefix)
        except TimeoutError:
            await self._abandon()
            raise LogUnavailableError(self._unreachable(settings, deadline)) from None
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

    async def _first_connect(self, settings: LogSettings, name: str, inbox_prefix: str) -> None:
        while True:
            attempt = self.connect(
                servers=list(settings.servers),
                name=name,
                inbox_prefix=inbox_prefix,
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
            )
            await cancellable(attempt)
            if self.is_connected:
                return
            # nats-py returns in state CONNECTING when a server says neither PONG nor -ERR (slow authentication)
            self._failures.append("the server ended the handshake")
            await self.close()
            self._server_pool.clear()
            await asyncio.sleep(RECONNECT_WAIT_SECONDS)

    async def _abandon(self) -> None:
        with contextlib.suppress(TimeoutError, OSError, nats.errors.Error):
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                await self.close()

    def _unreachable(self, settings: LogSettings, deadline: float) -> str:
        reasons = ", ".join(dict.fromkeys(self._failures)) or "no answer"
        servers = ", ".join(_without_secrets(url) for url in settings.servers)
        return (
            f"no NATS server took the connection within {deadline:g} s: {servers} ({reasons}). "
            "Start the cluster, or set FI_NATS_URL to its nodes"
        )

    @property
    def _server_name(self) -> str:
        return str(self._server_info.get("server_name", ""))

    def _limit_tcp_silence(self) -> None:
        writer = getattr(self._transport, "_io_writer", None)  # nats-py offers no way to its socket
        sock = writer.get_extra_info("socket") if writer is not None else None
        option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
        if sock is not None and option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, TCP_USER_TIMEOUT_MS)

    # -- callbacks: nats-py wants coroutine functions --------------------------------------------------------------

    async def _when_error(self, error: Exception) -> None:
        if not self._established:
            self._failures.append(str(error) or type(error).__name__)
            return
        if _VIOLATION in str(error).lower():
            self._note_violation(str(error))
            return
        # our callbacks' own errors come this way too, and their text might quote a message
        detail = str(error) if isinstance(error, nats.errors.Error | OSError) else ""
        _log.warning("LOG_CONNECTION_ERROR", error=type(error).__name__, detail=detail)

    def _note_violation(self, text: str) -> None:
        if text in self.violations or len(self.violations) >= _MAX_VIOLATIONS:
            return
        self.violations.append(text)
        _log.error("LOG_PERMISSION_VIOLATION", detail=text, action="give the NATS user of this service the subject")

    async def _when_disconnected(self) -> None:
        if self._established:
            _log.warning("LOG_DISCONNECTED")

    async def _when_reconnected(self) -> None:
        self._limit_tcp_silence()
        _log.info("LOG_RECONNECTED", server=self._server_name)

    async def _when_closed(self) -> None:
        if not self._established:
            return
        self._established = False
        reason = str(self.last_error or "") or "the client gave the connection up"
        _log.error("LOG_CLOSED", reason=reason)
        self._on_closed(f"the connection to the log was closed: {reason}")


async def connect(
    settings: LogSettings,
    *,
    name: str,
    on_closed: Callable[[str], None],
    inbox_prefix: str = "_INBOX",
    deadline: float = CONNECT_DEADLINE_SECONDS,
) -> Connection:
    """Connect to the cluster of *settings*.

    Args:
        settings: its servers are tried in random order, each again and again, until the deadline.
        name: shown in the server's monitoring, such as ``fi-ingest``.
        on_closed: called with a reason when the connection ends for good without :func:`close`: the process is of no
            use from then on and should stop. Losing a server is no such end; that reconnects for ever.
        inbox_prefix: where answers arrive; users with restricted permissions have one each.
        deadline: seconds for the whole first connect.

    Raises:
        LogUnavailableError: no server took the connection in time; it names the servers and their answers.
    """
    nc = Connection(on_closed)
    await nc.open(settings, name=name, inbox_prefix=inbox_prefix, deadline=deadline)
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

    Raises:
        ConfigurationError: the server's ``max_payload`` is too small.
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


def _without_secrets(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
