"""The HTTP server: aiohttp's, but every error is a problem document, and a stop waits for what is in flight."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from fiq.errors import BindError, ConfigurationError
from services.ingest import problems
from services.ingest.answers import Answers, trace_id_of
from services.ingest.connections import Connections, Patience, Sending, in_bytes
from services.ingest.handlers import ANSWERS, METRICS, SETTINGS
from services.ingest.problems import RequestRefusedError

CERTIFICATE_VARIABLE, KEY_VARIABLE = "FI_TLS_CERT", "FI_TLS_KEY"
#: seconds for a TLS handshake, and for the other side's farewell
HANDSHAKE_SECONDS, FAREWELL_SECONDS = 10.0, 2.0
#: connections that wait to be accepted
_BACKLOG = 1024
#: seconds until an idle connection is closed
_KEEPALIVE_SECONDS = 75.0
#: seconds for which the rest of a refused body is read and dropped, so that the client gets to read its answer
_LINGER_SECONDS = 5.0
#: seconds that aiohttp gets to write answers that are ready, once nothing is in flight any more
_FLUSH_SECONDS = 0.5

#: what the listener shows; absent for plain HTTP
TLS = web.AppKey("tls", ssl.SSLContext)


class Protocol(RequestHandler):
    """One connection. What aiohttp would answer by itself, in text, becomes a problem document here.

    This is the one place that sees all of them: the router's 404 and 405, 417, broken HTTP and unexpected errors.
    A middleware sees only what a route was found for, and costs every request.
    """

    def __init__(
        self,
        answers: Answers,
        connections: Connections,
        manager: web.Server,
        *,
        header_timeout: float,
        patience: Patience,
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self._answers = answers
        self._connections = connections
        self._header_timeout = header_timeout
        #: a handler of long answers may be more patient here
        self.sending = Sending(patience)
        self._header_timer: asyncio.TimerHandle | None = None
        self._header_begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Serve a new connection, unless there are too many; then this is the last that is heard of it."""
        if self._connections.enter(transport):
            # an answer counts as sent when all of it has left the process: what a closed connection still has to send
            # would be kept until its client reads it
            cast("asyncio.Transport", transport).set_write_buffer_limits(high=1, low=0)
            super().connection_made(transport)
            self._await_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Make room for another one."""
        self._connections.leave()
        self._end_headers()
        self.sending.goes_on()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to lose patience: the client does not take what is sent as fast as it comes."""
        super().pause_writing()
        if self.transport is not None:
            self.sending.waits(self.transport)

    def resume_writing(self) -> None:
        """Be patient again: everything was taken."""
        self.sending.goes_on()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Take *data*, and see to it that a request's headers are complete in time once they have begun."""
        requests = self._request_count
        super().data_received(data)
        if self._request_count != requests:
            self._end_headers()
        elif self._idle:
            self._header_begun = True
            if self._header_timer is None:
                self._await_headers()

    @property
    def _idle(self) -> bool:
        """Whether the next request is waited for: then whatever comes is a part of its headers."""
        return self._waiter is not None and not self._waiter.done()

    def _await_headers(self) -> None:
        self._header_timer = asyncio.get_running_loop().call_later(self._header_timeout, self._give_up)

    def _end_headers(self) -> None:
        self._header_begun = False
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        """Answer 408 and close; whoever has sent nothing at all has asked nothing and gets no answer."""
        self._header_timer = None
        transport = self.transport
        if not self._idle or transport is None:
            return
        if self._header_begun:
            transport.write(in_bytes(self._answers.refused(problems.HEADER_TIMEOUT)))
        self.force_close()
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, transport.abort)  # whoever does not read either

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send *resp*, or the problem that stands for the HTTPException that it is."""
        if isinstance(resp, web.HTTPException):
            allow = resp.headers.get("Allow")
            resp = self._answers.refused(
                problems.of_status(resp.status),
                headers={"Allow": allow} if allow else None,
                trace_id=trace_id_of(request),
            )
        finished = await super().finish_response(request, resp, start_time)
        self.sending.answered()
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer to a request that aiohttp could not parse, or whose handler raised *exc*.

        Raises ConnectionError: there is nobody left to answer; aiohttp then closes the connection quietly.
        """
        if isinstance(exc, ConnectionError):
            raise exc
        if isinstance(exc, RequestRefusedError):
            return self._answers.refused(exc.problem, exc.detail, headers=exc.headers, trace_id=trace_id_of(request))
        if status < 500:
            return self._answers.refused(problems.of_status(status))
        if exc is not None:
            self._answers.failed(exc)
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer had begun")
        response = self._answers.refused(problems.INTERNAL_ERROR, trace_id=trace_id_of(request))
        response.force_close()
        return response


