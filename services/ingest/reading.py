"""GET: pages of events, one event, the consultations, and following a consultation as Server-Sent Events.

The log's reader joins corpus and log. A page holds its share of the process's reads until its client has read it.

A follower first reads by itself until it has caught up. From then on all followers of a consultation share what is new
(:class:`Channel`): one cheap question each interval, and one read when there is something. A follower that falls behind
what is kept of that reads by itself again. So no events are buffered for a client but the page that is being sent. A
client that does not read in time is cut off; it comes back with ``Last-Event-ID``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from uuid import UUID

import orjson
from aiohttp import web

from fiq.errors import FiqError, InvalidIdError, TransientError
from fiq.event import check_consultation_id
from services.core.logs import LogThrottle, get_logger
from services.core.tokens import Scope
from services.ingest import problems
from services.ingest.access import GRANT, audit, bodies_shown
from services.ingest.admission import IN_FLIGHT
from services.ingest.metrics import METRICS, IngestMetrics
from services.ingest.problems import REFUSALS, SERVER, ProblemType, RequestRefusedError
from services.ingest.server import WriteTimeout, send, set_write_timeout
from services.log.errors import CorpusAwayError, LogRefusedError, LogUnavailableError, TooManyInFlightError
from services.log.protocol import EventBrowser, SequencedEvent

JSON, NDJSON, EVENT_STREAM = "application/json", "application/x-ndjson", "text/event-stream"
#: most records of a page, and the default
MAX_LIMIT, DEFAULT_LIMIT = 1000, 100
#: reads that one process answers at a time; a page takes some 2 MiB at most
MAX_READS = 64
#: the problem, and its detail, for each error of a read
_READ_ERRORS: dict[type[FiqError], tuple[ProblemType, str | None]] = {
    CorpusAwayError: (problems.CORPUS_AWAY, None),
    LogUnavailableError: (problems.LOG_UNAVAILABLE, "The event log did not answer in time: read again."),
    LogRefusedError: (problems.LOG_REFUSED, "The event log cannot be read until an operator acts."),
    TooManyInFlightError: (problems.TOO_MANY_IN_FLIGHT, "This process has reached its limit of reads."),
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
#: a handler that enters the limit of reads into the stack, which is held until the answer has been sent
ReadHandler = Callable[[web.Request, ExitStack], Awaitable[web.StreamResponse]]

_log = get_logger("ingest.reading")


class ReadLimit:
    """Counts the reads from the question to the last byte of the answer."""

    def __init__(self) -> None:
        self._count = 0

    def enter(self, held: ExitStack) -> None:
        """Count a read until *held* is closed. Raises TooManyInFlightError: the limit is reached."""
        if self._count >= MAX_READS:
            raise TooManyInFlightError("too many reads")
        self._count += 1
        held.callback(self._leave)

    def _leave(self) -> None:
        self._count -= 1


READER = web.AppKey("reader", EventBrowser)
READ_LIMIT = web.AppKey("read_limit", ReadLimit)


# -- pages and events -------------------------------------------------------------------------------------------------


async def list_events(request: web.Request) -> web.StreamResponse:
    """Answer with a page of a consultation's events, or follow it."""
    return await (_handle(request, _follow) if _follow_parameter(request) else answer_read(request, _events))


async def get_event(request: web.Request) -> web.StreamResponse:
    """Answer with one event."""
    return await answer_read(request, _event)


async def list_consultations(request: web.Request) -> web.StreamResponse:
    """Answer with a page of the ids of persisted consultations."""
    return await answer_read(request, _consultations)


async def answer_read(request: web.Request, handler: ReadHandler) -> web.StreamResponse:
    """Answer with *handler*; a stop waits, and the limit of reads is held, until the client has read the answer."""
    app, started = request.app, time.perf_counter()
    with app[IN_FLIGHT], ExitStack() as held:
        response = await _handle(request, lambda request: handler(request, held))
        app[METRICS].read_duration.observe(time.perf_counter() - started)
        await send(response, request)
        return response


