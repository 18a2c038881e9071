"""Reading back: the events of a consultation, one event, and which consultations there are."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from uuid import UUID

import orjson
from aiohttp import web

from fiq.errors import FiqError, InvalidIdError
from fiq.event import check_consultation_id
from services.core.logs import get_logger
from services.ingest import problems
from services.ingest import reading_records as records
from services.ingest.access import GRANT
from services.ingest.answers import SERVER
from services.ingest.connections import send
from services.ingest.handlers import ANSWERS, METRICS
from services.ingest.problems import Problem, RequestRefusedError
from services.ingest.reading_follow import Followers
from services.log.errors import (
    CorpusAwayError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from services.log.protocol import EventBrowser

READER = web.AppKey("reader", EventBrowser)
FOLLOWERS = web.AppKey("followers", Followers)

#: reads that one process answers at a time; a page takes some 2 MiB at most
MAX_READS = 64
#: what becomes of a read that failed, and what its client is told
_READ_ERRORS: dict[type[FiqError], tuple[Problem, str | None]] = {
    CorpusAwayError: (problems.CORPUS_AWAY, None),
    LogUnavailableError: (problems.LOG_UNAVAILABLE, "The event log did not answer in time: read again."),
    LogRefusedError: (problems.LOG_REFUSED, "The event log refuses to be read until an operator has acted."),
    TooManyInFlightError: (problems.TOO_MANY_IN_FLIGHT, "This process answers as many readers at once as it may."),
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
#: one that takes its share of the reads into what is held until its answer has been sent
Reader = Callable[[web.Request, ExitStack], Awaitable[web.StreamResponse]]

_log = get_logger("ingest.reading")


class Reads:
    """Counts the reads under way, from the question to the last byte of the answer."""

    def __init__(self) -> None:
        self._under_way = 0

    def enter(self, held: ExitStack) -> None:
        """Count one until *held* ends. Raises TooManyInFlightError: there are as many as may be."""
        if self._under_way >= MAX_READS:
            raise TooManyInFlightError("too many reads are under way")
        self._under_way += 1
        held.callback(self._leave)

    def _leave(self) -> None:
        self._under_way -= 1


READS = web.AppKey("reads", Reads)


async def list_events(request: web.Request) -> web.StreamResponse:
    """Answer with a page of a consultation's events, or follow it."""
    try:
        followed = records.follow(request)
    except RequestRefusedError as refusal:
        return request.app[ANSWERS].refused(refusal.problem, refusal.detail)
    return await (_told(request, _follow) if followed else _answered(request, _events))


async def get_event(request: web.Request) -> web.StreamResponse:
    """Answer with one event and where it is."""
    return await _answered(request, _event)


async def list_consultations(request: web.Request) -> web.StreamResponse:
    """Answer with a page of the ids of persisted consultations."""
    return await _answered(request, _consultations)


async def _answered(request: web.Request, handler: Reader) -> web.StreamResponse:
    """Let *handler* answer; what it takes is held, and the process does not end, until the client has its answer."""
    app, started = request.app, time.perf_counter()
    with ExitStack() as held:
        app[ANSWERS].enter()
        held.callback(app[ANSWERS].leave)
        response = await _told(request, lambda request: handler(request, held))
        app[METRICS].read_duration.observe(time.perf_counter() - started)
        await send(response, request)
        return response