class HttpServer:
    """Serves *app* on a bound socket."""

    def __init__(self, app: web.Application, sock: socket.socket, *, grace: float) -> None:
        self._app = app
        self._sock = sock
        self._grace = grace
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_FLUSH_SECONDS)
        self._listener: asyncio.Server | None = None
        self._connections = Connections(app[SETTINGS].max_connections, app[ANSWERS])

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
                backlog=_BACKLOG,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if tls else None,
                ssl_shutdown_timeout=FAREWELL_SECONDS if tls else None,
            )
        except OSError as error:
            raise BindError(f"cannot listen (FI_HOST, FI_PORT): {error.strerror or error}") from error

    async def stop(self) -> None:
        """Accept no more, finish what is in flight, at most for the grace period, and close everything. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            # not left to aiohttp: its runner drops what comes on a connection from the first moment of its shutdown,
            # so a request whose body is on the way could never finish
            await self._app[ANSWERS].drain(self._grace)
            self._connections.close()
        self._sock.close()
        await self._runner.cleanup()

    def _connect(self) -> Protocol:
        manager = self._runner.server
        assert manager is not None
        return Protocol(
            self._app[ANSWERS],
            self._connections,
            manager,
            loop=asyncio.get_running_loop(),
            access_log=None,
            auto_decompress=False,  # an encoded body is refused, so nothing must unpack it first
            header_timeout=self._app[SETTINGS].header_timeout,
            patience=Patience(self._app[SETTINGS].answer_timeout, self._app[METRICS].answers_cut),
            keepalive_timeout=_KEEPALIVE_SECONDS,
            lingering_time=_LINGER_SECONDS,
        )


# -- The certificate that ingest shows to its clients, from two files that are read again when they change -----------


@dataclass(frozen=True, slots=True)
class Shown:
    """What is told of a certificate: its common name, and its end in Unix time."""

    name: str
    expires: float


class Certificate:
    """A certificate with its key, and the context of a listener that shows it.

    Each handshake takes the newest context: it is chosen when the client's first message is here. Loading into one
    context would not do, as that keeps a certificate for each kind of key, and would show the old one beside the new.

    Attributes:
        context: for the listener, for as long as that lives.
        shown: of the certificate that new connections see.
    """

    def __init__(self, certificate: str, key: str) -> None:
        self._certificate = certificate
        self._key = key
        self.shown = Shown("", 0.0)
        self.context = _context()
        self._newest = self.context
        self.context.sni_callback = self._choose

    def load(self) -> None:
        """Read the files; connections from now on see what they hold, and those that there are go on.

        Raises ConfigurationError: one of them cannot be read, or they do not belong together; nothing has changed.
        """
        context = _context()
        try:
            # an encrypted key would ask on the terminal
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
            shown = _read(Path(self._certificate).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError([self._problem(error)]) from None
        self._newest = context
        self.shown = shown

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
    """Say whether TLS is wanted. Raises ConfigurationError: one of the two is missing."""
    if bool(certificate) != bool(key):
        raise ConfigurationError([f"{CERTIFICATE_VARIABLE} and {KEY_VARIABLE}: set both, or none for plain HTTP"])
    return bool(certificate)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _read(pem: bytes) -> Shown:
    from cryptography import x509  # who speaks plain HTTP need not wait for it

    found: Any = x509.load_pem_x509_certificates(pem)[0]
    names = found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return Shown(str(names[0].value) if names else "", found.not_valid_after_utc.timestamp())
