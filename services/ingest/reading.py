"""GET: pages of events, one event, the consultations, and what a client follows (:mod:`services.ingest.following`).

The log's reader joins corpus and log. A page holds its share of the process's reads until its client has read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from urllib.parse import urlencode
from uuid import UUID

import orjson
from aiohttp import web

from fiq.errors import FiqError, InvalidIdError
from fiq.event import check_consultation_id, event_id_from_key
from services.core.logs import get_logger
from services.core.tokens import Scope
from services.ingest import problems
from services.ingest.access import GRANT, bodies_shown
from services.ingest.admission import IN_FLIGHT
from services.ingest.following import FOLLOWERS, Source
from services.ingest.metrics import METRICS
from services.ingest.problems import REFUSALS, SERVER, ProblemType, RequestRefusedError
from services.ingest.records import (
    CLOUDEVENT,
    CLOUDEVENT_BATCH,
    EVENT_STREAM,
    JSON,
    NDJSON,
    cloudevent,
    document_of,
    page_body,
    record,
    summary_record,
)
from services.ingest.server import send
from services.log.errors import (
    CorpusAwayError,
    LogRefusedError,
    LogUnavailableError,
    PositionGoneError,
    TooManyInFlightError,
)
from services.log.listing import NEWEST
from services.log.protocol import PAGE_BYTES, EventBrowser, Feed, Page, SequencedEvent
from services.log.questions import StoredConsultation

#: most records of a page, and the default
MAX_LIMIT, DEFAULT_LIMIT = 1000, 100
#: what is looked at for a page of events that are filtered, about: events, and bytes of their bodies
LOOKED_EVENTS, LOOKED_BYTES = 10_000, 8 << 20
#: verifications among them
MAX_VERIFICATIONS = 2
#: how long the log may take to say when it stored an event, seconds
WAY_SECONDS = 0.5
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
    """Counts the reads, at most *most*, from the question to the last byte of the answer."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0

    def enter(self, held: ExitStack) -> None:
        """Count a read until *held* is closed. Raises TooManyInFlightError: the limit is reached."""
        if self._count >= self._most:
            raise TooManyInFlightError("too many reads")
        self._count += 1
        held.callback(self._leave)

    def _leave(self) -> None:
        self._count -= 1


READER = web.AppKey("reader", EventBrowser)
FEED: web.AppKey[Feed | None] = web.AppKey("feed")
READ_LIMIT = web.AppKey("read_limit", ReadLimit)
VERIFY_LIMIT = web.AppKey("verify_limit", ReadLimit)


# -- pages and events -------------------------------------------------------------------------------------------------


async def list_events(request: web.Request) -> web.StreamResponse:
    """Answer with a page of a consultation's events, or follow it."""
    return await (_handle(request, _follow) if _flag(request, "follow", "0") else answer_read(request, _events))


async def get_event(request: web.Request) -> web.StreamResponse:
    """Answer with one event."""
    return await answer_read(request, _event)


async def list_conflicts(request: web.Request) -> web.StreamResponse:
    """Answer with a page of the events that a consultation got under used keys."""
    return await answer_read(request, _conflicts)


async def get_verification(request: web.Request) -> web.StreamResponse:
    """Answer with what the owner of a consultation finds when it verifies it now."""
    return await answer_read(request, _verification)


async def list_consultations(request: web.Request) -> web.StreamResponse:
    """Answer with a page of persisted consultations."""
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
    except PositionGoneError as error:
        return refusals.answer(problems.POSITION_GONE, str(error))
    except tuple(_READ_ERRORS) as error:
        problem, detail = next(found for kind, found in _READ_ERRORS.items() if isinstance(error, kind))
        if problem is problems.LOG_REFUSED:
            refusals.log_refused(str(error))
        elif problem is problems.CORPUS_AWAY:
            _log.warning("CORPUS_AWAY", reason=str(error))
        return refusals.answer(problem, detail)


