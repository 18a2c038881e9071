"""The asynchronous client: one object a service, one method for each thing that the service does.

How it works:

1.  *Every post has a key*, the caller's or a UUIDv7 made here, so the service stores the event once however often the
    request is sent. The body and the key are fixed before the first attempt.
2.  *A request is sent until it is decided.* A lost connection, a timeout and the statuses 408, 409, 429, 502, 503 and
    504 are retried with exponential backoff, never before ``Retry-After``, until the deadline of :class:`RetryPolicy`.
    Anything else is an answer or an error at once. While it retries, the client records whether an attempt may have
    stored the event, and says so in the error.
3.  *Batches of any length are split* into requests within the service's limits on number and bytes, which are sent one
    after the other, so the order is kept. An event's key depends only on the batch's key and the event's number, not
    on where the batch was split.
4.  *Reading* is a request a page. A page that breaks off is requested again.
5.  *Following* is a stream of Server-Sent Events. When the connection breaks, ends or is silent for too long, another
    one continues after the last event.

:class:`fiq.client.Client` (``sync.py``) offers the same methods to synchronous programs.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import os
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import SimpleNamespace, TracebackType
from typing import Any, Literal, Self
from uuid import UUID

import orjson
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

from fiq.client.batches import MAX_BATCH_BYTES, Batch, EventBody, encoded, split_async
from fiq.client.errors import (
    ClientError,
    ClosedError,
    GaveUpError,
    InvalidArgumentError,
    RefusedError,
    UnexpectedAnswerError,
)
from fiq.client.records import Accepted, ConsultationSummary, Problem, StoredEvent
from fiq.errors import InvalidIdError
from fiq.event import bare_key, check_consultation_id, new_event_id, parse_exactly

#: the same request is sent again after these; 502 and 504 are how a proxy reports a lost connection
_RETRIED = frozenset({408, 409, 429, 502, 503, 504})
#: problems after which a single event is certainly not stored
_NOT_STORED = frozenset({"too-many-connections", "log-full", "log-refused", "backlog-full"})
#: problem of a batch of which some events are stored
_PARTLY_STORED = "idempotency-key-reused"
_UNKNOWN_EVENT = "/problems/unknown-event"
#: entries of a page, at most: the service's own limit
_MAX_PAGE = 1000
_JSON = "application/json"
_NDJSON = "application/x-ndjson"
_EVENT_STREAM = "text/event-stream"
_log = logging.getLogger("fiq.client")
_END_OF_LINE = re.compile("\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often a request is sent.

    Attributes:
        deadline: of one request with all of its attempts and pauses, seconds. For :meth:`AsyncClient.follow`: the
            longest time without a byte from the service.
        attempt_timeout: of one attempt, seconds; more than the service's FI_PUBLISH_DEADLINE.
        initial_backoff: pause before the second attempt, seconds. Each further pause is twice as long; half of it is
            random, so that many clients do not retry at the same moment.
        max_backoff: longest of these pauses, seconds. A longer ``Retry-After`` is respected.
    """

    deadline: float = 60.0
    attempt_timeout: float = 15.0
    initial_backoff: float = 0.1
    max_backoff: float = 5.0

    def __post_init__(self) -> None:
        if not (self.deadline > 0 and self.attempt_timeout > 0):
            raise InvalidArgumentError("deadline and attempt_timeout are more than 0 seconds")


