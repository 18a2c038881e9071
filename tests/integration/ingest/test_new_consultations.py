"""A token begins a bounded number of consultations; posts to known ones go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from fiq.event import Event
from services.ingest import admission as admission_module
from services.log.protocol import SequencedEvent
from tests.support.ingest import Edge, MemoryReader, running_edge

REFUSED = (429, "/problems/too-many-new-consultations")
KEYED = {"data": b'{"event_type":"A"}', "headers": {"Idempotency-Key": "k", "Content-Type": "application/json"}}


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge(new_consultations_rate=0.001, new_consultations_burst=2) as edge:
        yield edge


@pytest.fixture
def reader(edge: Edge) -> MemoryReader:
    return edge.log.reader


async def use_up(edge: Edge) -> None:
    """Begin as many consultations as a token may."""
    for number in range(3):
        assert 202 == (await edge.post(f"first-{number}")).status


def persist(reader: MemoryReader, consultation: str) -> None:
    """Let the corpus hold an event of *consultation*."""
    event = Event(consultation, UUID(int=7), 0, b"{}")
    reader.corpus.append(SequencedEvent(1000, event, written_ns=2))


async def test_beyond_the_limit_new_consultations_are_refused_and_known_ones_are_not(edge: Edge) -> None:
    """With its own problem and Retry-After; nothing was stored."""
    await use_up(edge)
    stored = len(edge.log.events)
    for reply in (await edge.post("other"), await edge.request("POST", "/consultations/o/events", **KEYED)):
        assert REFUSED == (reply.status, reply.json["type"])
        assert int(reply.headers["Retry-After"]) > 500
    assert stored == len(edge.log.events)
    assert [202, 202, 202] == [(await edge.post(f"first-{number}")).status for number in range(3)]


async def test_a_consultation_that_the_corpus_holds_is_known(edge: Edge, reader: MemoryReader) -> None:
    """After a restart the process remembers none; it asks only when the limit is used up."""
    persist(reader, "old")
    await use_up(edge)
    assert "snapshot" not in reader.asked
    assert 202 == (await edge.post("old")).status
    assert 1 == reader.asked.count("snapshot")
    assert 202 == (await edge.post("old")).status
    assert 1 == reader.asked.count("snapshot")


async def test_without_an_answer_the_event_is_accepted(edge: Edge, reader: MemoryReader) -> None:
    """Intake comes first; the backlog bounds what persisters that are away would have to write."""
    await use_up(edge)
    reader.silent = True
    assert 202 == (await edge.post("other")).status


async def test_a_batch_is_refused_as_a_whole(edge: Edge, reader: MemoryReader) -> None:
    """If any of its consultations is new."""
    persist(reader, "old")
    await use_up(edge)
    stored = len(edge.log.events)

    async def post(*names: str) -> tuple[int, object]:
        lines = b"\n".join(b'{"event_type":"A","consultation_id":"%b"}' % name.encode() for name in names)
        reply = await edge.request(
            "POST", "/events/batch", data=lines, headers={"Content-Type": "application/x-ndjson"}
        )
        return reply.status, reply.json.get("type")

    assert REFUSED == await post("old", "new", "first-1")
    assert stored == len(edge.log.events)
    assert (202, None) == await post("old", "first-1")


async def test_what_was_not_used_for_long_is_forgotten(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """So memory is bounded; it then counts as new if the corpus does not hold it."""
    monkeypatch.setattr(admission_module, "REMEMBERED_CONSULTATIONS", 2)
    await use_up(edge)
    assert 429 == (await edge.post("first-0")).status
    assert 202 == (await edge.post("first-2")).status


async def test_a_rate_of_zero_is_no_limit() -> None:
    """For imports."""
    async with running_edge(new_consultations_rate=0.0, new_consultations_burst=1) as edge:
        assert {202} == {(await edge.post(f"c-{number}")).status for number in range(5)}
