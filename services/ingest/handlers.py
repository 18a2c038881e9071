"""Post events: one or many, of one consultation or of several, plain or as CloudEvents."""

from __future__ import annotations

import time
from collections.abc import Mapping
from uuid import UUID

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler

from fiq.errors import InvalidIdError, PoisonError
from fiq.event import (
    Event,
    InvalidBodyError,
    NotJsonError,
    bare_key,
    check_body,
    check_consultation_id,
    check_depth,
    event_id_from_key,
    new_event_id,
)
from fiq.trace import Trace
from services.core.tokens import Scope
from services.ingest import problems
from services.ingest.access import GATE, GRANT
from services.ingest.admission import Admission, Share
from services.ingest.answers import SERVER, Answers, trace_id_of, trace_of
from services.ingest.batch import (
    Draft,
    Place,
    consultation_of,
    read_batch,
    read_binary,
    read_line,
    read_structured,
    split_array,
    split_lines,
)
from services.ingest.metrics import Metrics
from services.ingest.problems import BY_SLUG, RequestRefusedError
from services.ingest.resources import Form, Resource, check_content, read_body
from services.ingest.settings import Settings
from services.ingest.storing import Storing

SETTINGS = web.AppKey("settings", Settings)
STORING = web.AppKey("storing", Storing)
METRICS = web.AppKey("metrics", Metrics)
ANSWERS = web.AppKey("answers", Answers)
ADMISSION = web.AppKey("admission", Admission)

#: how the events of a batch are found, and each of them read
_BATCHES = {
    Form.LINES: (split_lines, read_line),
    Form.ARRAY: (split_array, read_line),
    Form.CLOUDEVENT_BATCH: (split_array, read_structured),
}


def poster(resource: Resource) -> Handler:
    """Return the handler that takes what is posted to *resource*."""

    async def post(request: web.Request) -> web.StreamResponse:
        received_ns, started = time.time_ns(), time.perf_counter()
        app = request.app
        answers, admission = app[ANSWERS], app[ADMISSION]
        consultation: str | None = None
        share: Share | None = None
        answers.enter()
        try:
            with app[STORING].refusing():
                consultation = _consultation(request)
                form = resource.form(request)
                share = admission.batch_share() if form.is_batch else admission.share()
                post = _post_batch if form.is_batch else _post_one
                return await post(request, form, share, consultation, received_ns, started)
        except RequestRefusedError as refusal:
            return answers.refused(
                refusal.problem,
                refusal.detail,
                members=refusal.members,
                headers=refusal.headers,
                started=started,
                consultation=consultation,
                trace_id=trace_id_of(request),
            )
        finally:
            if share is not None:
                share.release()
            answers.leave()

    return post


def expecter(resource: Resource) -> Handler:
    """Return the handler of ``Expect``, which refuses what the headers rule out before the body is on its way."""

    async def expect(request: web.Request) -> None:
        if request.version < HttpVersion11:
            return  # RFC 9110, section 10.1.1: such a client cannot wait for an interim answer
        if request.headers["Expect"].lower() != "100-continue":
            raise RequestRefusedError(problems.EXPECTATION_FAILED)
        _consultation(request)
        check_content(request, limit=body_limit(resource.form(request), request.app[SETTINGS]))
        if request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    return expect  # type: ignore[return-value]  # None is "go on"


def options(methods: str) -> Handler:
    """Return the handler that says which *methods* a resource has."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=204, headers={"Allow": methods, "Server": SERVER})

    return answer


async def get_problem(request: web.Request) -> web.Response:
    """Answer what a problem's ``type`` means."""
    problem = BY_SLUG.get(request.match_info["slug"])
    if problem is None:
        raise web.HTTPNotFound
    document = {"type": problem.type, "title": problem.title, "status": problem.status, "detail": problem.detail}
    return web.Response(body=orjson.dumps(document), content_type="application/json", headers={"Server": SERVER})


