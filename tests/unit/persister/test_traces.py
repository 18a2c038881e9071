"""Traces of what was committed: lines that find an event, and links from the batch's span."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from structlog.testing import capture_logs

from services.core.tracing import MAX_LINKS, Spans
from services.log.protocol import Delivery
from services.persister.metrics import MAX_TRACE_LINES
from services.persister.partition import RunnerState
from tests.support.persister import Rig, Stream, delivery, poison, reusing, rig


def trace_id(number: int) -> str:
    return f"{number:032x}"


def parent(number: int, flags: str = "01") -> str:
    return f"00-{trace_id(number)}-{number:016x}-{flags}"


def traced(made: Delivery, traceparent: str) -> Delivery:
    """Return *made* with the header."""
    headers = dict(made.headers or {}) | {"traceparent": traceparent}
    return Delivery(made.sequence, made.consultation, headers, made.body, made.token)


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def part(tmp_path: Path, stream: Stream, exporter: InMemorySpanExporter) -> AsyncIterator[Rig]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans(provider)
    async with rig(tmp_path, stream, spans=spans) as made:
        yield made
    spans.close()


async def persist(part: Rig, deliveries: Sequence[Delivery]) -> list[dict[str, Any]]:
    """Persist *deliveries* as one batch, and return the lines of the log."""
    with capture_logs() as entries:
        part.stream.add(*deliveries)
        part.runner.start()
        await part.be(RunnerState.FOLLOWING)
        await part.reach(deliveries[-1].sequence)
        await part.runner.stop()
    return [dict(entry) for entry in entries]


def named(entries: Sequence[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["event"] == event]


async def test_an_event_is_found_by_its_trace(part: Rig) -> None:
    """Where it is in HDF5: consultation, id and sequence, in the partition's own log."""
    made = traced(delivery(7), parent(1))
    (line,) = named(await persist(part, [made]), "EVENT_TRACED")
    wanted = {"trace_id": trace_id(1), "consultation_id": "c1", "sequence": 7, "events": 1, "partition": "00"}
    assert wanted == {key: line[key] for key in wanted}
    assert f"c1/{line['message_id']}" == (made.headers or {})["Nats-Msg-Id"]
    assert "body" not in str(line)


async def test_events_of_one_trace_are_one_line(part: Rig) -> None:
    """A batch over HTTP has one trace: its first event, and how many more there are."""
    lines = named(await persist(part, [traced(delivery(n), parent(1)) for n in (1, 2, 3)]), "EVENT_TRACED")
    assert [(1, 3)] == [(line["sequence"], line["events"]) for line in lines]


@pytest.mark.parametrize("header", [None, parent(1, "00"), "00-nonsense"])
async def test_a_trace_that_was_not_sampled_gets_no_line(part: Rig, header: str | None) -> None:
    """Without a trace, with one that is not sampled, and with one that is none; the event is persisted anyway."""
    made = delivery(1) if header is None else traced(delivery(1), header)
    entries = await persist(part, [made])
    assert ([], 1) == (named(entries, "EVENT_TRACED"), named(entries, "EVENT_PERSISTED")[0]["persisted"])


async def test_the_lines_of_a_batch_are_bounded(part: Rig) -> None:
    """Thousands of events may be committed at once; the number of omitted traces is logged."""
    entries = await persist(part, [traced(delivery(n), parent(n)) for n in range(1, MAX_TRACE_LINES + 6)])
    lines = named(entries, "EVENT_TRACED")
    assert [trace_id(n) for n in range(1, MAX_TRACE_LINES + 1)] == [line["trace_id"] for line in lines]
    assert [5] == [entry["traces"] for entry in named(entries, "TRACES_LEFT_OUT")]


async def test_what_is_set_aside_is_found_by_its_trace_there(part: Rig) -> None:
    """It is not in HDF5, so no line claims that."""
    bad = [traced(poison(2, {}), parent(2)), traced(reusing(3, of=1, body=b'{"event_type":"X"}'), parent(3))]
    entries = await persist(part, [traced(delivery(1), parent(1)), *bad])
    assert [trace_id(1)] == [entry["trace_id"] for entry in named(entries, "EVENT_TRACED")]
    assert [trace_id(2)] == [entry["trace_id"] for entry in named(entries, "EVENT_SET_ASIDE")]
    assert [trace_id(3)] == [entry["trace_id"] for entry in named(entries, "EVENT_KEYS_REUSED")]


async def test_an_event_that_comes_again_under_another_trace_is_a_duplicate(part: Rig) -> None:
    """Bodies are compared, headers are not."""
    again = [traced(delivery(1), parent(1)), traced(delivery(2, of=1), parent(2))]
    (line,) = named(await persist(part, again), "EVENT_PERSISTED")
    assert (1, 1, 0) == (line["persisted"], line["duplicates"], line["dead"])


async def test_a_batch_is_a_span_with_links_to_its_traces(part: Rig, exporter: InMemorySpanExporter) -> None:
    """A root of its own, since it has many causes; those that are not sampled have no span to link to."""
    await persist(part, [traced(delivery(1), parent(1)), traced(delivery(2), parent(2, "00")), delivery(3)])
    (span,) = exporter.get_finished_spans()
    assert (SpanKind.CONSUMER, None, "persist fi-events") == (span.kind, span.parent, span.name)
    assert [(1, 1)] == [(link.context.trace_id, link.context.span_id) for link in span.links]
    assert {
        "messaging.system": "nats",
        "messaging.operation.name": "persist",
        "messaging.operation.type": "process",
        "messaging.destination.name": "fi-events",
        "messaging.destination.partition.id": "00",
        "messaging.batch.message_count": 3,
    } == span.attributes
    assert 0 < (span.end_time or 0) - (span.start_time or 0) < 60e9


async def test_the_links_of_a_batch_are_bounded(part: Rig, exporter: InMemorySpanExporter) -> None:
    """And those of one request count once."""
    made = [traced(delivery(n), parent(max(1, n - 5))) for n in range(1, 100)]
    await persist(part, made)
    (span,) = exporter.get_finished_spans()
    assert list(range(1, MAX_LINKS + 1)) == [link.context.trace_id for link in span.links]
