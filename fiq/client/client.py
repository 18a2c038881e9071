"""The client: one object for a service, one method for each thing that it does."""

from __future__ import annotations

import codecs
import re
import ssl
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import orjson
from aiohttp import ClientTimeout

from fiq.client.errors import RefusedError, UnexpectedAnswerError
from fiq.client.exchange import Exchange, LostError, Request, RetryPolicy, Tries, retry_after
from fiq.client.records import Accepted, Problem, StoredEvent
from fiq.event import check_consultation_id, event_id_from_key, new_event_id

_END_OF_LINE = re.compile("\r\n|\n|\r")
_MEDIA_TYPE = "text/event-stream"
#: an event as a program has it, or its JSON text, which is stored byte for byte
EventBody = Mapping[str, Any] | bytes

_JSON = "application/json"
_NDJSON = "application/x-ndjson"
_UNKNOWN_EVENT = "/problems/unknown-event"
_LINE_BREAKS = bytes.maketrans(b"\r\n", b"  ")


class AsyncClient:
    """Posts, reads and follows the events of one service; an async context manager.

    Any number of tasks may use it. Each call goes on until it is decided: after a lost connection, a timeout and what
    the service asks to retry, the same request is sent again under the same key, so that no try stores a second event.
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
        """Prepare; nothing is sent yet.

        Args:
            url: of the service, ``http://host:port`` or ``https://host:port``.
            token: of `fiq token`; None where the service asks for none.
            retry: how long each call is tried, and how often.
            connections: most of them at a time.
            context: for ``https``; None trusts the machine's authorities.

        Raises:
            ConfigurationError: *url* or *token* is malformed.
        """
        self._exchange = Exchange(url, token, retry or RetryPolicy(), connections=connections)
        self._context = context

    async def __aenter__(self) -> Self:
        self._exchange.open(self._context)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._exchange.close()

    @property
    def retries(self) -> int:
        """Tries that were made again, so far."""
        return self._exchange.retries

    async def post(self, consultation: str, event: EventBody, key: str | None = None) -> Accepted:
        """Store *event* and return where it stands.

        Args:
            consultation: whose event it is.
            event: with an ``event_type``.
            key: names the event, so that a later call with it is a retry; a UUIDv7 is made where there is none.

        Raises:
            InvalidIdError: *consultation* or *key* is malformed.
            RefusedError, UnexpectedAnswerError: a retry is of no use.
            GaveUpError: not decided before the deadline.
        """
        key = _key(key)
        headers = {"Content-Type": _JSON, "Idempotency-Key": key}
        path = _events(consultation)
        answer = await self._exchange.call(Request("POST", path, 202, headers, body=_json(event), events=1))
        return _results(answer, 1)[0]

    async def post_batch(
        self,
        consultation: str | None,
        events: Sequence[EventBody],
        key: str | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Accepted]:
        """Store *events*, all or none of them, and return where each stands.

        An event's key is its own top-level ``event_id``, else ``<key>:<number>``.

        Args:
            consultation: of all; None when each event names its own by ``consultation_id``.
            events: at most 1,000.
            key: of the batch; a UUIDv7 is made where there is none.
            numbers: of the events, ascending, from 1: 1, 2, 3 … by default. So a part of a batch has the keys of the
                whole.

        Raises:
            InvalidIdError: *consultation* or *key* is malformed.
            RefusedError: ``problem.lines`` tells which lines are to blame, by number.
            UnexpectedAnswerError: a retry is of no use.
            GaveUpError: not decided before the deadline.
        """
        if not events:
            return []
        headers = {"Content-Type": _NDJSON, "Idempotency-Key": _key(key)}
        path = "events/batch" if consultation is None else f"{_events(consultation)}/batch"
        body = _lines(events, numbers or range(1, len(events) + 1))
        answer = await self._exchange.call(Request("POST", path, 202, headers, body=body, events=len(events)))
        return _results(answer, len(events))

    async def event(self, consultation: str, message_id: UUID | str) -> StoredEvent | None:
        """Return one event, on its way to HDF5 or there; None when there is none.

        Raises:
            InvalidIdError: *consultation* is malformed.
            ValueError: *message_id* is no UUID.
            RefusedError, UnexpectedAnswerError, GaveUpError: as of :meth:`post`.
        """
        path = f"{_events(consultation)}/{UUID(str(message_id))}"
        try:
            answer = await self._exchange.call(Request("GET", path, 200, {"Accept": _JSON}))
        except RefusedError as refusal:
            if refusal.type == _UNKNOWN_EVENT:
                return None
            raise
        with _readable():
            return StoredEvent.of(consultation, orjson.loads(answer))

    async def read(self, consultation: str, after: int = 0, *, page: int = 500) -> AsyncGenerator[StoredEvent, None]:
        """Yield the events of *consultation* in order, also those accepted a moment ago, and end.

        Args:
            consultation: whose events.
            after: the sequence behind which to begin.
            page: events of one request, at most 1,000.

        Raises:
            InvalidIdError: *consultation* is malformed.
            RefusedError, UnexpectedAnswerError, GaveUpError: as of :meth:`post`.
        """
        path = _events(consultation)
        more = True
        while more:
            query = {"after": str(after), "limit": str(page)}
            answer = await self._exchange.call(Request("GET", path, 200, {"Accept": _JSON}, query))
            with _readable():
                found = orjson.loads(answer)
                events = [StoredEvent.of(consultation, record) for record in found["events"]]
                more = found["next"] is not None
            if more and not events:
                raise UnexpectedAnswerError("a page without events is not the last one")
            for event in events:
                if event.sequence <= after:
                    raise UnexpectedAnswerError("the events of an answer are not in order")
                after = event.sequence
                yield event

    def follow(self, consultation: str, after: int = 0, *, silence: float = 35.0) -> AsyncGenerator[StoredEvent, None]:
        """Yield the events of *consultation*, those that are there and those to come, for ever.

        None is skipped, none comes twice, whatever breaks in between. Whoever has enough closes it (``aclose``).

        Args:
            consultation: whose events.
            after: the sequence behind which to begin.
            silence: seconds without a word after which a connection is replaced.

        Raises:
            InvalidIdError: *consultation* is malformed.
            RefusedError, UnexpectedAnswerError: going on is of no use.
            GaveUpError: no word from the service before the deadline; go on later behind the last event.
        """
        return follow(self._exchange, consultation, _events(consultation), after, silence=silence)


def _events(consultation: str) -> str:
    return f"consultations/{check_consultation_id(consultation)}/events"


def _key(key: str | None) -> str:
    if key is None:
        return str(new_event_id())
    event_id_from_key(key)  # refuses what is none
    return key


def _json(event: EventBody) -> bytes:
    return event if isinstance(event, bytes) else orjson.dumps(event)


def _lines(events: Sequence[EventBody], numbers: Sequence[int]) -> bytes:
    lines: list[bytes] = []
    for event, number in zip(events, numbers, strict=True):
        if number <= len(lines):
            raise ValueError("the numbers of events ascend, from 1")
        lines += [b""] * (number - 1 - len(lines))  # an empty line is no event, but counts
        lines.append(_json(event).translate(_LINE_BREAKS))
    return b"\n".join(lines)


def _results(answer: bytes, expected: int) -> list[Accepted]:
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
    """Take what cannot be read inside for what it is: no answer of this service."""
    try:
        yield
    except (ValueError, TypeError, KeyError):
        raise UnexpectedAnswerError("an answer cannot be read as events: is it the URL of fiq?") from None


# -- A consultation's events as they come, over any number of connections --------------------------------------------


class MessageReader:
    """Makes messages out of the pieces of one answer. One that is cut off is none."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the data of each message that *piece* completes."""
        for line in self._lines(self._decoder.decode(piece)):
            if line:
                self._field(line)
                continue
            if self._data:
                yield "\n".join(self._data)
                self._data = []

    def _lines(self, text: str) -> list[str]:
        text = self._rest + text
        held = "\r" if text.endswith("\r") else ""  # its LF may be still to come
        *lines, rest = _END_OF_LINE.split(text.removesuffix(held) if held else text)
        self._rest = rest + held
        return lines

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")  # a comment has no name; those besides data say nothing that data does not
        if name == "data":
            self._data.append(value.removeprefix(" "))