class AsyncClient:
    """Posts, reads and follows the events of one service; an async context manager.

    Any number of tasks of one event loop may use it at the same time. Without ``async with`` call :meth:`aclose` at
    the end.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        connections: int = 100,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Check the arguments; connections are opened when they are needed.

        Args:
            url: of the service, ``http://host:port`` or ``https://host:port``.
            token: made by `fiq token`; None if the service requires none.
            retry: how long and how often a request is sent.
            connections: maximum at the same time.
            context: for ``https``; None trusts the machine's authorities.

        Raises:
            InvalidArgumentError: *url* or *token* is malformed.
        """
        self._url = service_url(url)
        self._headers = {"User-Agent": "fiq", **_authorization(token)}
        self._retry = retry or RetryPolicy()
        self._connections = connections
        self._context = context
        self._session: ClientSession | None = None
        self._closed = False
        self._retries = 0
        self._batch_bytes = MAX_BATCH_BYTES

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. Calls after it, and those under way, raise ClosedError."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    @property
    def retries(self) -> int:
        """Requests that were sent again, so far."""
        return self._retries

    async def post(self, consultation: str, event: EventBody, key: str | None = None) -> Accepted:
        """Store *event*.

        Args:
            consultation: id of the consultation.
            event: with an ``event_type``.
            key: identifies the event, so that another call with it is a retry; by default a new UUIDv7.

        Raises:
            InvalidArgumentError: an id, the key or the event is malformed, or the event holds NaN or an infinity.
            RefusedError, UnexpectedAnswerError: a retry would not help.
            GaveUpError: not decided before the deadline.
        """
        path = _events_path(consultation)
        headers = {"Content-Type": _JSON, "Idempotency-Key": checked_key(key)}
        request = _Request("POST", path, 202, headers, body=encoded(event), events=1)
        return _accepted(await self._call(request), 1)[0]

    async def post_batch(
        self,
        consultation: str | None,
        events: Iterable[EventBody] | AsyncIterable[EventBody],
        key: str | None = None,
        numbers: Iterable[int] | None = None,
    ) -> list[Accepted]:
        """Store *events* and return what was accepted, in their order.

        Up to 1,000 events and 8 MiB are one request: all of them are stored, or none. More are sent as
        :meth:`post_stream` describes.

        Args, Raises: as of :meth:`post_stream`.
        """
        return [accepted async for accepted in self.post_stream(consultation, events, key, numbers)]

    async def post_stream(
        self,
        consultation: str | None,
        events: Iterable[EventBody] | AsyncIterable[EventBody],
        key: str | None = None,
        numbers: Iterable[int] | None = None,
    ) -> AsyncGenerator[Accepted, None]:
        """Store any number of *events*, and yield each after it was accepted, in their order.

        The events are sent in requests of up to 1,000 events and 8 MiB, one after the other; memory holds one request.
        An event's key is its own top-level ``event_id``, else it is derived from *key* and the event's number:
        ``<key>:<number>`` up to 10,000. So after an error the same call with the same key stores nothing twice.

        Args:
            consultation: of all events; None if each event names its own as ``consultation_id``.
            events: an iterable or an asynchronous iterable.
            key: of the batch; by default a new UUIDv7.
            numbers: of the events, ascending, from 1; by default 1, 2, 3 …. A part of a batch with its numbers has the
                same keys as in the whole.

        Raises:
            InvalidArgumentError: an id, the key, an event or a number is malformed.
            RefusedError: ``problem.lines`` names the refused events by number.
            UnexpectedAnswerError: a retry would not help.
            GaveUpError: a request was not decided before its deadline.

        After any of them ``may_be_stored`` says whether some events may be stored, those of earlier requests included.
        """
        path = "events/batch" if consultation is None else f"{_events_path(consultation)}/batch"
        key, any_stored = checked_key(key), False
        try:
            async for batch in split_async(events, numbers):
                async for accepted in self._post_batch(path, key, batch):
                    any_stored = True
                    yield accepted
        except ClientError as error:
            error.may_be_stored |= any_stored
            raise

    async def _post_batch(self, path: str, key: str, batch: Batch) -> AsyncGenerator[Accepted, None]:
        """Send *batch*, in halves while the service finds it too large."""
        pending = [batch]
        while pending:
            batch = pending.pop()
            if batch.size > self._batch_bytes and len(batch.bodies) > 1:
                pending += reversed(batch.halves())
                continue
            headers = {"Content-Type": _NDJSON, "Idempotency-Key": batch.key(key)}
            request = _Request("POST", path, 202, headers, body=batch.lines(), events=len(batch.bodies))
            try:
                answer = await self._call(request)
            except ClientError as error:
                if error.status == 413 and len(batch.bodies) > 1:
                    self._batch_bytes = min(self._batch_bytes, batch.size // 2 + 1)
                    pending.append(batch)
                    continue
                error.problem = error.problem and batch.numbered(error.problem)
                raise
            for accepted in _accepted(answer, len(batch.bodies)):
                yield accepted

    async def event(
        self, consultation: str, message_id: UUID | str | None = None, *, key: str | None = None
    ) -> StoredEvent | None:
        """Return one event, in HDF5 or not yet; None if there is no such event.

        Args:
            consultation: id of the consultation.
            message_id: of the event.
            key: with which it was posted, instead of *message_id*.

        Raises:
            InvalidArgumentError: *consultation*, *message_id* or *key* is malformed, or both or neither is given.
            RefusedError, UnexpectedAnswerError, GaveUpError: as of :meth:`post`.
        """
        path = _events_path(consultation)
        if (message_id is None) == (key is None):
            raise InvalidArgumentError("an event is named by its message id or by its key")
        if message_id is None:
            found = [event async for event in self._read(consultation, path, {"key": checked_key(key)}, 0, "1")]
            return found[0] if found else None
        try:
            answer = await self._call(_Request("GET", f"{path}/{_uuid(message_id)}", 200, {"Accept": _JSON}))
        except RefusedError as refusal:
            if refusal.type == _UNKNOWN_EVENT:
                return None
            raise
        with _readable():
            return StoredEvent.of(consultation, parse_exactly(answer))

    def read(
        self,
        consultation: str,
        after: int = 0,
        *,
        page: int = 500,
        before: int | None = None,
        type: str | None = None,
        since: datetime | None = None,
    ) -> AsyncGenerator[StoredEvent, None]:
        """Yield the events of *consultation* in order, including those accepted a moment ago, and end.

        Args:
            consultation: id of the consultation.
            after: sequence after which to begin.
            page: events a request, at most 1,000.
            before: sequence before which to end.
            type: only events with this ``event_type``.
            since: only events that the service received at this time or later; with a time zone.

        Raises:
            InvalidArgumentError: *consultation*, *page*, *type* or *since* is malformed.
            RefusedError, UnexpectedAnswerError, GaveUpError: as of :meth:`post`.
        """
        query = _choice(type, since) | ({} if before is None else {"before": str(before)})
        return self._read(consultation, _events_path(consultation), query, after, _limit(page))

    async def _read(
        self, consultation: str, path: str, query: Mapping[str, str], after: int, limit: str
    ) -> AsyncGenerator[StoredEvent, None]:
        more = True
        while more:
            asked = {**query, "after": str(after), "limit": limit}
            answer = await self._call(_Request("GET", path, 200, {"Accept": _JSON}, asked))
            with _readable():
                found = parse_exactly(answer)
                events = [StoredEvent.of(consultation, record) for record in found["events"]]
                more = found["next"] is not None
                # a page of chosen events may be empty: only its link says how far it looked
                reached = int(URL(found["next"]).query["after"]) if more else after
            if more and not events and (reached <= after or not query):
                raise UnexpectedAnswerError("a page has no events, but is not the last one")
            for event in events:
                if event.sequence <= after:
                    raise UnexpectedAnswerError("the events of an answer are not in order")
                after = event.sequence
                yield event
            after = max(after, reached)

    def follow(
        self,
        consultation: str,
        after: int = 0,
        *,
        silence: float = 35.0,
        type: str | None = None,
        since: datetime | None = None,
    ) -> AsyncGenerator[StoredEvent, None]:
        """Yield the events of *consultation*, those stored and those to come, without an end.

        Every event is yielded once, in order, whatever connections break. Close the generator (``aclose``) to stop.

        Args:
            consultation: id of the consultation.
            after: sequence after which to begin.
            silence: seconds without a byte after which a connection is replaced. The service sends a comment every
                15 s.
            type: only events with this ``event_type``.
            since: only events that the service received at this time or later; with a time zone.

        Raises:
            InvalidArgumentError: *consultation*, *type* or *since* is malformed.
            RefusedError, UnexpectedAnswerError: a retry would not help.
            GaveUpError: no byte from the service before the deadline. Call again later, after the last event.
        """
        return self._follow(_events_path(consultation), consultation, _choice(type, since), after, silence)

    def follow_all(
        self,
        after: int | None = None,
        *,
        silence: float = 35.0,
        type: str | None = None,
        since: datetime | None = None,
    ) -> AsyncGenerator[StoredEvent, None]:
        """Yield the events of all consultations that the token is for, in the order of the log, without an end.

        The service does not say whether they are in HDF5 yet: ``persisted`` is False. An event that the log holds twice
        comes twice, with the same consultation and message id.

        Args:
            after: sequence after which to begin; None for new events only.
            silence, type, since: as of :meth:`follow`.

        Raises:
            RefusedError: also if the log no longer holds all events after *after* (``/problems/position-gone``), or has
                no order over all consultations (``/problems/no-feed``).
            InvalidArgumentError, UnexpectedAnswerError, GaveUpError: as of :meth:`follow`.
        """
        return self._follow("events", None, _choice(type, since), after, silence)

    async def _follow(
        self, path: str, consultation: str | None, query: Mapping[str, str], after: int | None, silence: float
    ) -> AsyncGenerator[StoredEvent, None]:
        backoff = _Backoff(self._retry)
        while True:
            headers = {"Accept": _EVENT_STREAM, "Cache-Control": "no-store"}
            position = {} if after is None else {"after": str(after)}
            if after:
                headers["Last-Event-ID"] = str(after)
            request = _Request("GET", path, 200, headers, {"follow": "1", **position, **query})
            # sock_connect and sock_read: the stream itself has no end to wait for
            timeout = ClientTimeout(total=None, sock_connect=backoff.attempt_timeout, sock_read=silence)
            failure = _Failure("the stream ended")
            try:
                async with self._sent(request, timeout) as response:
                    if response.status != request.expected:
                        failure = self._failure(request, response, await response.read(), may_be_stored=False)
                    elif response.content_type != _EVENT_STREAM:
                        raise UnexpectedAnswerError("the answer is not a stream of Server-Sent Events")
                    else:
                        parser = EventStreamParser()
                        async for piece in response.content.iter_any():
                            backoff.reset()
                            for data in parser.feed(piece):
                                with _readable():
                                    record = parse_exactly(data.encode())
                                    event = StoredEvent.of(consultation or record["consultation_id"], record)
                                if after is None or event.sequence > after:
                                    after = event.sequence
                                    yield event
                            with _readable():  # events that were not chosen move the position, too
                                after = max(after or 0, int(parser.last_id)) if parser.last_id else after
            except _NoAnswerError as error:
                failure = _Failure(str(error))
            await self._pause(backoff, failure, may_be_stored=False)

    # -- for operators: a token with the scope ops ---------------------------------------------------------------------

    async def consultations(
        self, prefix: str = "", *, after: str = "", order: Literal["name", "activity"] = "name", page: int = 100
    ) -> AsyncGenerator[ConsultationSummary, None]:
        """Yield the persisted consultations, and end.

        Args:
            prefix: only those whose ids begin with it.
            after: id after which to begin.
            order: ``name``: sorted by id; ``activity``: the newest events first, back to the newest 1,000 or so of each
                partition.
            page: consultations a request, at most 1,000.

        Raises:
            RefusedError, UnexpectedAnswerError, GaveUpError: as of :meth:`post`.
        """
        query: dict[str, str] | None = {"prefix": prefix, "after": after, "order": order, "limit": _limit(page)}
        while query is not None:
            found = await self._document(_Request("GET", "consultations", 200, {"Accept": _JSON}, query))
            with _readable():
                listed = [ConsultationSummary.of(one) for one in found["consultations"]]
                following = None if found["next"] is None else dict(URL(found["next"]).query)
            if following == query:
                raise UnexpectedAnswerError("a page leads to itself")
            query = following
            for one in listed:
                yield one

    async def pipeline(self) -> dict[str, Any]:
        """Return the state of the pipeline, as ``GET /pipeline`` shows it: nodes, partitions, backlog, conditions.

        Raises:
            RefusedError, UnexpectedAnswerError, GaveUpError: as of :meth:`post`.
        """
        return await self._document(_Request("GET", "pipeline", 200, {"Accept": _JSON}))

    async def dead_letters(self, after: int = 0, *, page: int = 100) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the dead letters after the sequence *after*, oldest first, without their bodies.

        Args:
            after: sequence of the dead letter after which to begin.
            page: letters a request, at most 1,000.

        Raises:
            RefusedError, UnexpectedAnswerError, GaveUpError: as of :meth:`post`.
        """
        more = True
        while more:
            query = {"after": str(after), "limit": _limit(page)}
            found = await self._document(_Request("GET", "dead-letters", 200, {"Accept": _JSON}, query))
            with _readable():
                letters, more = list(found["dead_letters"]), found["next"] is not None
                reached = int(letters[-1]["sequence"]) if letters else after
            if more and reached <= after:
                raise UnexpectedAnswerError("a page has no dead letters, but is not the last one")
            after = reached
            for letter in letters:
                yield letter

    async def dead_letter(self, sequence: int) -> dict[str, Any]:
        """Return one dead letter with its body; of a list of conflicts with their events. The service audits it.

        Raises:
            RefusedError: there is none (``/problems/unknown-dead-letter``), or as of :meth:`post`.
            UnexpectedAnswerError, GaveUpError: as of :meth:`post`.
        """
        return await self._document(_Request("GET", f"dead-letters/{int(sequence)}", 200, {"Accept": _JSON}))

    async def requeue(self, sequence: int, reason: str = "") -> dict[str, Any]:
        """Put the message of a dead letter back into the log under its id, and remove the letter; safe to repeat.

        Args:
            sequence: of the dead letter.
            reason: for the audit log.

        Raises:
            RefusedError: it cannot go back, or there is no such letter any more.
            UnexpectedAnswerError: as of :meth:`post`.
            GaveUpError: as of :meth:`post`; also when the log still remembers the message for longer than the deadline.
        """
        return await self._act(sequence, "requeue", {"reason": reason})

    async def drop(self, sequence: int, reason: str) -> dict[str, Any]:
        """Remove a dead letter for good.

        Args:
            sequence: of the dead letter.
            reason: for the audit log.

        Raises:
            RefusedError, UnexpectedAnswerError, GaveUpError: as of :meth:`requeue`.
        """
        return await self._act(sequence, "drop", {"reason": reason})

    async def _act(self, sequence: int, action: str, document: dict[str, str]) -> dict[str, Any]:
        headers = {"Accept": _JSON, "Content-Type": _JSON}
        path = f"dead-letters/{int(sequence)}/{action}"
        return await self._document(_Request("POST", path, 200, headers, body=orjson.dumps(document)))

    async def _document(self, request: _Request) -> dict[str, Any]:
        answer = await self._call(request)
        with _readable():
            return dict(parse_exactly(answer))

    # -- one request, until it is decided ------------------------------------------------------------------------------

    async def _call(self, request: _Request) -> bytes:
        """Return the body of the answer to *request*. Raises ClientError as :meth:`post`."""
        backoff = _Backoff(self._retry)
        may_be_stored = False
        while True:
            try:
                async with self._sent(request, ClientTimeout(total=backoff.attempt_timeout)) as response:
                    body = await response.read()
                if response.status == request.expected:
                    return body
                failure = self._failure(request, response, body, may_be_stored)
                may_be_stored |= failure.problem is not None and _may_be_stored(request, failure.problem)
            except _NoAnswerError as error:
                failure = _Failure(str(error))
                may_be_stored |= error.sent and request.events > 0
            await self._pause(backoff, failure, may_be_stored=may_be_stored)

    @asynccontextmanager
    async def _sent(self, request: _Request, timeout: ClientTimeout) -> AsyncIterator[ClientResponse]:
        """Send *request* once and yield the answer, whose body must be read inside.

        Raises _NoAnswerError: no answer, or an incomplete one; UnexpectedAnswerError: the certificate is not trusted.
        """
        sending: list[bool] = []
        try:
            async with self._open_session().request(
                request.method,
                self._url.joinpath(request.path, encoded=True),
                params=request.query,
                headers=request.headers,
                data=request.body,
                timeout=timeout,
                allow_redirects=False,  # token and event go to no other address
                trace_request_ctx=sending,
            ) as response:
                yield response
        except ClientConnectorCertificateError:
            raise UnexpectedAnswerError(
                f"the certificate of {self._url.origin()} is not trusted: pass the certificate of its authority "
                "(context= or --ca-file)"
            ) from None
        except (HttpError, TimeoutError, OSError) as error:
            raise _NoAnswerError(_reason(error), sent=bool(sending)) from None

    def _open_session(self) -> ClientSession:
        if self._closed:
            raise ClosedError("the client is closed")
        if self._session is None:
            trace = TraceConfig()
            trace.on_request_headers_sent.append(_note_sending)
            self._session = ClientSession(
                connector=TCPConnector(limit=self._connections, ssl=self._context or True),
                headers=self._headers,
                cookie_jar=DummyCookieJar(),
                trace_configs=[trace],
            )
        return self._session

    def _failure(self, request: _Request, response: ClientResponse, body: bytes, may_be_stored: bool) -> _Failure:
        """Return the failure of an answer after which *request* is to be sent again.

        Raises RefusedError, UnexpectedAnswerError: that would not help.
        """
        problem = Problem.of(response.status, response.content_type, body)
        if response.status in _RETRIED:
            return _Failure(str(problem), problem, _retry_after(response.headers))
        may_be_stored |= _may_be_stored(request, problem)
        if not problem.is_document:
            raise UnexpectedAnswerError(
                f"{self._url.origin()} answers {response.status} without a problem document, which fiq never does: "
                "is that its URL?",
                problem=problem,
                may_be_stored=may_be_stored,
            )
        raise RefusedError(f"refused: {problem}", problem=problem, may_be_stored=may_be_stored)

    async def _pause(self, backoff: _Backoff, failure: _Failure, *, may_be_stored: bool) -> None:
        """Wait before the next attempt. Raises GaveUpError: there is no time for one; ClosedError: it is closed."""
        pause = backoff.next(failure.retry_after)
        last = failure.reason if failure.problem else f"no answer from {self._url.origin()}: {failure.reason}"
        if pause is None:
            message = f"not done within {self._retry.deadline:g} s: {last}"
            raise GaveUpError(message, problem=failure.problem, may_be_stored=may_be_stored)
        if not self._closed:
            _log.info("%s; trying again in %.1f s", last, pause)
            self._retries += 1
            await asyncio.sleep(pause)
        if self._closed:
            raise ClosedError("the client was closed", problem=failure.problem, may_be_stored=may_be_stored)


# -- Arguments ---------------------------------------------------------------------------------------------------------


def service_url(url: str) -> URL:
    """Return *url*, parsed. Raises InvalidArgumentError: it is malformed."""
    try:
        parsed = URL(url)
        (parsed.raw_host or "").encode("idna")
    except ValueError:
        parsed = URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.user or parsed.query or parsed.fragment:
        raise InvalidArgumentError("the URL of the service is http://host:port or https://host:port")
    return parsed


def _authorization(token: str | None) -> dict[str, str]:
    if token is None:
        return {}
    token = token.strip()  # a file that holds one ends with a line feed
    if not token or not all("\x21" <= character <= "\x7e" for character in token):
        raise InvalidArgumentError("a token is one word of visible ASCII characters")
    return {"Authorization": f"Bearer {token}"}


def _events_path(consultation: object) -> str:
    if not isinstance(consultation, str):
        raise InvalidArgumentError(f"a consultation id is a string, not {type(consultation).__name__}")
    try:
        return f"consultations/{check_consultation_id(consultation)}/events"
    except InvalidIdError as error:
        raise InvalidArgumentError(str(error)) from None


def _choice(event_type: object, since: object) -> dict[str, str]:
    """Return the query that chooses events by type and time."""
    query = {}
    if event_type is not None:
        if not isinstance(event_type, str) or not event_type:
            raise InvalidArgumentError("an event type is a string that is not empty")
        query["type"] = event_type
    if since is not None:
        if not isinstance(since, datetime) or since.tzinfo is None:
            raise InvalidArgumentError("since is a datetime with a time zone")
        query["since"] = since.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return query


def _limit(page: object) -> str:
    """Return the size of a page as the service takes it."""
    if not isinstance(page, int) or not 1 <= page <= _MAX_PAGE:
        raise InvalidArgumentError(f"a page has 1 to {_MAX_PAGE:,} entries")
    return str(page)


def _uuid(message_id: UUID | str) -> UUID:
    try:
        return UUID(str(message_id))
    except ValueError:
        raise InvalidArgumentError("a message id is a UUID") from None


def checked_key(key: object) -> str:
    """Return *key*, or a new one if it is None. Raises InvalidArgumentError: it is malformed."""
    if key is None:
        return str(new_event_id())
    if not isinstance(key, str):
        raise InvalidArgumentError(f"an idempotency key is a string, not {type(key).__name__}")
    try:
        bare_key(key)
    except InvalidIdError as error:
        raise InvalidArgumentError(str(error)) from None
    return key


# -- Requests and answers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Request:
    """A request.

    Attributes:
        method: of HTTP.
        path: relative to the service's URL.
        expected: status of success.
        headers: without the token.
        query: parameters.
        body: bytes; None for no body.
        events: number of events that it would store.
    """

    method: str
    path: str
    expected: int
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = field(default=None, repr=False)
    events: int = 0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an attempt failed, and for how many seconds the service asks the client to wait."""

    reason: str
    problem: Problem | None = None
    retry_after: float = 0.0


class _NoAnswerError(Exception):
    """Raised when an attempt brought no answer; *sent*: the request may have arrived."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class _Backoff:
    """The pauses between the attempts of one request, and its deadline."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self.reset()

    def reset(self) -> None:
        """Begin again, after a success."""
        self._failures = 0
        self._end = time.monotonic() + self._policy.deadline

    @property
    def attempt_timeout(self) -> float:
        """Seconds that the next attempt may take."""
        return max(0.001, min(self._policy.attempt_timeout, self._end - time.monotonic()))

    def next(self, retry_after: float) -> float | None:
        """Return the pause before the next attempt, seconds; None if the deadline does not allow another attempt."""
        backoff = min(self._policy.max_backoff, self._policy.initial_backoff * 2.0 ** min(self._failures, 32))
        self._failures += 1
        pause = retry_after + backoff * random.uniform(0.5, 1.0)  # noqa: S311 - no secrets
        return pause if time.monotonic() + pause < self._end else None


async def _note_sending(_: ClientSession, context: SimpleNamespace, __: TraceRequestHeadersSentParams) -> None:
    """Note in the list that was passed with the request that it may arrive from now on."""
    context.trace_request_ctx.append(True)


def _reason(error: Exception) -> str:
    """Say why there is no answer, without quoting any part of one."""
    if isinstance(error, ClientConnectorDNSError):
        return "the host name cannot be resolved"
    if isinstance(error, ClientConnectorSSLError):
        return "the TLS handshake failed: does it speak https?"
    if isinstance(error, ClientConnectorError):
        return os.strerror(error.errno) if error.errno else "no connection"
    return "timeout" if isinstance(error, TimeoutError) else "the connection was lost"


def _may_be_stored(request: _Request, problem: Problem) -> bool:
    """Return whether some event of *request* may be stored although its answer was *problem*."""
    slug = problem.type.rpartition("/")[2]
    if not request.events:
        return False
    if slug == _PARTLY_STORED:
        return request.events > 1
    if problem.status in (409, 429):
        return problem.status == 409 or (request.events > 1 and slug != "rate-limited")
    if problem.status < 500:
        return problem.status < 400
    return request.events > 1 or slug not in _NOT_STORED


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds of ``Retry-After``; 0 if it is missing or malformed (RFC 9110, section 10.2.3)."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:  # "-0000": UTC without a time zone
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _accepted(answer: bytes, expected: int) -> list[Accepted]:
    try:
        found = orjson.loads(answer)
        results = [Accepted.of(result) for result in found.get("results", [found])]
    except (ValueError, TypeError, KeyError, AttributeError):
        results = []
    if len(results) != expected:
        raise UnexpectedAnswerError("a 202 does not say what was accepted", may_be_stored=True)
    return results


@contextmanager
def _readable() -> Iterator[None]:
    """Raise UnexpectedAnswerError when the block cannot read an answer."""
    try:
        yield
    except (ValueError, TypeError, KeyError):
        raise UnexpectedAnswerError("an answer cannot be read as events: is it the URL of fiq?") from None


class EventStreamParser:
    """Finds the messages in the pieces of a stream of Server-Sent Events; an incomplete message is dropped.

    Attributes:
        last_id: of the last complete message that had one, also of one without data; empty without any.
    """

    def __init__(self) -> None:
        self.last_id = ""
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._data: list[str] = []
        self._id = ""

    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the data of each message that *piece* completes."""
        for line in self._lines(self._decoder.decode(piece)):
            name, _, value = line.partition(":")  # a comment has no name
            if name == "data":
                self._data.append(value.removeprefix(" "))
            elif name == "id":
                self._id = value.removeprefix(" ")
            elif not line:
                self.last_id = self._id
                if self._data:
                    yield "\n".join(self._data)
                    self._data = []

    def _lines(self, text: str) -> list[str]:
        text = self._rest + text
        held = "\r" if text.endswith("\r") else ""  # its LF may come with the next piece
        *lines, rest = _END_OF_LINE.split(text.removesuffix(held) if held else text)
        self._rest = rest + held
        return lines
