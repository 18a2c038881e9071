"""Requests that are tried until they are decided."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import SimpleNamespace

from aiohttp import (
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientConnectorSSLError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
    TraceConfig,
    TraceRequestHeadersSentParams,
)
from aiohttp import ClientError as HttpError
from yarl import URL

from fiq.client.errors import GaveUpError, RefusedError, UnexpectedAnswerError
from fiq.client.records import Problem
from fiq.errors import ConfigurationError

#: after these the same request is sent again; 502 and 504 are a proxy's words for a lost connection
_AGAIN = frozenset({408, 409, 429, 502, 503, 504})
#: problems after which surely nothing is stored, of a single event
_NOTHING_STORED = frozenset({"too-many-connections", "log-full", "log-refused", "backlog-full"})
#: and those after which something is, although it is no success
_STORED_ALL_THE_SAME = frozenset({"idempotency-key-reused"})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a client tries.

    Attributes:
        deadline: of one call with all of its tries and pauses, seconds. Of :meth:`AsyncClient.follow`: the longest time
            without a word from the service.
        attempt_timeout: of one try, seconds; more than the service's FI_PUBLISH_DEADLINE.
        initial_backoff: before the second try, seconds. Each further pause is twice as long; half of it is random, so
            that many clients do not retry at the same moment.
        max_backoff: what the pauses grow to, seconds. A longer ``Retry-After`` counts all the same.
    """

    deadline: float = 60.0
    attempt_timeout: float = 15.0
    initial_backoff: float = 0.1
    max_backoff: float = 5.0


class Tries:
    """The tries of one call."""

    def __init__(self, retry: RetryPolicy) -> None:
        self._retry = retry
        self.renew()

    def renew(self) -> None:
        """Begin anew: the last try was a success."""
        self._failed = 0
        self._end = time.monotonic() + self._retry.deadline

    @property
    def timeout(self) -> float:
        """Seconds that the next try may take."""
        return max(0.001, min(self._retry.attempt_timeout, self._end - time.monotonic()))

    def pause(self, retry_after: float) -> float | None:
        """Return how long to wait after a failed try, seconds; None when the deadline does not allow another one.

        Args:
            retry_after: what the service asks for at least, seconds.
        """
        backoff = min(self._retry.max_backoff, self._retry.initial_backoff * 2.0 ** min(self._failed, 32))
        self._failed += 1
        pause = retry_after + backoff * random.uniform(0.5, 1.0)  # noqa: S311 - no secrets
        return pause if time.monotonic() + pause < self._end else None


def retry_after(headers: Mapping[str, str]) -> float:
    """Return what ``Retry-After`` asks for, seconds; 0 when it is missing or malformed (RFC 9110, section 10.2.3)."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:  # "-0000": UTC without a place
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        method: of HTTP.
        path: below the service's URL.
        expected: the status of success.
        headers: besides the token.
        query: parameters.
        body: bytes; None for none.
        events: how many it would store.
    """

    method: str
    path: str
    expected: int
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)
    events: int = 0


class LostError(Exception):
    """Raised when a try brought no answer; *why*, and *sent*: the request may have arrived."""

    def __init__(self, why: str, *, sent: bool) -> None:
        super().__init__(why)
        self.sent = sent


