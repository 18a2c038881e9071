"""The HTTP server: aiohttp's, with bounds on what a client may hold, problem documents for every error, and TLS.

Bounds: the number of connections, the time of TLS handshakes and of a request's headers, and the time for which a
client may leave an answer unread. Bodies have their own (:mod:`services.ingest.formats`). There is no limit for each
address: that is the task of the load balancer in front.

A stop closes the listener, waits for the requests in flight, and then closes all connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from prometheus_client import Counter

from fiq.errors import BindError, ConfigurationError
from services.ingest import problems
from services.ingest.admission import IN_FLIGHT
from services.ingest.metrics import METRICS
from services.ingest.problems import REFUSALS, Refusals, RequestRefusedError
from services.ingest.settings import SETTINGS

CERTIFICATE_VARIABLE, KEY_VARIABLE = "FI_TLS_CERT", "FI_TLS_KEY"
#: seconds for a TLS handshake, and for the client's close_notify
HANDSHAKE_SECONDS, TLS_CLOSE_SECONDS = 10.0, 2.0
#: connections that wait to be accepted
_ACCEPT_QUEUE = 1024
#: seconds until an idle connection is closed
_KEEPALIVE_SECONDS = 75.0
#: seconds for which the rest of a refused body is read and dropped, so that the client reads its answer
_LINGER_SECONDS = 5.0
#: seconds for aiohttp to write answers once nothing is in flight
_FLUSH_SECONDS = 0.5
#: connections beyond the limit that get an answer at the same time; more are closed without one
MAX_REJECTED = 100
#: seconds in which such a client can send its request and read the answer
_REJECTED_SECONDS = 2.0
#: SO_LINGER on, for no time
_NO_LINGER = struct.pack("ii", 1, 0)

#: the context of the listener; absent for plain HTTP
TLS = web.AppKey("tls", ssl.SSLContext)


# -- connections beyond the limit -------------------------------------------------------------------------------------


class ConnectionLimit:
    """Counts connections, and rejects those beyond *limit*.

    A connection counts after its TLS handshake; asyncio neither reports nor limits connections that are still in it,
    so only time bounds these.
    """

    def __init__(self, limit: int, refusals: Refusals) -> None:
        self._limit = limit
        self._refusals = refusals
        self._open = 0
        self._rejected = 0
        self._closed = False

    def enter(self, transport: asyncio.BaseTransport) -> bool:
        """Count a new connection and return True, or reject it."""
        if self._open < self._limit and not self._closed:
            self._open += 1
            return True
        rejected = cast("asyncio.Transport", transport)
        if self._rejected >= MAX_REJECTED or self._closed:
            rejected.set_protocol(asyncio.Protocol())
            rejected.abort()
        else:
            self._rejected += 1
            rejected.set_protocol(_RejectedConnection(rejected, self._answer, self._leave_rejected))
        return False

    def leave(self) -> None:
        """Count the end of a connection that was not rejected."""
        self._open -= 1

    def close(self) -> None:
        """Abort connections that come from now on, out of handshakes that began before the listener was closed."""
        self._closed = True

    def _answer(self) -> bytes:
        return _raw(self._refusals.answer(problems.TOO_MANY_CONNECTIONS))

    def _leave_rejected(self) -> None:
        self._rejected -= 1


class _RejectedConnection(asyncio.Protocol):
    """Answers the first bytes of a connection beyond the limit, and closes it when the client has read the answer."""

    def __init__(self, transport: asyncio.Transport, answer: Callable[[], bytes], closed: Callable[[], None]) -> None:
        self._transport = transport
        self._answer = answer
        self._closed = closed
        self._answered = False
        self._timer = asyncio.get_running_loop().call_later(_REJECTED_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Answer once; drop what comes after that."""
        if self._answered:
            return
        self._answered = True
        self._transport.write(self._answer())
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room for the next one."""
        self._timer.cancel()
        self._closed()


def _raw(response: web.Response) -> bytes:
    """Return *response* as bytes, for a connection that has no parsed request."""
    body = cast("bytes", response.body)
    response.headers["Content-Length"] = str(len(body))
    response.headers["Connection"] = "close"
    head = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
    return f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}\r\n{head}\r\n".encode() + body


# -- one connection ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WriteTimeout:
    """Bounds how long a client may leave what was sent unread, and counts the clients that were cut off."""

    seconds: float
    cut_off: Counter


class ClientConnection(RequestHandler):
    """One connection of a client.

    What aiohttp answers by itself, as text, becomes a problem document here: the router's 404 and 405, 417, broken HTTP
    and unexpected errors. A middleware sees only part of these, and costs every request.

    Attributes:
        write_timeout: of the present answer.
    """

    def __init__(
        self,
        refusals: Refusals,
        limit: ConnectionLimit,
        manager: web.Server,
        *,
        header_timeout: float,
        write_timeout: WriteTimeout,
        is_closing: Callable[[], bool],
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self._refusals = refusals
        self._limit = limit
        self._header_timeout = header_timeout
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_begun = False
        self.write_timeout = self._usual_write_timeout = write_timeout
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_closing = is_closing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Serve a new connection, unless it is rejected."""
        if self._limit.enter(transport):
            # report at once what the kernel does not take: an answer counts as sent when all of it has left the process
            cast("asyncio.Transport", transport).set_write_buffer_limits(high=1, low=0)
            super().connection_made(transport)
            self._await_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Make room for the next one."""
        self._limit.leave()
        self._end_headers()
        self._end_writing()
        super().connection_lost(exc)

    # -- headers in time

    def data_received(self, data: bytes) -> None:
        """Take *data*; a request's headers must be complete in time once they have begun."""
        requests = self._request_count  # aiohttp has no public sign that a request was parsed
        super().data_received(data)
        if self._request_count != requests:
            self._end_headers()
        elif self._idle:
            self._header_begun = True
            if self._header_timer is None:
                self._await_headers()

    @property
    def _idle(self) -> bool:
        """Whether aiohttp waits for the next request: then all bytes belong to its headers."""
        return self._waiter is not None and not self._waiter.done()

    def _await_headers(self) -> None:
        self._header_timer = asyncio.get_running_loop().call_later(self._header_timeout, self._headers_overdue)

    def _end_headers(self) -> None:
        self._header_begun = False
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_overdue(self) -> None:
        """Answer 408 and close; a client that has sent nothing gets no answer."""
        self._header_timer = None
        transport = self.transport
        if not self._idle or transport is None:
            return
        if self._header_begun:
            transport.write(_raw(self._refusals.answer(problems.HEADER_TIMEOUT)))
        self.force_close()
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, transport.abort)  # in case the client does not read

    # -- answers read in time; costs nothing while the kernel takes all at once

    def pause_writing(self) -> None:
        """Start the time in which the client must read what was sent."""
        super().pause_writing()
        if self.transport is not None:
            self._write_timer = asyncio.get_running_loop().call_later(
                self.write_timeout.seconds, self._write_overdue, self.transport
            )

    def resume_writing(self) -> None:
        """Stop it: all has been taken."""
        self._end_writing()
        super().resume_writing()

    def _end_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _write_overdue(self, transport: asyncio.Transport) -> None:
        """Cut the connection off; the kernel drops what it still has to send, too."""
        self._write_timer = None
        self.write_timeout.cut_off.inc()
        connection = transport.get_extra_info("socket")
        if connection is not None:
            with contextlib.suppress(OSError):  # it has gone
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        transport.abort()

    # -- answers

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send *resp*, or the problem for the HTTPException that it is."""
        if isinstance(resp, web.HTTPException):
            allow = resp.headers.get("Allow")
            resp = self._refusals.answer(
                problems.of_status(resp.status), headers={"Allow": allow} if allow else None, request=request
            )
        if self._is_closing():
            resp.force_close()
        finished = await super().finish_response(request, resp, start_time)
        self.write_timeout = self._usual_write_timeout
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer to a request that aiohttp could not parse, or whose handler raised *exc*.

        Raises ConnectionError: the client has gone; aiohttp then closes the connection quietly.
        """
        if isinstance(exc, ConnectionError):
            raise exc
        if isinstance(exc, RequestRefusedError):
            return self._refusals.answer_error(exc, request)
        if status < 500:
            return self._refusals.answer(problems.of_status(status))
        if exc is not None:
            self._refusals.log_failure(exc)
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer had begun")
        response = self._refusals.answer(problems.INTERNAL_ERROR, request=request)
        response.force_close()
        return response