async def _events(request: web.Request, held: ExitStack) -> web.StreamResponse:
    consultation = _consultation(request)
    wanted = _wanted(request)
    _last_event_id(request)  # means nothing for a page, but is refused everywhere when it is malformed
    media_type = negotiate(request, JSON, NDJSON, CLOUDEVENT_BATCH)
    wanted = replace(wanted, cloudevents=media_type == CLOUDEVENT_BATCH)
    request.app[READ_LIMIT].enter(held)
    page = await _select(request.app[READER], consultation, wanted)
    link = None
    if page.more:
        reached = {"before" if wanted.backward else "after": page.reached}
        link = _link(request, f"/consultations/{consultation}/events", limit=wanted.limit, **reached)
    if wanted.backward:
        page.records.reverse()
    name, relation = ("previous", "prev") if wanted.backward else ("next", "next")
    body = page_body(media_type, "events", page.records, {name: link}, consultation_id=consultation)
    if wanted.bodies:
        bodies_shown(request, len(page.records), consultation_id=consultation)
    _log.info("EVENTS_READ", consultation_id=consultation, events=len(page.records), bytes=len(body))
    return response_of(request, body, media_type, link, relation=relation)


async def _event(request: web.Request, held: ExitStack) -> web.StreamResponse:
    consultation = _consultation(request)
    media_type = negotiate(request, JSON, CLOUDEVENT)
    try:
        event_id = UUID(request.match_info["message_id"])
    except ValueError:
        raise RequestRefusedError(problems.UNKNOWN_EVENT) from None
    bodies = _flag(request, "bodies", "1")
    request.app[READ_LIMIT].enter(held)
    stored = await request.app[READER].locate(consultation, event_id)
    if stored is None:
        raise RequestRefusedError(problems.UNKNOWN_EVENT)
    if bodies:
        bodies_shown(request, 1, consultation_id=consultation)
    _log.info("EVENT_READ", consultation_id=consultation, message_id=str(event_id), sequence=stored.sequence)
    if media_type == CLOUDEVENT:
        return response_of(request, cloudevent(stored, bodies=bodies), media_type)
    shown = record(stored, bodies=bodies, consultation=True)
    return response_of(request, b"%b,%b" % (shown[:-1], orjson.dumps(await _way(request, stored))[1:]), media_type)


async def _way(request: web.Request, shown: SequencedEvent) -> dict[str, str | None]:
    """Return when the log stored an event, and its trace, while the log has it and answers soon."""
    found = None
    with contextlib.suppress(TimeoutError, LogUnavailableError, LogRefusedError):
        async with asyncio.timeout(WAY_SECONDS):
            found = await request.app[READER].at(shown.sequence)
    if found is None or found.event.message_id != shown.event.message_id:
        return {"stored": None, "trace_id": None}
    trace = found.event.trace
    return {"stored": found.stored or None, "trace_id": None if trace is None else trace.trace_id}


async def _consultations(request: web.Request, held: ExitStack) -> web.StreamResponse:
    prefix, limit, order = _id_parameter(request, "prefix"), limit_of(request), request.query.get("order", "name")
    if order not in {"name", "activity"}:
        raise _invalid("order must be name or activity.")
    place, after = _place_parameter(request)
    media_type = negotiate(request, JSON, NDJSON)
    request.app[READ_LIMIT].enter(held)
    if order == "name":
        found, position = await _by_name(request, prefix, after, limit)
    else:
        found, position = await _by_activity(request, prefix, after, place, limit)
    following = None
    if position is not None:
        ordered = "" if order == "name" else "&order=activity"
        following = f"/consultations?prefix={prefix}&after={position}&limit={limit}{ordered}"
    records = [summary_record(one) for one in found]
    _log.info("CONSULTATIONS_READ", consultations=len(found))
    body = page_body(media_type, "consultations", records, {"next": following})
    return response_of(request, body, media_type, following)


async def _conflicts(request: web.Request, held: ExitStack) -> web.StreamResponse:
    consultation = _consultation(request)
    after, limit = position_of(request.query.get("after", "0"), "after"), limit_of(request)
    bodies = _flag(request, "bodies", "1")
    media_type = negotiate(request, JSON, NDJSON)
    request.app[READ_LIMIT].enter(held)
    page = await request.app[READER].conflicts(consultation, after, limit)
    records = [record(stored, bodies=bodies, status=False) for stored in page.events]
    following = _link(request, f"/consultations/{consultation}/conflicts", after=page.reached) if page.more else None
    if bodies:
        bodies_shown(request, len(records), consultation_id=consultation)
    body = page_body(media_type, "conflicts", records, {"next": following}, consultation_id=consultation)
    return response_of(request, body, media_type, following)