async def _handle(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer with *handler*, or with the problem that it raises."""
    refusals = request.app[REFUSALS]
    try:
        return await handler(request)
    except RequestRefusedError as refusal:
        return refusals.answer(refusal.problem, refusal.detail, headers=refusal.headers)
    except tuple(_READ_ERRORS) as error:
        problem, detail = next(found for kind, found in _READ_ERRORS.items() if isinstance(error, kind))
        if problem is problems.LOG_REFUSED:
            refusals.log_refused(str(error))
        elif problem is problems.CORPUS_AWAY:
            _log.warning("CORPUS_AWAY", reason=str(error))
        return refusals.answer(problem, detail)


async def _events(request: web.Request, held: ExitStack) -> web.StreamResponse:
    consultation = _consultation(request)
    after = _position(request.query.get("after", "0"), "after")
    _last_event_id(request)  # means nothing for a page, but is refused everywhere when it is malformed
    limit = _limit(request)
    media_type = negotiate(request, JSON, NDJSON)
    request.app[READ_LIMIT].enter(held)
    page = await request.app[READER].page(consultation, after, limit)
    following = f"/consultations/{consultation}/events?after={page.reached}&limit={limit}" if page.more else None
    records = [record(stored) for stored in page.events]
    body = _page(media_type, "events", records, following, consultation_id=consultation)
    bodies_shown(request, len(records), consultation_id=consultation)
    _log.info("EVENTS_READ", consultation_id=consultation, after=after, events=len(records), bytes=len(body))
    return response_of(request, body, media_type, following)


async def _event(request: web.Request, held: ExitStack) -> web.StreamResponse:
    consultation = _consultation(request)
    media_type = negotiate(request, JSON)
    try:
        event_id = UUID(request.match_info["message_id"])
    except ValueError:
        raise RequestRefusedError(problems.UNKNOWN_EVENT) from None
    request.app[READ_LIMIT].enter(held)
    stored = await request.app[READER].locate(consultation, event_id)
    if stored is None:
        raise RequestRefusedError(problems.UNKNOWN_EVENT)
    bodies_shown(request, 1, consultation_id=consultation)
    _log.info("EVENT_READ", consultation_id=consultation, message_id=str(event_id), sequence=stored.sequence)
    return response_of(request, record(stored, consultation=True), media_type)


async def _consultations(request: web.Request, held: ExitStack) -> web.StreamResponse:
    prefix, after = _id_parameter(request, "prefix"), _id_parameter(request, "after")
    limit = _limit(request)
    media_type = negotiate(request, JSON, NDJSON)
    request.app[READ_LIMIT].enter(held)
    names, more = await _allowed_consultations(request, prefix, after, limit)
    following = f"/consultations?prefix={prefix}&after={names[-1]}&limit={limit}" if more and names else None
    records = [orjson.dumps({"consultation_id": name}) for name in names]
    _log.info("CONSULTATIONS_READ", consultations=len(names))
    return response_of(request, _page(media_type, "consultations", records, following), media_type, following)


async def _allowed_consultations(request: web.Request, prefix: str, after: str, limit: int) -> tuple[list[str], bool]:
    """Return the consultations with *prefix* that the token is for, and whether there are more."""
    own = request[GRANT].prefix
    if own.startswith(prefix):
        prefix = own
    elif not prefix.startswith(own):
        return [], False
    return await request.app[READER].consultations(prefix, after, limit)


def response_of(request: web.Request, body: bytes, media_type: str, following: str | None = None) -> web.Response:
    headers = {"Content-Type": media_type, "Server": SERVER, "Cache-Control": "no-store"}
    if following is not None:
        headers["Link"] = f'<{following}>; rel="next"'
    request.app[METRICS].requests.labels("200", "").inc()
    return web.Response(body=body, headers=headers)


# -- parameters -------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)
_ID_PART = re.compile(r"[A-Za-z0-9_-]{0,128}", re.ASCII)
#: largest position in log and corpus
_MAX_POSITION = 2**63 - 1


def _invalid(detail: str) -> RequestRefusedError:
    return RequestRefusedError(problems.INVALID_PARAMETER, detail)


def _consultation(request: web.Request) -> str:
    try:
        return check_consultation_id(request.match_info["consultation"])
    except InvalidIdError:
        raise RequestRefusedError(problems.INVALID_CONSULTATION_ID) from None


def _position(text: str, name: str) -> int:
    if _NUMBER.fullmatch(text) is None or int(text) > _MAX_POSITION:
        raise _invalid(f"{name} must be a whole number from 0 on.")
    return int(text)


def _last_event_id(request: web.Request) -> int | None:
    """Return the last position that a follower has seen; None if it has seen nothing."""
    value = request.headers.get("Last-Event-ID")
    return None if value is None else _position(value, "Last-Event-ID")


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", str(DEFAULT_LIMIT))
    if _NUMBER.fullmatch(text) is None or not 1 <= int(text) <= MAX_LIMIT:
        raise _invalid(f"limit must be 1 to {MAX_LIMIT}.")
    return int(text)


def _follow_parameter(request: web.Request) -> bool:
    text = request.query.get("follow", "0")
    if text not in {"0", "1"}:
        raise _invalid("follow must be 0 or 1.")
    return text == "1"


def _id_parameter(request: web.Request, name: str) -> str:
    """Return a consultation id or the beginning of one; empty when the parameter is absent."""
    text = request.query.get(name, "")
    if _ID_PART.fullmatch(text) is None:
        raise _invalid(f"{name} must be at most 128 characters of A-Z a-z 0-9 _ -.")
    return text


def negotiate(request: web.Request, *offered: str) -> str:
    """Return the one of the *offered* media types that ``Accept`` prefers; the first of equals."""
    header = ",".join(request.headers.getall("Accept", ()))
    if not header.strip():
        return offered[0]
    weights = [_weight(header, media_type) for media_type in offered]
    best = max(weights)
    if best <= 0:
        raise RequestRefusedError(problems.NOT_ACCEPTABLE)
    return offered[weights.index(best)]


def _weight(header: str, media_type: str) -> float:
    """Return the weight in *header* of the most specific range that matches *media_type*."""
    ranges = {"*/*": 0, f"{media_type.partition('/')[0]}/*": 1, media_type: 2}
    found = (-1, 0.0)
    for part in header.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if name in ranges:
            found = max(found, (ranges[name], _quality(parameters)))
    return found[1]


def _quality(parameters: Sequence[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            match = re.fullmatch(r"[01](?:\.[0-9]{0,3})?", value.strip(), re.ASCII)
            return min(1.0, float(match[0])) if match else 0.0
    return 1.0


# -- records ----------------------------------------------------------------------------------------------------------


def record(stored: SequencedEvent, *, consultation: bool = False) -> bytes:
    """Return an event as a JSON object in one line, its body byte for byte; with its *consultation*'s id if wanted."""
    event = stored.event
    seconds, nanoseconds = divmod(event.received_ns, 10**9)
    received = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"
    status = "persisted" if stored.persisted else "queued"
    owner = f'"consultation_id":"{event.consultation}",' if consultation else ""
    head = (
        f'{{{owner}"sequence":{stored.sequence},"message_id":"{event.event_id}",'
        f'"received":"{received}","status":"{status}","event":'
    )
    return b"".join([head.encode(), event.body, b"}"])


def _page(media_type: str, name: str, records: Sequence[bytes], following: str | None, **members: str) -> bytes:
    """Return a page of *records*.

    Args:
        media_type: JSON or NDJSON.
        name: of the member that holds them, in JSON.
        records: JSON texts.
        following: URL of the next page, or None.
        members: further members, in JSON.
    """
    if media_type == NDJSON:
        return b"".join(line + b"\n" for line in records)
    head = b"".join(orjson.dumps(key) + b":" + orjson.dumps(value) + b"," for key, value in members.items())
    return b'{%b"%b":[%b],"next":%b}' % (head, name.encode(), b",".join(records), orjson.dumps(following))


# -- following --------------------------------------------------------------------------------------------------------

#: a client that has not read what was sent after this is cut off, seconds
SLOW_SECONDS = 10.0
#: a comment is sent after this silence, because proxies close silent connections, seconds
KEEP_ALIVE_SECONDS = 15.0
#: between two looks whether the client is still there while there is nothing to send, seconds
GONE_SECONDS = 0.5
#: a consultation is read although the log shows nothing new: what is trimmed at once is in the corpus only, seconds
READ_ANYWAY_SECONDS = 10.0
#: pause after a failed read, seconds
PAUSE_SECONDS = 1.0
#: events of a page; events and bytes that are kept of each consultation
_PAGE_EVENTS, _KEPT_EVENTS, _KEPT_BYTES = 100, 256, 1 << 20
#: for clients to read their last bytes at the end of the process, seconds
_CLOSE_SECONDS = 1.0
#: events that were sent to a follower
_SENT = web.ResponseKey("sent", int)


async def _follow(request: web.Request) -> web.StreamResponse:
    consultation = _consultation(request)
    resumed = _last_event_id(request)
    after = _position(request.query.get("after", "0"), "after") if resumed is None else resumed
    negotiate(request, EVENT_STREAM)
    return await request.app[FOLLOWERS].serve(request, consultation, after)


class Channel:
    """The new events of one consultation, for all of its followers.

    Args:
        reader: of the log.
        consultation: its id.
        position: after which events are new.
        interval: pause between two questions, seconds.
    """

    def __init__(self, reader: EventBrowser, consultation: str, position: int, interval: float) -> None:
        self.followers = 0
        self._reader = reader
        self._consultation = consultation
        self._interval = interval
        self._throttle = LogThrottle.of_repeated()
        #: all events after ``_base`` up to ``_head``
        self._kept: deque[SequencedEvent] = deque()
        self._base = self._head = position
        self._size = 0
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name="follow")

    def after(self, position: int) -> list[SequencedEvent] | None:
        """Return the events after *position*; None if not all of them are kept."""
        if position < self._base:
            return None
        return [stored for stored in self._kept if stored.sequence > position][:_PAGE_EVENTS]

    async def wait(self, seconds: float) -> None:
        """Wait for new events, at most *seconds*."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await changed.wait()

    def wake(self) -> None:
        """End all waits."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Stop reading."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        read_at = time.monotonic()
        while True:
            await asyncio.sleep(self._interval)
            try:
                overdue = time.monotonic() - read_at > READ_ANYWAY_SECONDS
                if overdue or await self._reader.has_news(self._consultation, self._head):
                    await self._read()
                    read_at = time.monotonic()
                self._throttle.reset()
                continue
            except (TransientError, LogRefusedError) as error:  # an election or a hand-over; nothing is skipped
                write, event, values = _log.warning, "FOLLOWING_DELAYED", {"reason": str(error)}
            except Exception as error:  # noqa: BLE001 - a bug here must not make followers wait for ever
                write, event, values = _log.error, "FOLLOWING_FAILED", {"error": type(error).__name__}
            allowed = self._throttle.allow(str(values))
            if allowed is not None:
                write(event, **values, **allowed)
            await asyncio.sleep(PAUSE_SECONDS)

    async def _read(self) -> None:
        more = True
        while more:
            page = await self._reader.page(self._consultation, self._head, _PAGE_EVENTS)
            self._head, more = page.reached, page.more
            self._kept.extend(page.events)
            self._size += sum(len(stored.event.body) for stored in page.events)
            while len(self._kept) > _KEPT_EVENTS or (self._size > _KEPT_BYTES and len(self._kept) > 1):
                oldest = self._kept.popleft()
                self._base = oldest.sequence
                self._size -= len(oldest.event.body)
            if page.events:
                self.wake()