def set_write_timeout(request: web.BaseRequest, timeout: WriteTimeout) -> None:
    """Use *timeout* for the answer to *request*."""
    cast("ClientConnection", request.protocol).write_timeout = timeout


async def send(response: web.StreamResponse, request: web.Request) -> None:
    """Send *response* as a whole; aiohttp then finds nothing left to send."""
    if request.app[IN_FLIGHT].closing:
        response.force_close()
    await response.prepare(request)
    await response.write_eof()


# -- the listener -----------------------------------------------------------------------------------------------------


class HttpServer:
    """Serves *app* on a bound socket; a stop waits *grace* seconds at most."""

    def __init__(self, app: web.Application, sock: socket.socket, *, grace: float) -> None:
        self._app = app
        self._sock = sock
        self._grace = grace
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_FLUSH_SECONDS)
        self._listener: asyncio.Server | None = None
        self._limit = ConnectionLimit(app[SETTINGS].max_connections, app[REFUSALS])

    async def start(self) -> None:
        """Open the application's resources, then accept connections.

        Raises BindError: another process took the port in the meantime.
        """
        await self._runner.setup()
        tls = self._app.get(TLS)
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                self._connect,
                sock=self._sock,
                backlog=_ACCEPT_QUEUE,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if tls else None,
                ssl_shutdown_timeout=TLS_CLOSE_SECONDS if tls else None,
            )
        except OSError as error:
            raise BindError(f"cannot listen (FI_HOST, FI_PORT): {error.strerror or error}") from error

    async def stop(self) -> None:
        """Accept no more, finish what is in flight, and close everything. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            # not left to aiohttp: its runner drops what comes on a connection from the first moment of its shutdown,
            # so a request whose body is still arriving could never finish
            await self._app[IN_FLIGHT].drain(self._grace)
            self._limit.close()
        self._sock.close()
        await self._runner.cleanup()

    def _connect(self) -> ClientConnection:
        manager = self._runner.server
        assert manager is not None
        settings, in_flight = self._app[SETTINGS], self._app[IN_FLIGHT]
        return ClientConnection(
            self._app[REFUSALS],
            self._limit,
            manager,
            loop=asyncio.get_running_loop(),
            access_log=None,
            auto_decompress=False,  # an encoded body is refused, so it must not be decoded
            header_timeout=settings.header_timeout,
            write_timeout=WriteTimeout(settings.answer_timeout, self._app[METRICS].answers_cut),
            is_closing=lambda: in_flight.closing,
            keepalive_timeout=_KEEPALIVE_SECONDS,
            lingering_time=_LINGER_SECONDS,
        )


# -- the certificate, from two files that are read again when they change ---------------------------------------------


@dataclass(frozen=True, slots=True)
class CertificateInfo:
    """A certificate's common name, and its expiry in Unix time."""

    name: str
    expires: float


