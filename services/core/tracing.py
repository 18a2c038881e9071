"""Traces of requests, and spans of OpenTelemetry when its variables ask for them: ``pip install fiq[tracing]``.

A request's trace (W3C Trace Context) goes with its events through the log and into log lines, spans or not. Spans hold
no payload, no error's text and no consultation's id. Without the variables nothing of OpenTelemetry is imported, which
is why its imports are inside the functions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web

from fiq.errors import ConfigurationError
from fiq.event import PARENT_HEADER, STATE_HEADER, Trace, read_trace
from services.core.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanContext, SpanKind
    from opentelemetry.util.types import AttributeValue

EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"
DISABLED_VARIABLE = "OTEL_SDK_DISABLED"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
#: the only supported exporter: OTLP over HTTP
OTLP = "otlp"
#: links from a batch's span to the spans of its events
MAX_LINKS = 64
#: spans that are not exported yet get this long at the end, seconds
CLOSE_SECONDS = 3.0

#: the trace of a request that has a span
REQUEST_TRACE = web.RequestKey("trace", Trace)


def trace_of(request: web.BaseRequest) -> Trace | None:
    """Return the trace that *request* and its events belong to; None without one."""
    if REQUEST_TRACE in request:
        return request[REQUEST_TRACE]
    parents = request.headers.getall(PARENT_HEADER, None)
    return None if parents is None else read_trace(parents, request.headers.getall(STATE_HEADER, ()))


@contextmanager
def open_spans(service: str, env: Mapping[str, str]) -> Iterator[Spans | None]:
    """Yield what makes the spans of *service*; None when *env* asks for none or the packages are not installed.

    Raises ConfigurationError: *env* asks for an exporter that is not supported.
    """
    spans = _exporting(service) if _wanted(env) else None
    try:
        yield spans
    finally:
        if spans is not None:
            spans.close()


def _wanted(env: Mapping[str, str]) -> bool:
    exporter = env.get(EXPORTER_VARIABLE, "").strip().lower()
    if env.get(DISABLED_VARIABLE, "").strip().lower() == "true" or exporter == "none":
        return False
    if exporter not in ("", OTLP):
        raise ConfigurationError([f"{EXPORTER_VARIABLE}={exporter!r}: expected {OTLP} or none"])
    return bool(exporter) or any(env.get(name, "").strip() for name in ENDPOINT_VARIABLES)


def _exporting(service: str) -> Spans | None:
    """Return what sends the spans of *service* over OTLP, as OpenTelemetry's own variables say."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        get_logger("tracing").warning("TRACING_OFF", reason="pip install fiq[tracing]", missing=error.name)
        return None
    detected = OTELResourceDetector().detect()
    resource = Resource.create({} if "service.name" in detected.attributes else {"service.name": service})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider)


class RequestSpan(NamedTuple):
    """The span of a request; *trace* is for what the request leads to."""

    trace: Trace
    span: Span

    def answered(self, status: int) -> None:
        """Note the answer's *status*."""
        self.span.set_attribute("http.response.status_code", status)
        if status >= 500:
            _fail(self.span, str(status))


class Spans:
    """Makes spans with *provider*, which it shuts down at its end."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("fiq")

    @contextmanager
    def serving(self, method: str, route: str | None, trace: Trace | None) -> Iterator[RequestSpan]:
        """Make a span around the handling of a request.

        Args:
            method: of HTTP.
            route: the path's template; None for an unknown path.
            trace: that the request names.
        """
        from opentelemetry.trace import SpanKind

        attributes: dict[str, AttributeValue] = {"http.request.method": method}
        if route is not None:
            attributes["http.route"] = route
        name = method if route is None else f"{method} {route}"
        with self._span(name, SpanKind.SERVER, attributes, trace) as span:
            yield RequestSpan(_trace_of_span(span), span)

    @contextmanager
    def publishing(self, destination: str, trace: Trace | None, *, events: int | None = None) -> Iterator[Trace]:
        """Make a span around the publishing of one event, or of a batch of *events*; yield the trace for its messages.

        Args:
            destination: the stream.
            trace: of the request.
            events: of the batch; None for a single one.
        """
        from opentelemetry.trace import SpanKind

        attributes = _messaging("publish", "send", destination)
        if events is not None:
            attributes["messaging.batch.message_count"] = events
        with self._span(f"publish {destination}", SpanKind.PRODUCER, attributes, trace) as span:
            yield _trace_of_span(span)

    def persisted(
        self, destination: str, partition: str, traces: Sequence[Trace], *, events: int, seconds: float
    ) -> None:
        """Make a span of a batch that was committed just now, with links to its events' spans.

        Args:
            destination: the stream that it came from.
            partition: of the stream.
            traces: of its events.
            events: of the batch.
            seconds: that it took.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, SpanKind

        attributes = _messaging("persist", "process", destination) | {
            "messaging.destination.partition.id": partition,
            "messaging.batch.message_count": events,
        }
        end = time.time_ns()
        self._tracer.start_span(
            f"persist {destination}",
            Context(),
            SpanKind.CONSUMER,
            attributes,
            links=[Link(_context_of(trace)) for trace in list(dict.fromkeys(traces))[:MAX_LINKS]],
            start_time=end - int(seconds * 1e9),
        ).end(end)

    def close(self) -> None:
        """Export what is left, within a few seconds even when the collector does not answer. Idempotent."""
        end = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        end.start()
        end.join(CLOSE_SECONDS)

    @contextmanager
    def _span(
        self, name: str, kind: SpanKind, attributes: dict[str, AttributeValue], trace: Trace | None
    ) -> Iterator[Span]:
        from opentelemetry.context import Context
        from opentelemetry.trace import NonRecordingSpan, set_span_in_context

        context = Context() if trace is None else set_span_in_context(NonRecordingSpan(_context_of(trace)), Context())
        span = self._tracer.start_span(name, context, kind, attributes)
        try:
            yield span
        except BaseException as error:
            _fail(span, type(error).__name__)  # not its text, which could quote data
            raise
        finally:
            span.end()


def _messaging(name: str, kind: str, destination: str) -> dict[str, AttributeValue]:
    return {
        "messaging.system": "nats",
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.destination.name": destination,
    }


def _fail(span: Span, kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def _context_of(trace: Trace) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    return SpanContext(
        int(trace.trace_id, 16),
        int(trace.parent[36:52], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(trace.parent[-2:], 16)),
        trace_state=TraceState.from_header([trace.state]) if trace.state else None,
    )


def _trace_of_span(span: Span) -> Trace:
    context = span.get_span_context()
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    trace = read_trace((parent,), (context.trace_state.to_header(),))
    assert trace is not None
    return trace