async def _told(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let *handler* answer, and turn what it raises into a problem."""
    answers = request.app[ANSWERS]
    try:
        return await handler(request)
    except RequestRefusedError as refusal:
        return answers.refused(refusal.problem, refusal.detail, headers=refusal.headers)
    except tuple(_READ_ERRORS) as error:
        problem, detail = next(told for kind, told in _READ_ERRORS.items() if isinstance(error, kind))
        if problem is problems.LOG_REFUSED:
            answers.log_refused(str(error))
        elif problem is problems.CORPUS_AWAY:
            _log.warning("CORPUS_AWAY", reason=str(error))
        return answers.refused(problem, detail)


async def _events(request: web.Request, held: ExitStack) -> web.StreamResponse:
    consultation = _consultation(request)
    after = records.position(request.query.get("after", "0"), "after")
    _last_seen(request)  # says nothing to a page, but what is malformed is refused everywhere
    limit = records.limit(request)
    media_type = records.negotiate(request, records.JSON, records.NDJSON)
    request.app[READS].enter(held)
    page = await request.app[READER].page(consultation, after, limit)
    following = f"/consultations/{consultation}/events?after={page.reached}&limit={limit}" if page.more else None
    rows = [records.record(stored) for stored in page.events]
    body = records.page(media_type, "events", rows, following, consultation_id=consultation)
    _log.info("EVENTS_READ", consultation_id=consultation, after=after, events=len(rows), bytes=len(body))
    return _shown(request, body, media_type, following)


async def _event(request: web.Request, held: ExitStack) -> web.StreamResponse:
    consultation = _consultation(request)
    media_type = records.negotiate(request, records.JSON)
    try:
        event_id = UUID(request.match_info["message_id"])
    except ValueError:
        raise RequestRefusedError(problems.UNKNOWN_EVENT) from None
    request.app[READS].enter(held)
    stored = await request.app[READER].locate(consultation, event_id)
    if stored is None:
        raise RequestRefusedError(problems.UNKNOWN_EVENT)
    _log.info("EVENT_READ", consultation_id=consultation, message_id=str(event_id), sequence=stored.sequence)
    return _shown(request, records.record(stored, consultation=True), media_type)


async def _consultations(request: web.Request, held: ExitStack) -> web.StreamResponse:
    prefix, after = records.name_part(request, "prefix"), records.name_part(request, "after")
    limit = records.limit(request)
    media_type = records.negotiate(request, records.JSON, records.NDJSON)
    request.app[READS].enter(held)
    names, more = await _names(request, prefix, after, limit)
    following = f"/consultations?prefix={prefix}&after={names[-1]}&limit={limit}" if more and names else None
    rows = [orjson.dumps({"consultation_id": name}) for name in names]
    _log.info("CONSULTATIONS_READ", consultations=len(names))
    return _shown(request, records.page(media_type, "consultations", rows, following), media_type, following)


async def _names(request: web.Request, prefix: str, after: str, limit: int) -> tuple[list[str], bool]:
    """Return the consultations that begin with *prefix*, of those that the token is for."""
    own = request[GRANT].prefix
    if own.startswith(prefix):
        prefix = own
    elif not prefix.startswith(own):
        return [], False
    return await request.app[READER].consultations(prefix, after, limit)


async def _follow(request: web.Request) -> web.StreamResponse:
    consultation = _consultation(request)
    resumed = _last_seen(request)
    after = records.position(request.query.get("after", "0"), "after") if resumed is None else resumed
    records.negotiate(request, records.EVENT_STREAM)
    return await request.app[FOLLOWERS].serve(request, consultation, after)


def _last_seen(request: web.Request) -> int | None:
    """Return what a follower saw last, or None when it has seen nothing."""
    value = request.headers.get("Last-Event-ID")
    return None if value is None else records.position(value, "Last-Event-ID")


def _shown(request: web.Request, body: bytes, media_type: str, following: str | None = None) -> web.Response:
    headers = {"Content-Type": media_type, "Server": SERVER, "Cache-Control": "no-store"}
    if following is not None:
        headers["Link"] = f'<{following}>; rel="next"'
    request.app[METRICS].requests.labels("200", "").inc()
    response = web.Response(body=body, headers=headers)
    if request.app[ANSWERS].closing:
        response.force_close()
    return response


def _consultation(request: web.Request) -> str:
    try:
        return check_consultation_id(request.match_info["consultation"])
    except InvalidIdError:
        raise RequestRefusedError(problems.INVALID_CONSULTATION_ID) from None