def shower(body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> Handler:
    """Return the handler that always answers with the same *body*."""
    # a description changes with the version: whoever keeps it asks again
    shown = {"Content-Type": content_type, "Server": SERVER, "Cache-Control": "no-cache", **(headers or {})}

    async def show(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, headers=shown)

    return show


# -- one event --------------------------------------------------------------------------------------------------------


async def _post_one(
    request: web.Request, form: Form, share: Share, of_path: str | None, received_ns: int, started: float
) -> web.Response:
    app = request.app
    event, keyed = await _read_one(request, form, share, of_path, received_ns)
    if of_path is None:
        app[GATE].require(request, Scope.WRITE, (event.consultation,))
    app[METRICS].body_size.observe(len(event.body))
    share.store()
    appended = await app[STORING].one(event, keyed=keyed)
    return app[ANSWERS].accepted(event, appended, started)


async def _read_one(
    request: web.Request, form: Form, share: Share, of_path: str | None, received_ns: int
) -> tuple[Event, bool]:
    """Return the event of *request*, and whether the client gave it its id."""
    key, settings = _key(request), request.app[SETTINGS]
    if form is not Form.EVENT and key is not None:
        raise RequestRefusedError(problems.INVALID_IDEMPOTENCY_KEY, "The key of a CloudEvent is its source and id.")
    raw = await _body(request, form, share)
    try:
        if form is Form.EVENT:
            event_id = new_event_id() if key is None else event_id_from_key(key)
            event = Event(of_path or "", event_id, received_ns, check_body(raw), trace_of(request))
        else:
            draft = read_structured(raw) if form is Form.CLOUDEVENT else read_binary(request.headers, raw)
            event = _of_cloudevent(draft, of_path, received_ns, trace_of(request), limit=settings.max_event_bytes)
        check_depth(event.body, settings.max_json_depth)
        return event, form is not Form.EVENT or key is not None
    except NotJsonError:
        raise RequestRefusedError(problems.INVALID_JSON) from None
    except PoisonError as error:
        raise RequestRefusedError(problems.INVALID_EVENT, f"Invalid: {error}.") from None


def _of_cloudevent(draft: Draft, of_path: str | None, received_ns: int, trace: Trace | None, *, limit: int) -> Event:
    if len(draft.body) > limit:
        raise InvalidBodyError(f"with its attributes it is larger than {limit} bytes")
    event_id: UUID = draft.event_id or new_event_id()
    return Event(consultation_of(draft, of_path), event_id, received_ns, draft.body, trace)


# -- a batch ----------------------------------------------------------------------------------------------------------


async def _post_batch(
    request: web.Request, form: Form, share: Share, of_path: str | None, received_ns: int, started: float
) -> web.Response:
    app = request.app
    key, settings = _key(request), app[SETTINGS]
    if form is Form.CLOUDEVENT_BATCH and key is not None:
        raise RequestRefusedError(problems.INVALID_IDEMPOTENCY_KEY, "The key of a CloudEvent is its source and id.")
    trace = trace_of(request)
    place = Place(of_path, key, received_ns, settings.max_event_bytes, settings.max_json_depth, trace)
    raw = await _body(request, form, share)
    lines = await read_batch(raw, *_BATCHES[form], place)
    del raw  # the lines are copies
    if of_path is None:
        app[GATE].require(request, Scope.WRITE, {line.event.consultation for line in lines})
    request[GRANT].take_more(len(lines) - 1)  # the request itself counted as one
    app[METRICS].batch_events.observe(len(lines))
    share.store_batch(len(lines))
    outcomes = await app[STORING].batch(lines)
    return app[ANSWERS].batch_accepted(lines, outcomes, started)


# -- parts of a request -----------------------------------------------------------------------------------------------


def _consultation(request: web.Request) -> str | None:
    """Return the consultation of the path, or None where the path names none."""
    value = request.match_info.get("consultation")
    try:
        return None if value is None else check_consultation_id(value)
    except InvalidIdError:
        raise RequestRefusedError(problems.INVALID_CONSULTATION_ID) from None


def _key(request: web.Request) -> str | None:
    """Return the client's key, without quotes, or None when it sent none."""
    keys = request.headers.getall("Idempotency-Key", ())
    if not keys:
        return None
    if len(keys) > 1:
        raise RequestRefusedError(problems.INVALID_IDEMPOTENCY_KEY)
    try:
        return bare_key(keys[0])
    except InvalidIdError:
        raise RequestRefusedError(problems.INVALID_IDEMPOTENCY_KEY) from None


def body_limit(form: Form, settings: Settings) -> int:
    """Return the size of the largest body, bytes: what is taken of batches at a time is the most for one, too."""
    if not form.is_batch:
        return settings.max_event_bytes
    return min(settings.max_batch_bytes, max(settings.max_in_flight_bytes, settings.max_event_bytes))


async def _body(request: web.Request, form: Form, share: Share) -> bytes:
    limit = body_limit(form, request.app[SETTINGS])
    check_content(request, limit=limit)
    return await read_body(request, share, limit=limit, timeout=request.app[SETTINGS].body_timeout)