async def follow(
    exchange: Exchange, consultation: str, path: str, after: int, *, silence: float
) -> AsyncGenerator[StoredEvent, None]:
    """Yield each event behind the position *after* once, in order, for ever.

    A connection that breaks, ends or falls silent is followed by another one that goes on behind the last event.

    Args:
        exchange: the connections.
        consultation: whose events.
        path: of them.
        after: a sequence; 0 for all.
        silence: seconds after which a connection without a word, be it a comment, is given up.

    Raises:
        RefusedError, UnexpectedAnswerError: going on is of no use.
        GaveUpError: the deadline has passed without a word.
    """
    tries = Tries(exchange.retry)
    while True:
        problem: Problem | None = None
        least, why = 0.0, "the stream ended"
        # sock_connect and sock_read: a stream has no end by which it could be late
        timeout = ClientTimeout(total=None, sock_connect=tries.timeout, sock_read=silence)
        request = _request(path, after)
        try:
            async with exchange.sent(request, timeout) as response:
                if response.status != request.expected:
                    body = await response.read()
                    problem = exchange.judged(request, response, body, may_be_stored=False)
                    least = retry_after(response.headers)
                elif response.content_type != _MEDIA_TYPE:
                    raise UnexpectedAnswerError("the answer is no stream of Server-Sent Events")
                else:
                    reader = MessageReader()
                    async for piece in response.content.iter_any():
                        tries.renew()
                        for data in reader.feed(piece):
                            event = _event(consultation, data)
                            if event.sequence > after:
                                after = event.sequence
                                yield event
        except LostError as lost:
            why = str(lost)  # go on with another connection
        await exchange.wait(tries, problem, least, why)


def _request(path: str, after: int) -> Request:
    headers = {"Accept": _MEDIA_TYPE, "Cache-Control": "no-store"}
    if after:
        headers["Last-Event-ID"] = str(after)
    return Request("GET", path, 200, headers, {"follow": "1", "after": str(after)})


def _event(consultation: str, data: str) -> StoredEvent:
    try:
        return StoredEvent.of(consultation, orjson.loads(data))
    except (ValueError, TypeError, KeyError):
        raise UnexpectedAnswerError("a message of the stream is no event") from None
