"""The HTTP server: aiohttp's, with bounds on what a client may hold, problem documents for every error, and TLS.

Bounds: the number of connections, the time of TLS handshakes, the time and bytes of a request's headers, and the time
for which a client may leave an answer unread. Bodies have their own (:mod:`services.ingest.formats`). Query parameters
are those of the description, and no others. There is no limit for each address: that is the task of the load balancer
in front.

A stop closes the listener, waits for the requests in flight, and then closes all connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from aiohttp import StreamReader, hdrs, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.typedefs import Handler, Middleware
from aiohttp.web_protocol import RequestHandler
from prometheus_client import Counter

from fiq.errors import BindError, ConfigurationError
from services.ingest import problems
from services.ingest.access import GRANT
from services.ingest.admission import ADMISSION, IN_FLIGHT, Admission
from services.ingest.metrics import METRICS
from services.ingest.openapi import Json, query_parameters
from services.ingest.problems import REFUSALS, ProblemType, Refusals, RequestRefusedError
from services.ingest.settings import SETTINGS
from services.log.errors import TooManyInFlightError

CERTIFICATE_VARIABLE, KEY_VARIABLE = "FI_TLS_CERT", "FI_TLS_KEY"
#: seconds for a TLS handshake, and for the client's close_notify
HANDSHAKE_SECONDS, TLS_CLOSE_SECONDS = 10.0, 2.0
#: connections that wait to be accepted
_ACCEPT_QUEUE = 1024
#: seconds until an idle connection is closed; a stranger's is after FI_HEADER_TIMEOUT
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
    """Counts connections; at *limit* it makes room for a new one, or rejects it.

    A stranger is a connection on which no request was allowed yet. At the limit the stranger that was answered longest
    ago is closed, so clients without a token do not keep others out. If none can be, the new connection is rejected.

    A connection counts after its TLS handshake; asyncio neither reports nor limits connections that are still in it,
    so only time bounds these.
    """

    def __init__(self, limit: int, refusals: Refusals, evicted: Counter) -> None:
        self._limit = limit
        self._refusals = refusals
        self._evicted = evicted
        self._open: set[ClientConnection] = set()
        #: oldest first
        self._strangers: dict[ClientConnection, None] = {}
        self._rejected = 0
        self._closed = False

    def enter(self, connection: ClientConnection, transport: asyncio.BaseTransport) -> bool:
        """Count a new connection and return True, or reject it."""
        if not self._closed and (len(self._open) < self._limit or self._evict()):
            self._open.add(connection)
            self._strangers[connection] = None
            return True
        rejected = cast("asyncio.Transport", transport)
        if self._rejected >= MAX_REJECTED or self._closed:
            rejected.set_protocol(asyncio.Protocol())
            rejected.abort()
        else:
            self._rejected += 1
            rejected.set_protocol(_RejectedConnection(rejected, self._answer, self._leave_rejected))
        return False

    def answered(self, connection: ClientConnection) -> None:
        """Note that a stranger got an answer."""
        if self._strangers.pop(connection, connection) is None:
            self._strangers[connection] = None

    def known(self, connection: ClientConnection) -> None:
        """Note that a request was allowed on *connection*: it is no stranger any more."""
        self._strangers.pop(connection, None)

    def leave(self, connection: ClientConnection) -> None:
        """Count the end of *connection*. Idempotent."""
        self._open.discard(connection)
        self._strangers.pop(connection, None)

    def _evict(self) -> bool:
        """Close the oldest stranger whose request is not being handled; return whether there is one."""
        for connection in self._strangers:
            if connection.evict():
                self.leave(connection)
                self._evicted.inc()
                return True
        return False

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


# -- the bytes of headers ---------------------------------------------------------------------------------------------

#: bytes of a request's line and headers: as many as HAProxy takes by default
MAX_HEAD_BYTES = 16 * 2**10
#: headers of a request, and bytes for which each counts in addition to its own: its objects take three times as many,
#: like the copies of a body
_MAX_HEADERS, _HEADER_BYTES = 128, 128
#: bytes of each connection that are not counted
_UNCOUNTED_BYTES = 4 * 2**10
#: bytes of a request besides path and headers; and around each byte of a body in chunks of one byte
_LINE_BYTES, _FRAMING_BYTES = 64, 8
#: requests that wait on a connection until nothing more is read from it
_MAX_PIPELINED = 2
#: of a parser: requests with their bodies, no change of protocol, no bytes left over
_Requests = Sequence[tuple[RawRequestMessage, StreamReader]]
_Parsed = tuple[_Requests, bool, bytes]


class HeadRefusedError(HttpProcessingError):
    """Raised when the headers of a request are not taken; aiohttp answers it with *problem* in its turn."""

    def __init__(self, problem: ProblemType) -> None:
        super().__init__(code=problem.status, message=problem.title)
        self.problem = problem


class BoundedParser:
    """aiohttp's parser of one connection, with bounds on what it holds besides bodies.

    These are headers of requests that are not answered yet, unfinished headers, bytes that are not parsed yet, and what
    is around the chunks of a body. They are counted with the bodies of all connections when they exceed 4 KiB, so most
    requests cost a comparison. aiohttp does not say where in the data a request ends: what is unfinished may be taken
    for up to 16 KiB less than it is.

    Args:
        parser: aiohttp's.
        admission: counts bytes.
        on_given_up: called when unfinished headers or an unfinished body must give way to others.

    Attributes:
        size: bytes that are counted.
    """

    def __init__(self, parser: Any, admission: Admission, on_given_up: Callable[[], None]) -> None:
        self.size = 0
        self._parser = parser
        self._admission = admission
        self._on_given_up = on_given_up
        #: of the last request
        self._body: StreamReader = EMPTY_PAYLOAD
        self._chunked = False
        #: requests that are parsed and not being handled
        self._waiting = 0
        #: the body is not read as fast as it comes
        self._paused = False
        self._unparsed = b""
        #: bytes of complete headers, of unfinished ones, their lines, and bytes around the chunks of a body
        self._complete = self._unfinished = self._lines = self._framing = 0

    # -- as aiohttp's

    def feed_data(self, data: bytes) -> _Parsed:
        """Parse *data*. Raises HttpProcessingError: it is not HTTP, or not taken."""
        self._paused = False
        if self._unparsed:
            data, self._unparsed = self._unparsed + data, b""
        if len(data) <= MAX_HEAD_BYTES:
            return self._feed(data), False, b""
        requests: list[tuple[RawRequestMessage, StreamReader]] = []
        for begin in range(0, len(data), MAX_HEAD_BYTES):
            if self._paused or self._waiting >= _MAX_PIPELINED:
                self._unparsed = data[begin:]
                self._update()
                break
            requests += self._feed(data[begin : begin + MAX_HEAD_BYTES])
        return requests, False, b""

    def message_consumed(self) -> None:
        """Note that a request is being handled."""
        self._waiting -= 1
        if self._parser is not None:
            self._parser.message_consumed()

    def pause_reading(self) -> None:
        """Stop parsing until more is fed."""
        self._paused = True
        if self._parser is not None:
            self._parser.pause_reading()

    # -- what it holds

    def answered(self) -> None:
        """Note that all requests so far are answered."""
        if self._complete:
            self._complete = 0
            self._update()

    def close(self) -> None:
        """Hold nothing, and parse no more. Idempotent."""
        self._parser = None
        self._unparsed = b""
        self._complete = self._unfinished = self._lines = self._framing = 0
        self._update()

    def give_up(self) -> None:
        """Drop what is unfinished, because its memory is needed."""
        self.close()
        self._on_given_up()

    def end_body(self, error: Exception) -> None:
        """End the reading of an unfinished body with *error*."""
        if not self._body.is_eof():
            self._body.set_exception(error)
            self._body.feed_eof()  # or aiohttp would wait for the rest of it

    def _feed(self, data: bytes) -> _Requests:
        if self._parser is None:
            return ()
        body = self._body
        in_body = not body.is_eof()
        before = body.total_bytes
        parsed: _Parsed = self._parser.feed_data(data)
        requests = self._unchanged(parsed) if parsed[1] else parsed[0]
        if any(not message.headers.get(hdrs.EXPECT, "").isascii() for message, _ in requests):
            raise self._refuse(problems.EXPECTATION_FAILED)  # aiohttp would put it into its answer, and fail
        if len(requests) == 1 and not in_body and not self._unfinished:  # the usual case
            message, self._body = requests[0]
            if len(data) + len(message.raw_headers) * _HEADER_BYTES <= _UNCOUNTED_BYTES:
                self._waiting += 1
                self._chunked = message.chunked
                return requests
        progress = body.total_bytes - before if in_body else 0
        if requests or progress < len(data) or self.size:
            self._count(data, requests, progress, in_body=in_body)
        return requests

    def _unchanged(self, parsed: _Parsed) -> _Requests:
        """Return the requests; a change of protocol is declined, so what follows its request is another one."""
        requests = parsed[0]
        while parsed[1]:
            self._parser.set_upgraded(False)
            parsed = self._parser.feed_data(parsed[2])
            requests = (*requests, *parsed[0])
        return requests

    def _count(self, data: bytes, requests: _Requests, progress: int, *, in_body: bool) -> None:
        """Count *data*, of which *progress* bytes went into the body that was being read."""
        rest = len(data) - progress
        if in_body and self._chunked and (requests or self._body.is_eof()):
            rest -= _LINE_BYTES + progress * _FRAMING_BYTES
        for message, body in requests:
            head = len(message.path) + sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
            if head > MAX_HEAD_BYTES:
                raise self._refuse(problems.HEADERS_TOO_LARGE)
            self._complete += head + len(message.raw_headers) * _HEADER_BYTES
            rest -= head + _LINE_BYTES + body.total_bytes * (1 + message.chunked * _FRAMING_BYTES)
            self._body, self._chunked = body, message.chunked
        self._waiting += len(requests)
        if requests or in_body:
            self._unfinished = self._lines = 0
        if not self._body.is_eof():
            self._framing = max(0, rest) if requests else self._framing + rest
        else:
            self._framing = 0
            self._unfinished += max(0, rest)
            self._lines = min(_MAX_HEADERS, self._lines + data.count(b"\n", len(data) - max(0, rest)))
        if self._unfinished > MAX_HEAD_BYTES:
            raise self._refuse(problems.HEADERS_TOO_LARGE)
        if self._chunked and self._framing > MAX_HEAD_BYTES + self._body.total_bytes * _FRAMING_BYTES:
            self.end_body(web.RequestPayloadError("too much is around the chunks of the body"))
            self.close()
        self._update()

    def _update(self) -> None:
        """Count what is held now. Raises HeadRefusedError: there is no memory for it."""
        held = self._complete + self._unfinished + self._lines * _HEADER_BYTES + max(0, self._framing)
        held += len(self._unparsed)
        more = (held if held > _UNCOUNTED_BYTES else 0) - self.size
        complete = not self._unfinished and self._body.is_eof()
        if complete or not self.size + more:
            self._admission.completed(self)
        if more < 0:
            self._admission.drop_bytes(-more, self)
        elif more:
            try:
                self._admission.take_bytes(more, self, complete=complete)
            except TooManyInFlightError:
                raise self._refuse(problems.TOO_MANY_IN_FLIGHT) from None

    def _refuse(self, problem: ProblemType) -> HeadRefusedError:
        self.close()
        return HeadRefusedError(problem)


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
        admission: Admission,
        manager: web.Server,
        *,
        header_timeout: float,
        write_timeout: WriteTimeout,
        is_closing: Callable[[], bool],
        **options: Any,
    ) -> None:
        super().__init__(manager, max_headers=_MAX_HEADERS, **options)
        self._refusals = refusals
        self._limit = limit
        self._heads = BoundedParser(self._parser, admission, self._given_up)
        self._parser = cast("Any", self._heads)
        self._max_msg_queue_size, self._msg_queue_resume_size = _MAX_PIPELINED, _MAX_PIPELINED - 1
        #: requests that were handled, up to their answers; whether one of them was allowed
        self._handled = 0
        self._known = False
        #: unlike aiohttp's, also while the connection is being closed
        self._socket_transport: asyncio.Transport | None = None
        self._header_timeout = header_timeout
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_begun = False
        self.write_timeout = self._usual_write_timeout = write_timeout
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_closing = is_closing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Serve a new connection, unless it is rejected."""
        if self._limit.enter(self, transport):
            self._socket_transport = cast("asyncio.Transport", transport)
            # report at once what the kernel does not take: an answer counts as sent when all of it has left the process
            self._socket_transport.set_write_buffer_limits(high=1, low=0)
            super().connection_made(transport)
            self._await_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Make room for the next one."""
        self._limit.leave(self)
        self._heads.close()
        self._end_headers()
        self._end_writing()
        super().connection_lost(exc)

    def evict(self) -> bool:
        """Cut the connection off, unless a request is being handled; return whether it was."""
        if self._socket_transport is None or self._handled < self._request_count:
            return False
        self._socket_transport.abort()
        return True

    def _given_up(self) -> None:
        """Answer 429 and close: what the client has sent so far had to be dropped."""
        if self._idle and self.transport is not None:
            self.transport.write(_raw(self._refusals.answer(problems.TOO_MANY_IN_FLIGHT)))
            self.force_close()
        elif self._handled < self._request_count:  # by the handler, which reads the body, or has earlier requests
            self._heads.end_body(TooManyInFlightError("the request was slow, and its memory was needed for others"))
            self.close()
        else:  # the rest of a refused body
            self.force_close()

    # -- headers in time

    def data_received(self, data: bytes) -> None:
        """Take *data*; a request's headers must be complete in time once they have begun."""
        requests = self._request_count  # aiohttp has no public sign that a request was parsed
        super().data_received(data)
        if self._request_count != requests:
            self._end_headers()
        elif self._idle and not self._header_begun:
            if requests:  # the first one's time began with the connection
                self._await_headers()
            self._header_begun = True

    @property
    def _idle(self) -> bool:
        """Whether aiohttp waits for the next request: then all bytes belong to its headers."""
        return self._waiter is not None and not self._waiter.done()

    def _await_headers(self) -> None:
        self._end_headers()
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
        if self._is_closing() or self._close:
            resp.force_close()
        self._handled += 1
        if not self._known:
            self._known = GRANT in request
            (self._limit.known if self._known else self._limit.answered)(self)
        finished = await super().finish_response(request, resp, start_time)
        self.write_timeout = self._usual_write_timeout
        if not self._messages:
            self._heads.answered()
        if not self._known and self.transport is not None:
            self._await_headers()
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
        if isinstance(exc, HeadRefusedError):
            refused = self._refusals.answer(exc.problem)
            refused.force_close()
            return refused
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