class Exchange:
    """The connections to one service.

    Attributes:
        retries: tries that were made again, so far.
    """

    def __init__(self, url: str, token: str | None, retry: RetryPolicy, *, connections: int) -> None:
        self._url = _checked_url(url)
        self._headers = {"User-Agent": "fiq", **_authorization(token)}
        self._connections = connections
        self._session: ClientSession | None = None
        self.retry = retry
        self.retries = 0

    def open(self, context: ssl.SSLContext | None) -> None:
        """Be ready for requests; *context* is of TLS, None for the machine's authorities."""
        connector = TCPConnector(limit=self._connections, ssl=context or True)
        trace = TraceConfig()
        trace.on_request_headers_sent.append(_note_sending)
        self._session = ClientSession(
            connector=connector, headers=self._headers, cookie_jar=DummyCookieJar(), trace_configs=[trace]
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def call(self, request: Request) -> bytes:
        """Return the body of the answer to *request*, which is sent until it is decided.

        Raises:
            RefusedError: the service refuses.
            UnexpectedAnswerError: the answer is none of fiq's.
            GaveUpError: the deadline has passed.
        """
        tries = Tries(self.retry)
        may_be_stored = False
        while True:
            problem, least, why = None, 0.0, ""
            try:
                async with self.sent(request, ClientTimeout(total=tries.timeout)) as response:
                    body = await response.read()
                if response.status == request.expected:
                    return body
                problem, least = self.judged(request, response, body, may_be_stored), retry_after(response.headers)
                may_be_stored |= _may_be_stored(request, problem)
            except LostError as lost:
                may_be_stored |= lost.sent and request.events > 0
                why = str(lost)
            await self.wait(tries, problem, least, why, may_be_stored=may_be_stored)

    @asynccontextmanager
    async def sent(self, request: Request, timeout: ClientTimeout) -> AsyncIterator[ClientResponse]:
        """Send *request* once and yield the answer, whose body is to be read inside.

        Raises:
            LostError: there is none, or it breaks off.
            UnexpectedAnswerError: the service's certificate is not trusted.
        """
        if self._session is None:
            raise RuntimeError("use the client as a context manager: async with AsyncClient(…) as client")
        sending: list[bool] = []
        try:
            async with self._session.request(
                request.method,
                self._url.joinpath(request.path, encoded=True),
                params=request.query,
                headers=request.headers,
                data=request.body,
                timeout=timeout,
                allow_redirects=False,  # neither the token nor an event goes anywhere else
                trace_request_ctx=sending,
            ) as response:
                yield response
        except ClientConnectorCertificateError:
            raise UnexpectedAnswerError(
                f"the certificate of {self._url.origin()} is not trusted: name its authority"
            ) from None
        except (HttpError, TimeoutError, OSError) as error:
            raise LostError(_why(error), sent=bool(sending)) from None

    def judged(self, request: Request, response: ClientResponse, body: bytes, may_be_stored: bool) -> Problem:
        """Return the problem of an answer after which *request* is to be sent again.

        Raises:
            RefusedError: that would be of no use.
            UnexpectedAnswerError: it is no answer of fiq.
        """
        problem = Problem.of(response.status, response.content_type, body)
        if response.status in _AGAIN:
            return problem
        may_be_stored |= _may_be_stored(request, problem)
        if response.status < 400:
            raise UnexpectedAnswerError(
                f"{self._url.origin()} answers {response.status} where fiq does not: is that its URL?",
                problem=problem,
                may_be_stored=may_be_stored,
            )
        doubt = "" if problem.is_document else f", and not as fiq says it: is {self._url.origin()} its URL?"
        raise RefusedError(f"refused: {problem}{doubt}", problem=problem, may_be_stored=may_be_stored)

    async def wait(
        self, tries: Tries, problem: Problem | None, least: float, why: str, *, may_be_stored: bool = False
    ) -> None:
        """Wait before the next try, at least *least* seconds; *why* there was no answer, when there is no *problem*.

        Raises:
            GaveUpError: there is no time for another one.
        """
        pause = tries.pause(least)
        if pause is None:
            last = str(problem) if problem else f"no answer from {self._url.origin()}: {why}"
            message = f"not done within {self.retry.deadline:g} s: {last}"
            raise GaveUpError(message, problem=problem, may_be_stored=may_be_stored)
        self.retries += 1
        await asyncio.sleep(pause)


async def _note_sending(_: ClientSession, context: SimpleNamespace, __: TraceRequestHeadersSentParams) -> None:
    """Note that the request is on its way from here on, in the list that was given with it."""
    context.trace_request_ctx.append(True)


def _why(error: Exception) -> str:
    """Say why there is no answer, without quoting anything of one."""
    if isinstance(error, ClientConnectorDNSError):
        return "the name of its host is not known"
    if isinstance(error, ClientConnectorSSLError):
        return "what listens there speaks no TLS, or refuses ours"
    if isinstance(error, ClientConnectorError):
        return os.strerror(error.errno) if error.errno else "no connection"
    return "nothing came in time" if isinstance(error, TimeoutError) else "the connection broke off"


def _may_be_stored(request: Request, problem: Problem) -> bool:
    """Return whether something of *request* may be stored although it was answered with *problem*."""
    slug = problem.type.rpartition("/")[2]
    if not request.events:
        return False
    if slug in _STORED_ALL_THE_SAME:
        return request.events > 1
    if problem.status in (409, 429):
        return problem.status == 409 or (request.events > 1 and slug != "rate-limited")
    if problem.status < 500:
        return problem.status < 400
    return request.events > 1 or slug not in _NOTHING_STORED


def _checked_url(url: str) -> URL:
    try:
        parsed = URL(url)
    except ValueError:
        parsed = URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigurationError(["the URL of the service is http://host:port or https://host:port"])
    return parsed


def _authorization(token: str | None) -> dict[str, str]:
    if token is None:
        return {}
    if not token or not all("\x21" <= character <= "\x7e" for character in token):
        raise ConfigurationError(["a token is one word of visible ASCII characters"])
    return {"Authorization": f"Bearer {token}"}