class Followers:
    """The followers of one process.

    Args:
        reader: of the log.
        metrics: of the process.
        limit: most followers.
        interval: pause between two questions about a consultation, seconds.
        slow: a client that has not read what was sent after this is cut off, seconds.
    """

    def __init__(
        self, reader: EventBrowser, metrics: IngestMetrics, *, limit: int, interval: float, slow: float = SLOW_SECONDS
    ) -> None:
        self._reader = reader
        self._metrics = metrics
        self._limit = limit
        self._interval = interval
        self._slow = slow
        self._channels: dict[str, Channel] = {}
        self._present = 0
        self._closing = asyncio.Event()
        self._gone = asyncio.Event()
        metrics.followers.set_function(lambda: self._present)

    async def serve(self, request: web.Request, consultation: str, after: int) -> web.StreamResponse:
        """Send the events of *consultation* after *after* to the client of *request* until it goes.

        Raises RequestRefusedError: the limit of followers is reached; FiqError: the first page cannot be read.
        """
        if self._present >= self._limit or self._closing.is_set():
            raise RequestRefusedError(problems.TOO_MANY_FOLLOWERS)
        self._present += 1
        try:
            page = await self._reader.page(consultation, after, _PAGE_EVENTS)
            response = web.StreamResponse(
                headers={
                    "Content-Type": EVENT_STREAM,
                    "Cache-Control": "no-store",
                    "Server": SERVER,
                    "X-Accel-Buffering": "no",
                }
            )
            self._metrics.requests.labels("200", "").inc()
            set_write_timeout(request, WriteTimeout(self._slow, self._metrics.followers_dropped))
            await response.prepare(request)
            if request.method != "HEAD":
                _log.info("FOLLOW_STARTED", consultation_id=consultation, after=after)
                with contextlib.suppress(ConnectionError), _audited(request, response, consultation_id=consultation):
                    await response.write(b"retry: 2000\n\n")
                    position = await self._send(response, page.events, page.reached)
                    if page.more:
                        position = await self._catch_up(request, response, consultation, position)
                    await self._follow(request, response, consultation, position)
            return response
        finally:
            self._present -= 1
            if not self._present:
                self._gone.set()

    async def close(self) -> None:
        """End all streams, and wait a moment for that. Their clients connect to another process."""
        self._closing.set()
        for channel in self._channels.values():
            channel.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                while self._present:
                    self._gone.clear()
                    await self._gone.wait()

    async def _follow(
        self, request: web.Request, response: web.StreamResponse, consultation: str, position: int
    ) -> None:
        channel = self._channels.get(consultation)
        if channel is None:
            channel = self._channels[consultation] = Channel(self._reader, consultation, position, self._interval)
        channel.followers += 1
        sent_at = time.monotonic()
        try:
            while self._may_continue(request, consultation):
                events = channel.after(position)
                if events:
                    position = await self._send(response, events, events[-1].sequence)
                    sent_at = time.monotonic()
                    continue
                before = position
                if events is None:
                    position = await self._catch_up(request, response, consultation, position)
                if position > before:
                    sent_at = time.monotonic()
                    continue
                # events is None: the channel was started by a client with a position after the newest event
                await channel.wait(self._interval if events is None else min(GONE_SECONDS, KEEP_ALIVE_SECONDS))
                _check_connected(request)
                if time.monotonic() - sent_at >= KEEP_ALIVE_SECONDS:
                    await response.write(b": nothing new\n\n")
                    sent_at = time.monotonic()
        finally:
            channel.followers -= 1
            if not channel.followers:
                del self._channels[consultation]
                await channel.close()

    def _may_continue(self, request: web.Request, consultation: str) -> bool:
        """Return whether the client may get more: its token can be revoked or expire meanwhile."""
        return not self._closing.is_set() and request[GRANT].may(Scope.READ, consultation)

    async def _catch_up(
        self, request: web.Request, response: web.StreamResponse, consultation: str, position: int
    ) -> int:
        """Send all that there is after *position*; return the position that is reached."""
        while self._may_continue(request, consultation):
            try:
                page = await self._reader.page(consultation, position, _PAGE_EVENTS)
            except (TransientError, LogRefusedError):
                await response.write(b": waiting\n\n")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE_SECONDS):
                        await self._closing.wait()
                continue
            position = await self._send(response, page.events, page.reached)
            if not page.more:
                break
        return position

    async def _send(self, response: web.StreamResponse, events: list[SequencedEvent], reached: int) -> int:
        for stored in events:
            response[_SENT] = response.get(_SENT, 0) + 1
            await response.write(b"id: %d\ndata: %b\n\n" % (stored.sequence, record(stored)))
        self._metrics.followed_events.inc(len(events))
        return reached


@contextlib.contextmanager
def _audited(request: web.Request, response: web.StreamResponse, **values: object) -> Iterator[None]:
    """Write a line of the audit log when a follower begins, and one with the number of events when it ends."""
    audit("BODIES_SHOWN", request, follow="started", events=0, **values)
    try:
        yield
    finally:
        audit("BODIES_SHOWN", request, follow="ended", events=response.get(_SENT, 0), **values)


def _check_connected(request: web.Request) -> None:
    """Raise ConnectionResetError if the client has gone: aiohttp does not tell the handler."""
    if request.transport is None or request.transport.is_closing():
        raise ConnectionResetError("the client has gone")


FOLLOWERS = web.AppKey("followers", Followers)
