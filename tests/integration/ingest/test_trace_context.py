"""Traces at the edge: into the event's message, into the log, and into spans."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import orjson
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from fiq.event import Trace
from services.core.tokens import Scope, Token, digest_of, render
from services.core.tracing import Spans
from services.log.errors import LogUnavailableError
from tests.support.ingest import Edge, MemoryLog, running_edge

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{ID}-{SPAN}-01"
BODY = b'{"event_type":"A","payload":"a secret"}'
PATH = "/consultations/c-1/events"


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


async def test_a_trace_goes_with_the_event(edge: Edge) -> None:
    """Byte for byte: without spans of our own the caller's stays the parent."""
    assert 202 == (await edge.post(traceparent=PARENT, tracestate="a=1,b=2")).status
    assert [Trace(PARENT, "a=1,b=2")] == [event.trace for event in edge.log.events]


@pytest.mark.parametrize("headers", [{}, {"traceparent": "00-nonsense"}, {"tracestate": "a=1"}])
async def test_no_or_no_valid_trace_is_no_trace(edge: Edge, headers: dict[str, Any]) -> None:
    """And no reason to refuse the event, or to say so."""
    with capture_logs() as entries:
        assert 202 == (await edge.post(**headers)).status
    assert [None] == [event.trace for event in edge.log.events]
    assert [False] == ["trace_id" in entry for entry in entries]


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        (f"{PATH}/batch", "application/x-ndjson", BODY + b"\n" + BODY),
        (f"{PATH}/batch", "application/json", b"[" + BODY + b"," + BODY + b"]"),
        ("/events/batch", "application/x-ndjson", b'{"event_type":"A","consultation_id":"c-2"}\n' * 2),
    ],
)
async def test_the_events_of_a_batch_have_the_trace_of_their_request(
    edge: Edge, path: str, kind: str, body: bytes
) -> None:
    """All of them."""
    headers = {"Content-Type": kind, "traceparent": PARENT}
    with capture_logs() as entries:
        assert 202 == (await edge.request("POST", path, data=body, headers=headers)).status
    assert [Trace(PARENT)] * 2 == [event.trace for event in edge.log.events]
    assert [("BATCH_QUEUED", ID)] == [(entry["event"], entry["trace_id"]) for entry in entries]


async def test_a_cloud_event_has_the_trace_of_its_request(edge: Edge) -> None:
    """Structured, as the others."""
    document = {"specversion": "1.0", "id": "1", "source": "/s", "type": "T", "subject": "c-1", "data": {}}
    headers = {"Content-Type": "application/cloudevents+json", "traceparent": PARENT}
    assert 202 == (await edge.request("POST", "/events", data=orjson.dumps(document), headers=headers)).status
    assert [Trace(PARENT)] == [event.trace for event in edge.log.events]


async def test_log_lines_name_the_trace(edge: Edge) -> None:
    """Of what was taken and of what was refused, wherever in the server that was."""
    with capture_logs() as entries:
        await edge.post(traceparent=PARENT)
        await edge.post(body=b"{", traceparent=PARENT)
        await edge.post(consultation="no.id", traceparent=PARENT)
        await edge.post(traceparent=PARENT, Expect="nonsense")
        await edge.request("GET", "/nowhere", headers={"traceparent": PARENT})
    assert ["EVENT_QUEUED", *["REQUEST_REFUSED"] * 4] == [entry["event"] for entry in entries]
    assert [ID] * 5 == [entry["trace_id"] for entry in entries]


async def test_who_is_refused_at_the_gate_finds_the_trace_too(tmp_path: Any) -> None:
    """Without a token, and beyond the rate."""
    tokens = tmp_path / "tokens"
    tokens.write_text(render({"t": Token("t", digest_of("a secret"), frozenset(Scope))}))
    async with running_edge(token_file=str(tokens)) as edge:
        with capture_logs() as entries:
            assert 401 == (await edge.post(traceparent=PARENT)).status
    async with running_edge(rate=0.001, rate_burst=1) as edge:
        await edge.post()
        with capture_logs() as more:
            assert 429 == (await edge.post(traceparent=PARENT)).status
    refused = [entry for entry in [*entries, *more] if entry["event"] == "REQUEST_REFUSED"]
    assert [(401, ID), (429, ID)] == [(entry["status"], entry["trace_id"]) for entry in refused]


async def test_a_retry_under_another_trace_is_the_same_event(edge: Edge) -> None:
    """The trace is how an event came, no part of it."""
    first = await edge.post(Idempotency_Key="k", traceparent=PARENT)
    again = await edge.post(Idempotency_Key="k", traceparent=PARENT.replace(ID, ID[::-1]))
    assert (202, 202, True) == (first.status, again.status, again.json["duplicate"])


# -- spans ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spans() -> Iterator[tuple[Spans, InMemorySpanExporter]]:
    made = recording()
    yield made
    made[0].close()


