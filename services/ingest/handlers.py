"""The event resource: ``/consultations/{consultation}/events``."""

from __future__ import annotations

import time
from uuid import UUID

import orjson
from aiohttp import HttpVersion11, web

from services.contract.depth import deeper_than
from services.contract.errors import FiqError, InvalidIdError
from services.contract.event import Event, InvalidBodyError, NotJsonError, check_body
from services.contract.ids import check_consultation_id, event_id_from_key, new_event_id
from services.eventlog.errors import (
    DuplicateInFlightError,
    LogFullError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from services.eventlog.protocol import EventWriter
from services.ingest import metrics as outcomes
from services.ingest import problems
from services.ingest.admission import Admission, Share
from services.ingest.answers import SERVER, Answers
from services.ingest.body import check_content, read_body
from services.ingest.metrics import Metrics
from services.ingest.problems import BY_SLUG, Problem, RequestRefusedError
from services.ingest.settings import Settings

SETTINGS = web.AppKey("settings", Settings)
WRITER = web.AppKey("writer", EventWriter)
METRICS = web.AppKey("metrics", Metrics)
ANSWERS = web.AppKey("answers", Answers)
ADMISSION = web.AppKey("admission", Admission)

#: what becomes of an event that the log did not take
_APPEND_ERRORS: dict[type[FiqError], tuple[Problem, str]] = {
    LogFullError: (problems.LOG_FULL, outcomes.FULL),
    LogUnavailableError: (problems.LOG_UNAVAILABLE, outcomes.UNAVAILABLE),
    DuplicateInFlightError: (problems.DUPLICATE_IN_FLIGHT, outcomes.IN_FLIGHT),
    TooManyInFlightError: (problems.TOO_MANY_IN_FLIGHT, outcomes.LIMIT),
    LogRefusedError: (problems.LOG_REFUSED, outcomes.REFUSED),
}


async def post_event(request: web.Request) -> web.Response:
    """Store one event and answer 202 when a quorum has it (DESIGN, section 6)."""
    received_ns, started = time.time_ns(), time.perf_counter()
    app = request.app
    answers = app[ANSWERS]
    consultation: str | None = None
    share: Share | None = None
    answers.enter()
    try:
        consultation = _consultation(request)
        share = app[ADMISSION].share()
        event = Event(consultation, _event_id(request), received_ns, await _body(request, share, app[SETTINGS]))
        app[METRICS].body_size.observe(len(event.body))
        share.store()
        appended = await app[WRITER].append(event)
        return answers.accepted(event, appended, started)
    except RequestRefusedError as refusal:
        return answers.refused(
            refusal.problem, refusal.detail, started=started, headers=refusal.headers, consultation=consultation
        )
    except tuple(_APPEND_ERRORS) as error:
        problem = _not_appended(app, error)
        return answers.refused(problem, started=started, consultation=consultation)
    finally:
        if share is not None:
            share.release()
        answers.leave()


async def continue_or_refuse(request: web.Request) -> None:
    """Answer ``Expect: 100-continue``: refuse what the headers already rule out before the body is on its way."""
    if request.version < HttpVersion11:
        return  # RFC 9110, section 10.1.1: such a client cannot wait for an interim answer
    if request.headers["Expect"].lower() != "100-continue":
        raise RequestRefusedError(problems.EXPECTATION_FAILED)
    _consultation(request)
    check_content(request, limit=request.app[SETTINGS].max_event_bytes)
    if request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def options(_: web.Request) -> web.Response:
    """Say which methods the event resource has."""
    return web.Response(status=204, headers={"Allow": "OPTIONS, POST", "Server": SERVER})


async def get_problem(request: web.Request) -> web.Response:
    """Answer what a problem's ``type`` means."""
    problem = BY_SLUG.get(request.match_info["slug"])
    if problem is None:
        raise web.HTTPNotFound
    document = {"type": problem.type, "title": problem.title, "status": problem.status, "detail": problem.detail}
    return web.Response(body=orjson.dumps(document), content_type="application/json", headers={"Server": SERVER})


def _consultation(request: web.Request) -> str:
    try:
        return check_consultation_id(request.match_info["consultation"])
    except InvalidIdError:
        raise RequestRefusedError(problems.INVALID_CONSULTATION_ID) from None


def _event_id(request: web.Request) -> UUID:
    keys = request.headers.getall("Idempotency-Key", ())
    if not keys:
        return new_event_id()
    if len(keys) > 1:
        raise RequestRefusedError(problems.INVALID_IDEMPOTENCY_KEY)
    try:
        return event_id_from_key(keys[0])
    except InvalidIdError:
        raise RequestRefusedError(problems.INVALID_IDEMPOTENCY_KEY) from None


async def _body(request: web.Request, share: Share, settings: Settings) -> bytes:
    limit = settings.max_event_bytes
    check_content(request, limit=limit)
    raw = await read_body(request, share, limit=limit, timeout=settings.body_timeout)
    try:
        stored = check_body(raw)
    except NotJsonError:
        raise RequestRefusedError(problems.INVALID_JSON) from None
    except InvalidBodyError as error:
        raise RequestRefusedError(problems.INVALID_EVENT, f"Invalid: {error}.") from None
    if deeper_than(stored, settings.max_json_depth):
        raise RequestRefusedError(problems.INVALID_EVENT, f"Invalid: more than {settings.max_json_depth} levels deep.")
    return stored


def _not_appended(app: web.Application, error: BaseException) -> Problem:
    """Count why the log did not take an event, and return the client's problem."""
    for kind, (problem, outcome) in _APPEND_ERRORS.items():
        if isinstance(error, kind):
            app[METRICS].outcomes[outcome].inc()
            if kind is LogRefusedError:
                app[ANSWERS].log_refused(str(error))
            return problem
    raise error
