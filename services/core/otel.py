"""Spans of OpenTelemetry; imported only when they are asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TraceFlags, TraceState
from opentelemetry.trace import set_span_in_context as span_in_context
from opentelemetry.util.types import AttributeValue

from fiq.trace import Trace, read_trace

#: a batch's span has links to so many spans at most
MAX_LINKS = 64
#: what waits to be sent gets this long at the end, seconds
CLOSE_SECONDS = 3.0

_Attributes = dict[str, AttributeValue]
_SYSTEM: _Attributes = {"messaging.system": "nats"}


@dataclass(slots=True)
class OtelServing:
    """A request that is being served; see :class:`services.core.tracing.Serving`."""

    trace: Trace
    span: Span

    def answered(self, status: int) -> None:
        """Note the answer's *status*."""
        self.span.set_attribute("http.response.status_code", status)
        if status >= 500:
            _fail(self.span, str(status))


class OtelSpans:
    """Makes spans; see :class:`services.core.tracing.Spans`. The provider is its own from now on."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("fiq")

    @contextmanager
    def serving(self, method: str, route: str | None, trace: Trace | None) -> Iterator[OtelServing]:
        """Make a span around the handling of a request."""
        attributes: _Attributes = {"http.request.method": method}
        if route is not None:
            attributes["http.route"] = route
        name = method if route is None else f"{method} {route}"
        with self._span(name, SpanKind.SERVER, attributes, trace) as span:
            yield OtelServing(_trace_of(span), span)

    @contextmanager
    def publishing(self, destination: str, trace: Trace | None, *, events: int | None = None) -> Iterator[Trace]:
        """Make a span around the publishing of one event, or of a batch."""
        attributes: _Attributes = _SYSTEM | {
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
            "messaging.destination.name": destination,
        }
        if events is not None:
            attributes["messaging.batch.message_count"] = events
        with self._span(f"publish {destination}", SpanKind.PRODUCER, attributes, trace) as span:
            yield _trace_of(span)

    def persisted(
        self, destination: str, partition: str, traces: Sequence[Trace], *, events: int, seconds: float
    ) -> None:
        """Make a span of a batch that was committed just now."""
        attributes: _Attributes = _SYSTEM | {
            "messaging.operation.name": "persist",
            "messaging.operation.type": "process",
            "messaging.destination.name": destination,
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
        """Send what there is, within a few seconds, and make no more: a collector that is away holds nothing up."""
        end = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        end.start()
        end.join(CLOSE_SECONDS)

    @contextmanager
    def _span(self, name: str, kind: SpanKind, attributes: _Attributes, trace: Trace | None) -> Iterator[Span]:
        context = Context() if trace is None else span_in_context(NonRecordingSpan(_context_of(trace)), Context())
        span = self._tracer.start_span(name, context, kind, attributes)
        try:
            yield span
        except BaseException as error:
            _fail(span, type(error).__name__)  # not its text, which could quote data
            raise
        finally:
            span.end()


def exporting(service: str) -> OtelSpans:
    """Return what sends the spans of *service* over OTLP, by OpenTelemetry's own variables."""
    detected = OTELResourceDetector().detect()
    resource = Resource.create({} if "service.name" in detected.attributes else {"service.name": service})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelSpans(provider)


def _fail(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def _context_of(trace: Trace) -> SpanContext:
    return SpanContext(
        int(trace.trace_id, 16),
        int(trace.parent[36:52], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(trace.parent[-2:], 16)),
        trace_state=TraceState.from_header([trace.state]) if trace.state else None,
    )


def _trace_of(span: Span) -> Trace:
    context = span.get_span_context()
    parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    trace = read_trace((parent,), (context.trace_state.to_header(),))
    assert trace is not None
    return trace