class Certificate:
    """A certificate with its key, and the TLS context of the listener.

    Each handshake takes the newest context when the client's first message is here. Loading into one context would not
    do: it keeps a certificate for each kind of key, and would go on showing the old one.

    Attributes:
        context: of the listener, for its whole life.
        info: of the certificate that new connections see.
    """

    def __init__(self, certificate: str, key: str) -> None:
        self._certificate = certificate
        self._key = key
        self.info = CertificateInfo("", 0.0)
        self.context = _context()
        self._newest = self.context
        self.context.sni_callback = self._choose

    def load(self) -> None:
        """Read the files for connections from now on; existing ones go on.

        Raises ConfigurationError: a file cannot be read, or the key belongs to another certificate; nothing changes.
        """
        context = _context()
        try:
            # without a password OpenSSL would ask for it on the terminal
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
            info = _read_info(Path(self._certificate).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError([self._problem(error)]) from None
        self._newest = context
        self.info = info

    def _choose(self, connection: ssl.SSLObject, _: str, __: ssl.SSLContext) -> None:
        connection.context = self._newest

    def _problem(self, error: Exception) -> str:
        for variable, path in ((CERTIFICATE_VARIABLE, self._certificate), (KEY_VARIABLE, self._key)):
            try:
                Path(path).read_bytes()
            except OSError as unreadable:
                return f"{variable}={path}: {unreadable.strerror or unreadable}"
        reason = error.reason if isinstance(error, ssl.SSLError) else None
        where = f"{CERTIFICATE_VARIABLE}={self._certificate}, {KEY_VARIABLE}={self._key}"
        expected = "expected a certificate and its key, both PEM, the key without a password"
        return f"{where}: {expected}{'' if not reason else f' ({reason})'}"


def check_both(certificate: str, key: str) -> bool:
    """Return whether TLS is configured. Raises ConfigurationError: one of the two files is missing."""
    if bool(certificate) != bool(key):
        raise ConfigurationError([f"{CERTIFICATE_VARIABLE} and {KEY_VARIABLE}: set both, or neither for plain HTTP"])
    return bool(certificate)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _read_info(pem: bytes) -> CertificateInfo:
    from cryptography import x509  # slow to import, and not needed for plain HTTP

    found: Any = x509.load_pem_x509_certificates(pem)[0]
    names = found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return CertificateInfo(str(names[0].value) if names else "", found.not_valid_after_utc.timestamp())