def recording(**options: Any) -> tuple[Spans, InMemorySpanExporter]:
    """Make spans, and what keeps them."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False, **options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider), exporter


def ids(span: ReadableSpan) -> tuple[str, str]:
    """Return the ids of the trace and of the span."""
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


Recording = tuple[Spans, InMemorySpanExporter]


async def test_a_post_is_a_span_and_its_publish_another(spans: Recording) -> None:
    """Caller, request, publish, message: each the parent of the next."""
    async with running_edge(spans=spans[0]) as edge:
        assert 202 == (await edge.post(body=BODY, traceparent=PARENT, tracestate="a=1")).status
        publish, serve = spans[1].get_finished_spans()
        assert (SpanKind.SERVER, SpanKind.PRODUCER) == (serve.kind, publish.kind)
        assert serve.parent is not None
        assert publish.parent is not None
        assert (SPAN, ids(serve)) == (f"{serve.parent.span_id:016x}", (ID, f"{publish.parent.span_id:016x}"))
        assert [Trace(f"00-{ID}-{ids(publish)[1]}-01", "a=1")] == [event.trace for event in edge.log.events]


async def test_spans_say_what_the_conventions_ask_for_and_nothing_of_the_event(spans: Recording) -> None:
    """Neither payload nor consultation: who may see traces may not see patients."""
    async with running_edge(spans=spans[0]) as edge:
        await edge.post(body=BODY)
        await edge.request(
            "POST", f"{PATH}/batch", data=BODY + b"\n" + BODY, headers={"Content-Type": "application/x-ndjson"}
        )
    publish, serve, batch, _ = spans[1].get_finished_spans()
    assert ("POST /consultations/{consultation}/events", "publish fi-events") == (serve.name, publish.name)
    assert {
        "http.request.method": "POST",
        "http.route": "/consultations/{consultation}/events",
        "http.response.status_code": 202,
    } == serve.attributes
    assert {
        "messaging.system": "nats",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "fi-events",
    } == publish.attributes
    assert batch.attributes is not None
    assert 2 == batch.attributes["messaging.batch.message_count"]
    shown = "".join(span.to_json() for span in spans[1].get_finished_spans())
    # random ids of hexadecimal digits may have "c-1" in them
    assert [] == re.findall(r"secret|(?<![0-9a-f])c-1(?![0-9a-f])", shown)


async def test_without_a_trace_a_span_begins_one(spans: Recording) -> None:
    """The message and the log line belong to it."""
    async with running_edge(spans=spans[0]) as edge:
        with capture_logs() as entries:
            await edge.post()
        publish, serve = spans[1].get_finished_spans()
        assert serve.parent is None
        assert [ids(serve)[0]] == [entry["trace_id"] for entry in entries]
        traces = [event.trace for event in edge.log.events if event.trace is not None]
        assert [(f"00-{'-'.join(ids(publish))}", True)] == [(trace.parent[:-3], trace.sampled) for trace in traces]


async def test_failures_are_errors_without_their_text(spans: Recording) -> None:
    """A client's mistake is none of the server's span (OpenTelemetry's conventions); the broker's trouble is."""
    log = MemoryLog()
    async with running_edge(log, spans=spans[0]) as edge:
        await edge.post(body=b"{")
        log.error = LogUnavailableError("a secret")
        await edge.post()
        await edge.request("POST", "/nowhere")
    refused, publish, failed, nowhere = spans[1].get_finished_spans()
    answers = [(span.attributes or {})["http.response.status_code"] for span in (refused, failed, nowhere)]
    assert [400, 503, 404] == answers
    statuses = [span.status.status_code for span in (refused, publish, failed, nowhere)]
    assert [StatusCode.UNSET, StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET] == statuses
    assert "LogUnavailableError" == (publish.attributes or {})["error.type"]
    assert "secret" not in publish.to_json() + failed.to_json()
    assert ("POST", False) == (nowhere.name, "http.route" in (nowhere.attributes or {}))


async def test_only_posts_make_spans(spans: Recording) -> None:
    """Readers and probes come far more often than anybody wants to see them."""
    async with running_edge(spans=spans[0]) as edge:
        await edge.request("GET", PATH)
    assert () == spans[1].get_finished_spans()


async def test_what_is_not_sampled_is_handed_on_as_not_sampled() -> None:
    """Those behind this service need not record it either; the trace is the caller's still."""
    made, exporter = recording(sampler=ALWAYS_OFF)
    async with running_edge(spans=made) as edge:
        await edge.post(traceparent=PARENT)
        traces = [event.trace for event in edge.log.events if event.trace is not None]
        assert [(ID, False)] == [(trace.trace_id, trace.sampled) for trace in traces]
    assert () == exporter.get_finished_spans()
    made.close()


async def test_the_spans_of_two_requests_do_not_mix(spans: Recording) -> None:
    """Each trace has its own two spans."""
    async with running_edge(spans=spans[0]) as edge:
        await edge.post(traceparent=PARENT)
        await edge.post()
    traces = [ids(span)[0] for span in spans[1].get_finished_spans()]
    assert [2, 2] == [len(list(group)) for _, group in itertools.groupby(traces)]