def checked_parameters(refusals: Refusals, description: Json) -> Middleware:
    """Return a middleware that refuses query parameters which *description* does not have, and those sent twice."""
    known = query_parameters(description)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.rel_url.raw_query_string:
            return await handler(request)
        resource = request.match_info.route.resource
        method = hdrs.METH_GET if request.method == hdrs.METH_HEAD else request.method
        names = None if resource is None else known.get((method, resource.canonical))
        if names is None:
            return await handler(request)
        sent = set(request.query)
        if sent <= names and len(sent) == len(request.query):
            return await handler(request)
        if sent <= names:
            detail = "A query parameter may be sent once only."
        elif names:
            detail = f"The query parameters of this resource are {', '.join(sorted(names))}; another one was sent."
        else:
            detail = "This resource has no query parameters: leave them out."
        return refusals.answer(problems.INVALID_PARAMETER, detail, request=request)

    return check


# -- the listener -----------------------------------------------------------------------------------------------------


class HttpServer:
    """Serves *app* on a bound socket; a stop waits *grace* seconds at most."""

    def __init__(self, app: web.Application, sock: socket.socket, *, grace: float) -> None:
        self._app = app
        self._sock = sock
        self._grace = grace
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_FLUSH_SECONDS)
        self._listener: asyncio.Server | None = None
        evicted = app[METRICS].connections_evicted
        self._limit = ConnectionLimit(app[SETTINGS].max_connections, app[REFUSALS], evicted)

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
            self._app[ADMISSION],
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
