"""Build, count and log every answer of the event resource: one canonical line a request."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import orjson
from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware
from multidict import CIMultiDict

from fiq.event import Event
from fiq.trace import PARENT_HEADER, STATE_HEADER, Trace, read_trace
from services.core.logs import BATCH_QUEUED, EVENT_QUEUED, get_logger
from services.core.tracing import Spans
from services.ingest import problems
from services.ingest.admission import Lines
from services.ingest.batch import Line
from services.ingest.metrics import Metrics
from services.ingest.problems import CONTENT_TYPE, Problem
from services.log.protocol import EVENT_LOG, Appended, EventWriter

#: the trace of a request for which there is a span
TRACE = web.RequestKey("trace", Trace)
#: what the Server header says: not which library in which version
SERVER = "fiq"
#: decimals of seconds in log lines: microseconds
_DECIMALS = 6
_REUSED_IN_BATCH = "Each of lines names one whose key is another event's; results says where the others are stored."


def trace_of(request: web.BaseRequest) -> Trace | None:
    """Return the trace of which *request*, and what it leads to, is a part; None when it names none."""
    if TRACE in request:
        return request[TRACE]
    parents = request.headers.getall(PARENT_HEADER, None)
    if parents is None:
        return None
    return read_trace(parents, request.headers.getall(STATE_HEADER, ()))


def trace_id_of(request: web.BaseRequest) -> str | None:
    """Return the id of the trace of *request*, for a log line; None when it names none."""
    trace = trace_of(request)
    return None if trace is None else trace.trace_id


def serving_spans(spans: Spans) -> Middleware:
    """Return what makes a span of each POST, and its trace that of the request."""

    @web.middleware
    async def serve(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.method != hdrs.METH_POST:
            return await handler(request)
        resource = request.match_info.route.resource
        route = None if resource is None else resource.canonical
        with spans.serving(request.method, route, trace_of(request)) as serving:
            request[TRACE] = serving.trace
            try:
                response = await handler(request)
            except web.HTTPException as answer:  # the router's 404 and 405, which are no failures of this side
                response = answer
            serving.answered(response.status)
        if isinstance(response, web.HTTPException):
            raise response
        return response

    return serve


class TracedWriter(EventWriter):
    """Makes a span of each append, and its trace that of the events."""

    def __init__(self, writer: EventWriter, spans: Spans) -> None:
        self._writer = writer
        self._spans = spans

    async def append(self, event: Event) -> Appended:
        """Store *event*; see :meth:`services.log.protocol.EventWriter.append`."""
        with self._spans.publishing(EVENT_LOG, event.trace) as trace:
            return await self._writer.append(dataclasses.replace(event, trace=trace))

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        """Store *events* of one request; see :meth:`services.log.protocol.EventWriter.append_batch`."""
        with self._spans.publishing(EVENT_LOG, events[0].trace, events=len(events)) as trace:
            return await self._writer.append_batch([dataclasses.replace(event, trace=trace) for event in events])


class Answers:
    """Makes the answers of one process.

    Attributes:
        closing: close each connection with its answer, because the service is stopping.
        in_flight: events that are being read or stored just now.
    """

    def __init__(self, metrics: Metrics, *, retry_after: Callable[[Problem], float]) -> None:
        self.closing = False
        self.in_flight = 0
        self._metrics = metrics
        self._retry_after = retry_after
        self._log = get_logger("ingest").bind()
        self._lines = Lines()
        self._idle = asyncio.Event()
        metrics.in_flight.set_function(lambda: self.in_flight)

    def enter(self) -> None:
        """Count a request as in flight."""
        self.in_flight += 1

    def leave(self) -> None:
        """Count a request as done."""
        self.in_flight -= 1
        if not self.in_flight and self.closing:
            self._idle.set()

    async def drain(self, grace: float) -> None:
        """Wait at most *grace* seconds until nothing is in flight; from now on each answer closes its connection."""
        self.closing = True
        await asyncio.sleep(0)  # requests that have been parsed get to their handler
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self.in_flight:
                    self._idle.clear()
                    await self._idle.wait()

    def accepted(self, event: Event, appended: Appended, started: float) -> web.Response:
        """Answer 202: *event* is safe. *started* is when the request came, on :func:`time.perf_counter`."""
        document = {"status": "accepted", **_result(event, appended)}
        message_id = document["message_id"]
        duration = self._accepted(started)
        self._log.info(
            EVENT_QUEUED,
            consultation_id=event.consultation,
            message_id=message_id,
            sequence=appended.sequence,
            duplicate=appended.duplicate,
            bytes=len(event.body),
            duration_s=round(duration, _DECIMALS),
            **_traced(event),
        )
        headers = CIMultiDict(
            {
                "Content-Type": "application/json",
                "Location": f"/consultations/{event.consultation}/events/{message_id}",
                "Server": SERVER,
            }
        )
        return self._finish(web.Response(status=202, body=orjson.dumps(document), headers=headers))

    def batch_accepted(
        self, lines: Sequence[Line], outcomes: Sequence[Appended | Problem], started: float
    ) -> web.Response:
        """Answer 202, or 422 when some line's key means another event: what became of each line, in their order.

        Args:
            lines: of the batch.
            outcomes: of the lines; a problem says that another event is stored under the key.
            started: when the request came, on :func:`time.perf_counter`.
        """
        results = [_result(line.event, outcome) for line, outcome in zip(lines, outcomes, strict=True)]
        stored = [outcome for outcome in outcomes if isinstance(outcome, Appended)]
        self._log.info(
            BATCH_QUEUED,
            consultation_id=_common(lines),
            events=len(lines),
            duplicates=sum(outcome.duplicate for outcome in stored),
            reused=len(lines) - len(stored),
            sequence=max((outcome.sequence for outcome in stored), default=None),
            bytes=sum(len(line.event.body) for line in lines),
            duration_s=round(time.perf_counter() - started, _DECIMALS),
            **_traced(lines[0].event),
        )
        if len(stored) < len(lines):
            reused = [
                {"line": line.number, "reason": outcome.detail}
                for line, outcome in zip(lines, outcomes, strict=True)
                if isinstance(outcome, Problem)
            ]
            members = {"lines": reused, "results": results}
            return self.refused(
                problems.IDEMPOTENCY_KEY_REUSED,
                _REUSED_IN_BATCH,
                members=members,
                started=started,
                trace_id=_traced(lines[0].event).get("trace_id"),
            )
        self._accepted(started)
        document = {"status": "accepted", "results": results}
        headers = CIMultiDict({"Content-Type": "application/json", "Server": SERVER})
        return self._finish(web.Response(status=202, body=orjson.dumps(document), headers=headers))

    def _accepted(self, started: float) -> float:
        """Count an answer 202 and return how long it took, seconds."""
        duration = time.perf_counter() - started
        self._metrics.accepted.inc()
        self._metrics.duration.observe(duration)
        return duration

    def refused(
        self,
        problem: Problem,
        detail: str | None = None,
        *,
        members: Mapping[str, object] | None = None,
        started: float | None = None,
        headers: Mapping[str, str] | None = None,
        consultation: str | None = None,
        trace_id: str | None = None,
    ) -> web.Response:
        """Answer with *problem*.

        Args:
            problem: what went wrong.
            detail: says more than the problem's own detail; must not quote the request.
            members: of the document besides the standard ones; must not quote the request.
            started: when the request came, on :func:`time.perf_counter`; None for what never was an event.
            headers: further headers of the answer.
            consultation: the consultation's id, once it is known to be one.
            trace_id: of the trace that the request belongs to, if any.
        """
        values: dict[str, object] = {"status": problem.status, "problem": problem.slug}
        self._metrics.refused[problem].inc()
        if started is not None:
            duration = time.perf_counter() - started
            self._metrics.duration.observe(duration)
            values["duration_s"] = round(duration, _DECIMALS)
        if consultation is not None:
            values["consultation_id"] = consultation
        if trace_id is not None:
            values["trace_id"] = trace_id
        told = self._lines.told(problem.slug)
        if told is not None:
            self._log.warning("REQUEST_REFUSED", **values, **told)
        all_headers = CIMultiDict({"Content-Type": CONTENT_TYPE, "Server": SERVER})
        if problem.retry:
            all_headers["Retry-After"] = str(math.ceil(self._retry_after(problem)))
        if headers:
            all_headers.update(headers)
        response = web.Response(status=problem.status, body=problem.render(detail, members), headers=all_headers)
        return self._finish(response, close=problem.close)

    def failed(self, error: BaseException) -> None:
        """Log an unexpected *error*: its class and where it arose, never its text, which could quote a body."""
        frames = []
        traceback = error.__traceback__
        while traceback is not None:
            code = traceback.tb_frame.f_code
            frames.append(f"{code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno} {code.co_name}")
            traceback = traceback.tb_next
        self._log.error("REQUEST_FAILED", error=type(error).__name__, frames=frames)

    def log_refused(self, reason: str) -> None:
        """Log why the log refuses for good; the broker's *reason* says what an operator must change."""
        told = self._lines.told("LOG_REFUSED")
        if told is not None:
            self._log.error("LOG_REFUSED", reason=reason, **told)

    def _finish(self, response: web.Response, *, close: bool = False) -> web.Response:
        if close or self.closing:
            response.force_close()
        return response


def _traced(event: Event) -> dict[str, str]:
    """Return what a log line says of *event*'s trace, if it has one."""
    return {} if event.trace is None else {"trace_id": event.trace.trace_id}


def _result(event: Event, outcome: Appended | Problem) -> dict[str, object]:
    """Return what a client is told of one event."""
    result: dict[str, object] = {"message_id": str(event.event_id), "consultation_id": event.consultation}
    if isinstance(outcome, Problem):
        result["problem"] = outcome.type
        return result
    result["sequence"] = outcome.sequence
    if outcome.duplicate:
        result["duplicate"] = True
    return result


def _common(lines: Sequence[Line]) -> str | None:
    """Return the consultation of all lines, or None when they belong to several."""
    first, *others = {line.event.consultation for line in lines}
    return None if others else first