async def _verification(request: web.Request, held: ExitStack) -> web.StreamResponse:
    consultation = _consultation(request)
    media_type = negotiate(request, JSON)
    request.app[READ_LIMIT].enter(held)
    request.app[VERIFY_LIMIT].enter(held)
    found = await request.app[READER].verify(consultation)
    result = "damaged" if found.found else "intact" if found.checked == found.events else "unfinished"
    document = {
        "consultation_id": consultation,
        "result": result,
        "events": found.events,
        "checked": found.checked,
        "committed": found.committed,
        "chain": found.chain or None,
        "problems": found.found,
        "first_damaged_sequence": min((one.sequence for one in found.problems if one.sequence), default=None),
        "first_problems": [
            {"kind": one.kind, "message": one.message, "sequence": one.sequence or None} for one in found.problems
        ],
    }
    _log.info("CONSULTATION_VERIFIED", consultation_id=consultation, events=found.checked, problems=found.found)
    return response_of(request, orjson.dumps(document), media_type)


async def _by_name(
    request: web.Request, prefix: str, after: str, limit: int
) -> tuple[list[StoredConsultation], str | None]:
    """Return the consultations that the token is for, and the position to go on at; None at the end."""
    allowed = _allowed_prefix(request, prefix)
    if allowed is None:
        return [], None
    found, more = await request.app[READER].consultations(allowed, after, limit)
    return found, found[-1].consultation if more and found else None


async def _by_activity(
    request: web.Request, prefix: str, after: str, time_ns: int | None, limit: int
) -> tuple[list[StoredConsultation], str | None]:
    """Do the same in the order of activity, after the consultation *after*, or where it was at *time_ns*."""
    allowed, reader, place = _allowed_prefix(request, prefix), request.app[READER], NEWEST
    if after:
        if time_ns is None and request[GRANT].prefix == after[: len(request[GRANT].prefix)]:
            named, _ = await reader.consultations(after, "", 1)
            time_ns = next((one.last_received_ns for one in named if one.consultation == after), None)
        if time_ns is None:
            return [], None
        place = time_ns, after
    if allowed is None:
        return [], None
    found, reached = await reader.active_consultations(allowed, place, limit)
    return found, None if reached is None else f"{reached[0]}.{reached[1]}"


def _allowed_prefix(request: web.Request, prefix: str) -> str | None:
    """Return the longer one of *prefix* and that of the token; None if no id begins with both."""
    own = request[GRANT].prefix
    if own.startswith(prefix):
        return own
    return prefix if prefix.startswith(own) else None


def response_of(
    request: web.Request, body: bytes, media_type: str, link: str | None = None, *, relation: str = "next"
) -> web.Response:
    """Return the answer; *link* is the URL of the page that *relation* names."""
    headers = {"Content-Type": media_type, "Server": SERVER, "Cache-Control": "no-store"}
    if link is not None:
        headers["Link"] = f'<{link}>; rel="{relation}"'
    request.app[METRICS].requests.labels("200", "").inc()
    return web.Response(body=body, headers=headers)


