"""Traces at the HTTP edge: what a request belongs to, and spans for whoever wants them."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from services.contract.event import Event
from services.contract.trace import PARENT_HEADER, STATE_HEADER, Spans, Trace, read_trace
from services.eventlog.jetstream.names import STREAM
from services.eventlog.protocol import Appended, EventWriter

#: the trace of a request for which there is a span
TRACE = web.RequestKey("trace", Trace)


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
        """Store *event*; see :meth:`services.eventlog.protocol.EventWriter.append`."""
        with self._spans.publishing(STREAM, event.trace) as trace:
            return await self._writer.append(dataclasses.replace(event, trace=trace))

    async def append_batch(self, events: Sequence[Event]) -> list[Appended]:
        """Store *events* of one request; see :meth:`services.eventlog.protocol.EventWriter.append_batch`."""
        with self._spans.publishing(STREAM, events[0].trace, events=len(events)) as trace:
            return await self._writer.append_batch([dataclasses.replace(event, trace=trace) for event in events])
