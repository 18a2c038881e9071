"""POST: one event or a batch, of one consultation or of several, plain or as CloudEvents.

Each request takes the same steps: parse, authorise, admit, check the key, append, answer. The middleware has checked
the token, its rate and the backlog before (:mod:`services.ingest.access`). The last steps of one event:

1. :meth:`IdempotencyKeys.look_up` begins to ask the corpus about the key, unless the client sent none.
2. The event is appended to the log, unless the corpus is known to hold it.
3. :meth:`IdempotencyKeys.resolve` compares it with the first event under its key, if there is one.
4. 202 with the first event's position, or 422 when that has another body.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler
from multidict import CIMultiDict

from fiq.errors import FiqError, InvalidIdError, PoisonError
from fiq.event import (
    Event,
    InvalidBodyError,
    NotJsonError,
    bare_key,
    check_consultation_id,
    check_depth,
    event_id_from_key,
    new_event_id,
)
from services.core.logs import BATCH_QUEUED, EVENT_QUEUED, get_logger
from services.core.tokens import Scope
from services.core.tracing import trace_of
from services.ingest import metrics as outcomes
from services.ingest import problems
from services.ingest.access import ACCESS, GRANT
from services.ingest.admission import ADMISSION, IN_FLIGHT, NEW_CONSULTATIONS, BacklogLimiter, Reservation
from services.ingest.formats import (
    LONG_BYTES,
    BatchContext,
    BatchEvent,
    BodyFormat,
    Resource,
    check_content,
    not_json,
    parse_binary_cloudevent,
    parse_cloudevent,
    parse_event,
    read_batch,
    read_body,
)
from services.ingest.idempotency import IdempotencyKeys
from services.ingest.metrics import METRICS, IngestMetrics
from services.ingest.problems import REFUSALS, SECONDS_DECIMALS, SERVER, ProblemType, RequestRefusedError
from services.ingest.settings import SETTINGS
from services.log.errors import (
    DuplicateInFlightError,
    LogFullError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from services.log.protocol import Appended, EventWriter

#: the problem and the outcome in metrics for each error of the log
_APPEND_ERRORS: dict[type[FiqError], tuple[ProblemType, str]] = {
    LogFullError: (problems.LOG_FULL, outcomes.FULL),
    LogUnavailableError: (problems.LOG_UNAVAILABLE, outcomes.UNAVAILABLE),
    DuplicateInFlightError: (problems.DUPLICATE_IN_FLIGHT, outcomes.IN_FLIGHT),
    TooManyInFlightError: (problems.TOO_MANY_IN_FLIGHT, outcomes.LIMIT),
    LogRefusedError: (problems.LOG_REFUSED, outcomes.REFUSED),
}
_APPEND_ERROR_TYPES = tuple(_APPEND_ERRORS)
_KEY_OUTCOMES = {
    problems.IDEMPOTENCY_KEY_REUSED: outcomes.REUSED,
    problems.KEY_NOT_COMPARED: outcomes.NOT_COMPARED,
}
_BATCH_FAILED = "Some events of the batch may be stored, none twice: retry all of it with the same keys."
_REUSED_IN_BATCH = "Each of lines has a key of another event; results says where the other lines are stored."

_log = get_logger("ingest")


def post_handler(resource: Resource) -> Handler:
    """Return the handler that takes the events posted to *resource*."""

    async def post(request: web.Request) -> web.StreamResponse:
        received_ns, started = time.time_ns(), time.perf_counter()
        app = request.app
        consultation: str | None = None
        reservation: Reservation | None = None
        with app[IN_FLIGHT]:
            try:
                consultation = _path_consultation(request)
                body_format = resource.format_of(request)
                reservation = app[ADMISSION].reserve(batch=body_format.is_batch)
                post = _post_batch if body_format.is_batch else _post_event
                return await post(request, body_format, reservation, consultation, received_ns, started)
            except RequestRefusedError as refusal:
                return app[REFUSALS].answer_error(refusal, request, started=started, consultation=consultation)
            except _APPEND_ERROR_TYPES as error:
                return app[REFUSALS].answer_error(
                    _refusal_of(app, error), request, started=started, consultation=consultation
                )
            finally:
                if reservation is not None:
                    reservation.release()

    return post


def expect_handler(resource: Resource) -> Handler:
    """Return the handler of ``Expect``, which refuses what the headers rule out before the body is sent."""

    async def expect(request: web.Request) -> None:
        if request.version < HttpVersion11:
            return  # RFC 9110, section 10.1.1: such a client cannot wait for an interim answer
        if request.headers["Expect"].lower() != "100-continue":
            raise RequestRefusedError(problems.EXPECTATION_FAILED)
        _path_consultation(request)
        check_content(request, limit=resource.format_of(request).limit(request.app[SETTINGS]))
        if request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    return expect  # type: ignore[return-value]  # None means: go on


def _refusal_of(app: web.Application, error: FiqError, detail: str | None = None) -> RequestRefusedError:
    """Count an error of the log, and return what the client gets."""
    problem, outcome = next(found for kind, found in _APPEND_ERRORS.items() if isinstance(error, kind))
    app[METRICS].outcomes[outcome].inc()
    if problem is problems.LOG_REFUSED:
        app[REFUSALS].log_refused(str(error))
    return RequestRefusedError(problem, detail)


# -- one event --------------------------------------------------------------------------------------------------------


async def _post_event(
    request: web.Request,
    body_format: BodyFormat,
    reservation: Reservation,
    path: str | None,
    received_ns: int,
    started: float,
) -> web.Response:
    app = request.app
    event, keyed = await _parse_event(request, body_format, reservation, path, received_ns)
    if path is None:
        app[ACCESS].require(request, Scope.WRITE, (event.consultation,))
    app[METRICS].body_size.observe(len(event.body))
    reservation.store()
    await app[NEW_CONSULTATIONS].check(request[GRANT].name, (event.consultation,))
    appended = await app[APPENDER].append(event, keyed=keyed)
    app[NEW_CONSULTATIONS].remember((event.consultation,))
    return _accepted(app, event, appended, started)


async def _parse_event(
    request: web.Request, body_format: BodyFormat, reservation: Reservation, path: str | None, received_ns: int
) -> tuple[Event, bool]:
    """Return the event of *request*, and whether its id comes from the client."""
    key, settings, trace = _key(request, body_format), request.app[SETTINGS], trace_of(request)
    raw = await read_body(request, reservation, limit=body_format.limit(settings), timeout=settings.body_timeout)
    try:
        if body_format is BodyFormat.EVENT:
            parsed = parse_event(raw)
            event_id = new_event_id() if key is None else event_id_from_key(key)
        else:
            is_binary = body_format is BodyFormat.CLOUDEVENT_BINARY
            parsed = parse_binary_cloudevent(request.headers, raw) if is_binary else parse_cloudevent(raw)
            if len(parsed.body) > settings.max_event_bytes:
                raise InvalidBodyError(f"with its attributes it is larger than {settings.max_event_bytes} bytes")
            event_id = parsed.event_id or new_event_id()
        event = Event(parsed.consultation_in(path), event_id, received_ns, parsed.body, trace)
        check_depth(event.body, settings.max_json_depth)
        return event, body_format is not BodyFormat.EVENT or key is not None
    except NotJsonError as error:
        raise not_json(raw, error.offset) from None
    except PoisonError as error:
        raise RequestRefusedError(problems.INVALID_EVENT, f"Invalid: {error}.") from None


def _accepted(app: web.Application, event: Event, appended: Appended, started: float) -> web.Response:
    document = {"status": "accepted", **_result(event, appended)}
    message_id = document["message_id"]
    _log.info(
        EVENT_QUEUED,
        consultation_id=event.consultation,
        message_id=message_id,
        sequence=appended.sequence,
        duplicate=appended.duplicate,
        bytes=len(event.body),
        duration_s=round(_count_accepted(app, started), SECONDS_DECIMALS),
        **_trace_id(event),
    )
    headers = CIMultiDict(
        {
            "Content-Type": "application/json",
            "Location": f"/consultations/{event.consultation}/events/{message_id}",
            "Server": SERVER,
        }
    )
    return web.Response(status=202, body=orjson.dumps(document), headers=headers)


def _count_accepted(app: web.Application, started: float) -> float:
    """Count an answer 202 and return its duration, seconds."""
    duration = time.perf_counter() - started
    app[METRICS].accepted.inc()
    app[METRICS].duration.observe(duration)
    return duration


# -- a batch ----------------------------------------------------------------------------------------------------------


async def _post_batch(
    request: web.Request,
    body_format: BodyFormat,
    reservation: Reservation,
    path: str | None,
    received_ns: int,
    started: float,
) -> web.Response:
    app = request.app
    key, settings, trace = _key(request, body_format), app[SETTINGS], trace_of(request)
    context = BatchContext(path, key, received_ns, settings.max_event_bytes, settings.max_json_depth, trace)
    raw = await read_body(request, reservation, limit=body_format.limit(settings), timeout=settings.body_timeout)
    # of long batches one is read at a time: each has its turns, and other requests wait for one turn at most
    async with app[ADMISSION].long_batch if len(raw) > LONG_BYTES else contextlib.nullcontext():
        batch = await read_batch(raw, body_format, context)
    del raw  # the events are copies
    if path is None:
        app[ACCESS].require(request, Scope.WRITE, {one.event.consultation for one in batch})
    request[GRANT].count_events(len(batch) - 1)  # the request itself counted as one
    app[METRICS].batch_events.observe(len(batch))
    reservation.store(len(batch))
    consultations = {one.event.consultation for one in batch}
    await app[NEW_CONSULTATIONS].check(request[GRANT].name, consultations)
    try:
        results = await app[APPENDER].append_batch(batch)
        app[NEW_CONSULTATIONS].remember(consultations)
    except _APPEND_ERROR_TYPES as error:
        raise _refusal_of(app, error, _BATCH_FAILED) from None
    return _batch_answer(request, batch, results, started)


def _batch_answer(
    request: web.Request, batch: Sequence[BatchEvent], results: Sequence[Appended | ProblemType], started: float
) -> web.Response:
    """Answer 202, or 422 when a line has the key of another event, with the result of each line in order."""
    app = request.app
    documents = [_result(one.event, result) for one, result in zip(batch, results, strict=True)]
    stored = [result for result in results if isinstance(result, Appended)]
    consultations = {one.event.consultation for one in batch}
    _log.info(
        BATCH_QUEUED,
        consultation_id=next(iter(consultations)) if len(consultations) == 1 else None,
        events=len(batch),
        duplicates=sum(result.duplicate for result in stored),
        reused=len(batch) - len(stored),
        sequence=max((result.sequence for result in stored), default=None),
        bytes=sum(len(one.event.body) for one in batch),
        duration_s=round(time.perf_counter() - started, SECONDS_DECIMALS),
        **_trace_id(batch[0].event),
    )
    if len(stored) < len(batch):
        reused = [
            {"line": one.line, "reason": result.detail}
            for one, result in zip(batch, results, strict=True)
            if isinstance(result, ProblemType)
        ]
        return app[REFUSALS].answer(
            problems.IDEMPOTENCY_KEY_REUSED,
            _REUSED_IN_BATCH,
            members={"lines": reused, "results": documents},
            started=started,
            request=request,
        )
    _count_accepted(app, started)
    headers = CIMultiDict({"Content-Type": "application/json", "Server": SERVER})
    return web.Response(status=202, body=orjson.dumps({"status": "accepted", "results": documents}), headers=headers)


# -- check the key, append --------------------------------------------------------------------------------------------


class IdempotentAppender:
    """Appends events to the log, each key once.

    Args:
        writer: of the log.
        keys: compare events with the first ones under their keys.
        backlog: refuses events of stalled partitions.
        metrics: counts outcomes.
    """

    def __init__(
        self, writer: EventWriter, keys: IdempotencyKeys, backlog: BacklogLimiter, metrics: IngestMetrics
    ) -> None:
        self._writer = writer
        self._keys = keys
        self._backlog = backlog
        self._metrics = metrics

    async def append(self, event: Event, *, keyed: bool) -> Appended:
        """Append *event*, and return where the first event with its id is.

        Args:
            event: one of its own request.
            keyed: its id comes from the client.

        Raises RequestRefusedError: the first one has another body, or cannot be read now; FiqError: as
        :meth:`EventWriter.append`.
        """
        if not keyed:
            self._backlog.check_partitions((event,))
            appended = await self._writer.append(event)
            self._count((appended,))
            return appended
        (lookup,) = lookups = self._keys.look_up((event,))
        if lookup.expected:
            await self._keys.wait(lookups)
        answer: Appended | None = None
        if lookup.first is None:
            self._backlog.check_partitions((event,))
            answer = await self._writer.append(event)
        if not lookup.expected:
            await self._keys.wait(lookups)
        result = self._keys.resolve(lookup, answer)
        if result is None:
            assert answer is not None
            result = await self._keys.resolve_duplicate(lookup, answer)
        self._count((result,))
        if isinstance(result, ProblemType):
            raise RequestRefusedError(result)
        return result

    async def append_batch(self, batch: Sequence[BatchEvent]) -> list[Appended | ProblemType]:
        """Append the events of *batch*; return for each where the first one with its id is, or why it is refused.

        Lines with the same id, which have the same body, are one event.

        Raises RequestRefusedError: a key cannot be compared now; FiqError: as :meth:`EventWriter.append_batch`.
        """
        unique: dict[tuple[str, bytes], BatchEvent] = {}
        for one in batch:
            unique.setdefault(one.identity, one)
        keyed = [identity for identity, one in unique.items() if one.keyed]
        lookups = dict(zip(keyed, self._keys.look_up(unique[identity].event for identity in keyed), strict=True))
        await self._keys.wait(lookup for lookup in lookups.values() if lookup.expected)
        new = [name for name in unique if name not in lookups or lookups[name].first is None]
        events = [unique[name].event for name in new]
        self._backlog.check_partitions(events)
        appended = dict(zip(new, await self._writer.append_batch(events) if events else (), strict=True))
        await self._keys.wait(lookup for lookup in lookups.values() if not lookup.expected)
        results: dict[tuple[str, bytes], Appended | ProblemType] = {}
        duplicates = []
        for name in unique:
            found = self._keys.resolve(lookups[name], appended.get(name)) if name in lookups else appended[name]
            if found is None:
                duplicates.append(name)
            else:
                results[name] = found
        reading = (self._keys.resolve_duplicate(lookups[name], appended[name]) for name in duplicates)
        results.update(zip(duplicates, await asyncio.gather(*reading), strict=True))
        self._count(results.values())
        if problems.KEY_NOT_COMPARED in results.values():
            raise RequestRefusedError(problems.KEY_NOT_COMPARED, _BATCH_FAILED)
        found_of = [results[one.identity] for one in batch]
        for n, (one, result) in enumerate(zip(batch, found_of, strict=True)):
            if one is not unique[one.identity] and isinstance(result, Appended):
                found_of[n] = Appended(result.sequence, duplicate=True)  # the batch has it in an earlier line
        return found_of

    def _count(self, results: Iterable[Appended | ProblemType]) -> None:
        for result in results:
            if isinstance(result, ProblemType):
                self._metrics.outcomes[_KEY_OUTCOMES[result]].inc()
                continue
            self._backlog.note(result.sequence)
            if result.duplicate:
                self._metrics.duplicates.inc()
            self._metrics.outcomes[outcomes.DUPLICATE if result.duplicate else outcomes.STORED].inc()


APPENDER = web.AppKey("appender", IdempotentAppender)


# -- parts of a request and an answer ---------------------------------------------------------------------------------


def _path_consultation(request: web.Request) -> str | None:
    """Return the consultation in the path; None where the path has none."""
    value = request.match_info.get("consultation")
    try:
        return None if value is None else check_consultation_id(value)
    except InvalidIdError:
        raise RequestRefusedError(problems.INVALID_CONSULTATION_ID) from None


def _key(request: web.Request, body_format: BodyFormat) -> str | None:
    """Return Idempotency-Key without quotes; None without one."""
    keys = request.headers.getall("Idempotency-Key", ())
    if not keys:
        return None
    try:
        key = bare_key(keys[0])
    except InvalidIdError:
        raise RequestRefusedError(problems.INVALID_IDEMPOTENCY_KEY) from None
    if len(keys) > 1:
        raise RequestRefusedError(problems.INVALID_IDEMPOTENCY_KEY)
    if body_format.takes_no_key:
        raise RequestRefusedError(
            problems.INVALID_IDEMPOTENCY_KEY, "The key of a CloudEvent is its source and id: leave the header out."
        )
    return key


def _result(event: Event, result: Appended | ProblemType) -> dict[str, object]:
    document: dict[str, object] = {"message_id": str(event.event_id), "consultation_id": event.consultation}
    if isinstance(result, ProblemType):
        document["problem"] = result.type
        return document
    document["sequence"] = result.sequence
    if result.duplicate:
        document["duplicate"] = True
    return document


def _trace_id(event: Event) -> dict[str, str]:
    return {} if event.trace is None else {"trace_id": event.trace.trace_id}