# -- choosing events --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events of a consultation are asked for, and how.

    Attributes:
        after: their sequences are above it.
        before: their sequences are below it; None for no bound.
        limit: most events of the page.
        event_type: of each; None for any.
        since_ns: they were received at this time or later, nanoseconds since the Unix epoch; None for any.
        event_id: of the only one; None for all.
        bodies: whether their bodies are shown.
        backward: the page ends below *before*, rather than beginning after *after*.
        cloudevents: whether they are shown as CloudEvents.
    """

    after: int
    before: int | None
    limit: int
    event_type: str | None
    since_ns: int | None
    event_id: UUID | None
    bodies: bool
    backward: bool
    cloudevents: bool = False

    @property
    def filtered(self) -> bool:
        """Whether some events in the range are not wanted."""
        return self.event_type is not None or self.since_ns is not None

    @property
    def start(self) -> int:
        """Position at which the page begins, or, read backwards, ends."""
        return self.before if self.backward and self.before is not None else self.after

    def matches(self, stored: SequencedEvent) -> bool:
        """Return whether *stored* is one of them, its place apart."""
        if self.since_ns is not None and stored.event.received_ns < self.since_ns:
            return False
        return self.event_type is None or document_of(stored).get("event_type") == self.event_type

    def within(self, stored: SequencedEvent) -> bool:
        """Return whether *stored* is in the range of sequences."""
        return self.after < stored.sequence and (self.before is None or stored.sequence < self.before)

    def show(self, stored: SequencedEvent) -> bytes | None:
        """Return what is shown of *stored*; None if it is not one of them."""
        if not self.matches(stored):
            return None
        return (cloudevent if self.cloudevents else record)(stored, bodies=self.bodies)


@dataclass(slots=True)
class _Selected:
    """Records of a page; where it ends, or, read backwards, begins; and whether there may be more after, or before."""

    records: list[bytes]
    reached: int
    more: bool


async def _select(reader: EventBrowser, consultation: str, wanted: Wanted) -> _Selected:
    """Return a page of the events that are wanted.

    If they are filtered, the log is read until the page is full or as much as :data:`LOOKED_EVENTS` or
    :data:`LOOKED_BYTES` was looked at: the page may be empty although there are more.
    """
    if wanted.event_id is not None:
        stored = await reader.locate(consultation, wanted.event_id)
        shown = None if stored is None or not wanted.within(stored) else wanted.show(stored)
        return _Selected([] if shown is None else [shown], 0, more=False)
    found = _Selected([], wanted.start, more=True)
    events = size = 0
    while found.more and events < LOOKED_EVENTS and size < LOOKED_BYTES:
        read = reader.page_before if wanted.backward else reader.page
        limit = MAX_LIMIT if wanted.filtered else wanted.limit - len(found.records)
        page = await read(consultation, found.reached, limit)
        found.reached, found.more = _take(page, wanted, found)
        if len(found.records) == wanted.limit or (wanted.bodies and not wanted.filtered):
            break
        events += len(page.events)
        size += sum(len(stored.event.body) for stored in page.events)
    return found


def _take(page: Page, wanted: Wanted, found: _Selected) -> tuple[int, bool]:
    """Add the records of *page* that are wanted; return where to go on, and whether there may be more."""
    size, reached = sum(map(len, found.records)), found.reached
    events = page.events[::-1] if wanted.backward else page.events
    for left, stored in enumerate(events, start=1 - len(events)):
        if not wanted.within(stored):
            return reached, False
        shown = wanted.show(stored)
        if shown is not None:
            if found.records and size + len(shown) > PAGE_BYTES:
                return reached, True
            found.records.append(shown)
            size += len(shown)
            if len(found.records) == wanted.limit and (left or page.more):
                return stored.sequence, True
        reached = stored.sequence
    return page.reached, page.more


def _link(request: web.Request, path: str, **changed: object) -> str:
    """Return the URL of another page of the same request; parameters that are None are left out."""
    query = {name: value for name, value in ({**request.query, **changed}).items() if value is not None}
    return f"{path}?{urlencode(query)}"


# -- parameters -------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)
_ID_PART = re.compile(r"[A-Za-z0-9_-]{0,128}", re.ASCII)
_PLACE = re.compile(r"(?:([0-9]{1,19})\.)?([A-Za-z0-9_-]{0,128})", re.ASCII)
#: largest position in log and corpus
_MAX_POSITION = 2**63 - 1


def _invalid(detail: str) -> RequestRefusedError:
    return RequestRefusedError(problems.INVALID_PARAMETER, detail)


def _consultation(request: web.Request) -> str:
    try:
        return check_consultation_id(request.match_info["consultation"])
    except InvalidIdError:
        raise RequestRefusedError(problems.INVALID_CONSULTATION_ID) from None


def position_of(text: str, name: str) -> int:
    if _NUMBER.fullmatch(text) is None or int(text) > _MAX_POSITION:
        raise _invalid(f"{name} must be a whole number from 0 to {_MAX_POSITION}.")
    return int(text)


def _last_event_id(request: web.Request) -> int | None:
    """Return the last position that a follower has seen; None if it has seen nothing."""
    value = request.headers.get("Last-Event-ID")
    return None if value is None else position_of(value, "Last-Event-ID")


def limit_of(request: web.Request) -> int:
    text = request.query.get("limit", str(DEFAULT_LIMIT))
    if _NUMBER.fullmatch(text) is None or not 1 <= int(text) <= MAX_LIMIT:
        raise _invalid(f"limit must be 1 to {MAX_LIMIT}.")
    return int(text)


def _flag(request: web.Request, name: str, default: str) -> bool:
    text = request.query.get(name, default)
    if text not in {"0", "1"}:
        raise _invalid(f"{name} must be 0 or 1.")
    return text == "1"


def _wanted(request: web.Request) -> Wanted:
    query = request.query
    before = position_of(query["before"], "before") if "before" in query else None
    return Wanted(
        after=position_of(query.get("after", "0"), "after"),
        before=before,
        limit=limit_of(request),
        event_type=_event_type(request),
        since_ns=_since(request),
        event_id=_key(request),
        bodies=_flag(request, "bodies", "1"),
        backward=before is not None and "after" not in query,
    )


def _event_type(request: web.Request) -> str | None:
    event_type = request.query.get("type")
    if event_type == "":
        raise _invalid("type must not be empty.")
    return event_type


def _key(request: web.Request) -> UUID | None:
    """Return the id of the event whose Idempotency-Key is asked for."""
    key = request.query.get("key")
    try:
        return None if key is None else event_id_from_key(key)
    except InvalidIdError:
        raise _invalid("key must be an Idempotency-Key: 1 to 255 visible ASCII characters, quoted or not.") from None


_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+ -])([01]\d|2[0-3]):([0-5]\d))", re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _since(request: web.Request) -> int | None:
    text = request.query.get("since")
    if text is None:
        return None
    match = _TIME.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        *fields, second = map(int, match.groups()[:6])
        whole = datetime(*fields, min(second, 59), tzinfo=UTC) - _EPOCH  # type: ignore[arg-type,misc]
    except ValueError:
        raise _invalid("since must be a time with its zone (RFC 3339), such as 2026-03-01T08:00:00Z.") from None
    if second > 60:
        raise _invalid("since has more than 60 seconds.")
    fraction, sign, hours, minutes = match.groups()[6:]
    offset = 60 * (60 * int(hours) + int(minutes)) if sign else 0
    seconds = whole.days * 86400 + whole.seconds + (second == 60) - (-offset if sign == "-" else offset)
    return seconds * 10**9 + int((fraction or "").ljust(9, "0")[:9])


def _id_parameter(request: web.Request, name: str) -> str:
    """Return a consultation id or the beginning of one; empty when the parameter is absent."""
    text = request.query.get(name, "")
    if _ID_PART.fullmatch(text) is None:
        raise _invalid(f"{name} must be at most 128 characters of A-Z a-z 0-9 _ -.")
    return text


def _place_parameter(request: web.Request) -> tuple[int | None, str]:
    """Return the id in ``after``, and the time before it, which the URL of a page by activity has."""
    match = _PLACE.fullmatch(request.query.get("after", ""))
    if match is None or int(match[1] or 0) > _MAX_POSITION:
        raise _invalid("after must be a consultation id, or that of the URL in next.")
    return None if match[1] is None else int(match[1]), match[2]


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


# -- following --------------------------------------------------------------------------------------------------------


async def _follow(request: web.Request) -> web.StreamResponse:
    consultation, reader, grant = _consultation(request), request.app[READER], request[GRANT]
    if {"before", "key", "limit"} & request.query.keys():
        raise _invalid("before, key and limit do not go with follow=1.")
    resumed, wanted = _last_event_id(request), _wanted(request)
    negotiate(request, EVENT_STREAM)
    source = Source(
        consultation,
        page=lambda after, limit: reader.page(consultation, after, limit),
        has_news=lambda after: reader.has_news(consultation, after),
    )
    after = wanted.after if resumed is None else resumed
    allowed = lambda: grant.may(Scope.READ, consultation)  # noqa: E731
    return await request.app[FOLLOWERS].serve(request, source, after, wanted.show, allowed, bodies=wanted.bodies)


async def follow_all(request: web.Request) -> web.StreamResponse:
    """Send the events of all consultations that the token is for."""
    return await _handle(request, _follow_all)


async def _follow_all(request: web.Request) -> web.StreamResponse:
    grant, wanted, after = request[GRANT], _wanted(request), _last_event_id(request)
    if not _flag(request, "follow", "0"):
        raise _invalid("follow=1 is required: the events of all consultations are a stream.")
    negotiate(request, EVENT_STREAM)
    feed = request.app[FEED]
    if feed is None:
        raise RequestRefusedError(problems.NO_FEED)
    if after is None:
        after = wanted.after if "after" in request.query else await feed.last()

    def show(stored: SequencedEvent) -> bytes | None:
        if not grant.may(Scope.READ, stored.event.consultation) or not wanted.matches(stored):
            return None
        return record(stored, bodies=wanted.bodies, consultation=True, status=False)

    source = Source(None, lambda after, _: feed.page(after), feed.has_news)
    allowed = lambda: grant.may(Scope.READ)  # noqa: E731
    return await request.app[FOLLOWERS].serve(request, source, after, show, allowed, bodies=wanted.bodies)
