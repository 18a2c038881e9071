"""POST …/events/batch: all lines are stored, or the client learns which were not and why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import orjson
import pytest

from fiq.event import Event, event_id_from_key
from services.log.errors import LogFullError, LogUnavailableError
from tests.support.ingest import Edge, Reply, running_edge
from tests.support.polling import eventually

NDJSON = "application/x-ndjson"
JSON = "application/json"
PATH = "/consultations/c-1/events/batch"


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


async def post(edge: Edge, body: bytes, kind: str = NDJSON, path: str = PATH, key: str | None = None) -> Reply:
    headers = {"Content-Type": kind} | ({} if key is None else {"Idempotency-Key": key})
    return await edge.request("POST", path, data=body, headers=headers)


def line(payload: object = 1, **members: str) -> bytes:
    return orjson.dumps({"event_type": "A", "payload": payload, **members})


def slug(reply: Reply) -> tuple[int, str]:
    assert reply.headers["Content-Type"] == "application/problem+json"
    return reply.status, reply.json["type"].removeprefix("/problems/")


def stored(edge: Edge) -> list[bytes]:
    return [event.body for event in edge.log.events]


async def test_the_lines_of_a_batch_are_stored_in_their_order(edge: Edge) -> None:
    """In one append, byte for byte, with a result for each."""
    bodies = [b'{"event_type":"A", "n": 1.10}', b'{"event_type":"B"}', b'{ "event_type":"\\u0043" }']
    reply = await post(edge, b"\n".join(bodies))

    ids = [str(event.event_id) for event in edge.log.events]
    results = [
        {"message_id": event_id, "consultation_id": "c-1", "sequence": sequence}
        for sequence, event_id in enumerate(ids, start=1)
    ]
    assert (202, {"status": "accepted", "results": results}) == (reply.status, reply.json)
    assert bodies == stored(edge)
    assert [3] == edge.log.batches
    assert {7} == {UUID(event_id).version for event_id in ids}


async def test_an_array_keeps_the_bytes_of_its_elements(edge: Edge) -> None:
    """Nothing is parsed and written anew: numbers, escapes, order and white space stay."""
    bodies = [b'{"event_type":"A","n":1.10,"s":"[,]\\"{"}', b'{ "event_type" : "B",\n "x": [1,\t{"a":[]}]}']
    await post(edge, b"[ " + b" ,\n ".join(bodies) + b"\n]", JSON)

    assert [bodies[0], bodies[1].replace(b"\n", b" ")] == stored(edge)


async def test_lines_end_with_lf_or_cr_lf_and_empty_ones_only_count(edge: Edge) -> None:
    """Line numbers are those of an editor; the key of a line follows from its number."""
    reply = await post(edge, b"\n" + line(1) + b"\r\n\r\n" + line(2) + b"\n", key="k")

    assert [line(1), line(2)] == stored(edge)
    assert [str(event_id_from_key(f"k:{number}")) for number in (2, 4)] == [
        result["message_id"] for result in reply.json["results"]
    ]


async def test_a_lines_own_key_is_its_event_id_member(edge: Edge) -> None:
    """Any form of an idempotency key; it stays in the body as it came."""
    uuid = "aa4d205e-3bfa-81b2-8bc0-91f8ffe555a3"
    reply = await post(edge, line(1, event_id=uuid) + b"\n" + line(2, event_id="visit-7") + b"\n" + line(3), key='"k"')

    expected = [uuid, str(event_id_from_key("visit-7")), str(event_id_from_key("k:3"))]
    assert expected == [result["message_id"] for result in reply.json["results"]]
    assert line(1, event_id=uuid) == stored(edge)[0]


async def test_a_batch_that_is_sent_again_is_answered_like_the_first_time(edge: Edge) -> None:
    """With each result marked; nothing is stored twice."""
    body = line(1) + b"\n" + line(2)
    first = await post(edge, body, key="k")
    again = await post(edge, body, key="k")

    marked = [result | {"duplicate": True} for result in first.json["results"]]
    assert (202, marked) == (again.status, again.json["results"])
    assert len(edge.log.events) == 2
    assert edge.metric("fi_ingest_duplicates_total") == 2.0


async def test_a_line_can_be_sent_again_by_itself(edge: Edge) -> None:
    """As a single event with the key of its line."""
    await post(edge, line(1) + b"\n" + line(2), key="k")
    reply = await edge.post("c-1", line(2), Idempotency_Key="k:2")

    assert (202, 2, True) == (reply.status, reply.json["sequence"], reply.json["duplicate"])


async def test_new_lines_among_known_ones_are_stored(edge: Edge) -> None:
    """Results in the order of the lines."""
    await post(edge, line(2, event_id="b"))
    reply = await post(edge, b"\n".join(line(n, event_id=key) for n, key in ((1, "a"), (2, "b"), (3, "c"))))

    results = [(result["sequence"], result.get("duplicate", False)) for result in reply.json["results"]]
    assert (202, [(2, False), (1, True), (3, False)]) == (reply.status, results)


async def test_lines_whose_key_means_another_event_are_named_and_the_others_stored(edge: Edge) -> None:
    """422, with what became of every line: nothing is lost without a word."""
    await post(edge, line(2, event_id="b"))
    reply = await post(edge, b"\n".join(line(n, event_id=key) for n, key in ((1, "a"), (9, "b"), (3, "c"))))

    assert (422, "idempotency-key-reused") == slug(reply)
    assert [2] == [wrong["line"] for wrong in reply.json["lines"]]
    results = [result.get("sequence") or result["problem"] for result in reply.json["results"]]
    assert [2, "/problems/idempotency-key-reused", 3] == results
    assert [line(2, event_id="b"), line(1, event_id="a"), line(3, event_id="c")] == stored(edge)


async def test_the_same_line_twice_is_one_event(edge: Edge) -> None:
    """The second one is a duplicate of the first."""
    reply = await post(edge, b"\n".join([line(1, event_id="a"), line(2, event_id="b"), line(1, event_id="a")]))

    results = [(result["sequence"], result.get("duplicate", False)) for result in reply.json["results"]]
    assert (202, [(1, False), (2, False), (1, True)]) == (reply.status, results)


async def test_lines_that_are_no_events_are_named_and_nothing_is_stored(edge: Edge) -> None:
    """Each with its reason, none with its content."""
    lines = [
        line(1),
        b'{"event_type": "secret"',
        b'["secret"]',
        b'{"payload": "secret"}',
        b'{"event_type":"A","event_id":7}',
        b'{"event_type":"A","event_id":"sec ret"}',
        b'{"event_type":"A","consultation_id":"c-2"}',
        b'{"event_type":"A","consultation_id":"secret."}',
        line(1, event_id="k"),
        line(2, event_id="k"),
        line(3),
    ]
    reply = await post(edge, b"\n".join(lines))

    assert (422, "invalid-batch") == slug(reply)
    assert [2, 3, 4, 5, 6, 7, 8, 10] == [wrong["line"] for wrong in reply.json["lines"]]
    assert "it has the id of line 9, and another body" == reply.json["lines"][-1]["reason"]
    assert "secret" not in reply.content.decode()
    assert [] == edge.log.events


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        (b"", NDJSON, (422, "invalid-batch")),
        (b"\n\r\n", NDJSON, (422, "invalid-batch")),
        (b"[]", JSON, (422, "invalid-batch")),
        (b'{"event_type":"A"}', JSON, (422, "invalid-batch")),
        (b"[1", JSON, (400, "invalid-json")),
        (b"[7]", JSON, (422, "invalid-batch")),
        (line(), "text/plain", (415, "unsupported-media-type")),
        (b"[" + b",".join([line()] * 1001) + b"]", JSON, (413, "too-many-events")),
        (b"\n".join([line()] * 1001), NDJSON, (413, "too-many-events")),
    ],
)
async def test_what_is_no_batch_is_refused(edge: Edge, body: bytes, kind: str, expected: tuple[int, str]) -> None:
    """And nothing of it is stored."""
    assert expected == slug(await post(edge, body, kind))
    assert [] == edge.log.events


async def test_invalid_json_in_a_batch_is_answered_with_the_place(edge: Edge) -> None:
    """In NDJSON each line is a text of its own; an array is one text."""
    reply = await post(edge, b'{"event_type":"A"}\n\n{"event_type":"\xc3\xa9", secret}')
    expected = [{"line": 3, "reason": "it is not JSON in UTF-8, from its column 20 on"}]
    assert expected == reply.json["lines"]
    reply = await post(edge, b'[{"event_type":"A"},\n  {"event_type":"\xc3\xa9",\n "x": secret}]', JSON)
    assert "The body is not JSON in UTF-8: see line 3, column 7." == reply.json["detail"]
    reply = await post(edge, b'[{"event_type":"A"}', JSON)
    assert "The body is not one JSON array: a bracket is not closed." == reply.json["detail"]


async def test_an_event_without_a_consultation_is_told_which_member_names_it(edge: Edge) -> None:
    """Where the path names none."""
    reply = await edge.request("POST", "/events/batch", data=line(), headers={"Content-Type": NDJSON})
    expected = [{"line": 1, "reason": "consultation_id is missing: it names the consultation"}]
    assert expected == reply.json["lines"]


async def test_a_thousand_events_are_a_batch(edge: Edge) -> None:
    """The broker's limit; also when the body is long enough to be read in a thread."""
    reply = await post(edge, b"\n".join(line("x" * 300) for _ in range(1000)))

    assert (202, 1000) == (reply.status, len(reply.json["results"]))
    assert [1000] == edge.log.batches
    assert edge.metric("fi_ingest_batch_events_sum") == 1000.0


async def test_sizes_are_bound_for_the_batch_and_for_each_event() -> None:
    """FI_MAX_BATCH_BYTES and FI_MAX_EVENT_BYTES."""
    async with running_edge(max_batch_bytes=5000, max_event_bytes=1000) as edge:
        assert (202, 4) == (
            (reply := await post(edge, b"\n".join([line("x" * 900)] * 4))).status,
            len(reply.json["results"]),
        )
        assert (413, "body-too-large") == slug(await post(edge, b"\n".join([line("x" * 900)] * 6)))
        reply = await post(edge, line("x" * 100) + b"\n" + line("x" * 1000))
        assert ((422, "invalid-batch"), [2]) == (slug(reply), [wrong["line"] for wrong in reply.json["lines"]])


async def test_lines_of_many_consultations_name_their_own(edge: Edge) -> None:
    """POST /events/batch; without a path there is no other way."""
    body = line(1, consultation_id="c-1") + b"\n" + line(2, consultation_id="c-2")
    reply = await post(edge, body, path="/events/batch")
    assert (202, ["c-1", "c-2"]) == (reply.status, [event.consultation for event in edge.log.events])
    assert ["c-1", "c-2"] == [result["consultation_id"] for result in reply.json["results"]]

    reply = await post(edge, body + b"\n" + line(3), path="/events/batch")
    assert ((422, "invalid-batch"), [3]) == (slug(reply), [wrong["line"] for wrong in reply.json["lines"]])


async def test_a_batch_counts_as_its_events_and_has_room_of_its_own() -> None:
    """A second batch beyond FI_MAX_BATCHED_EVENTS gets 429; single events go on."""
    async with running_edge(max_batched_events=1000) as edge:
        edge.log.gate = asyncio.Event()
        first = asyncio.create_task(post(edge, b"\n".join([line()] * 600)))
        await eventually(lambda: edge.log.waiting == 1)
        assert (429, "too-many-in-flight") == slug(await post(edge, b"\n".join([line()] * 600)))
        single = asyncio.create_task(edge.post("c-1", line()))
        await eventually(lambda: edge.log.waiting == 2)
        edge.log.gate.set()
        assert [202, 202] == [(await first).status, (await single).status]
        assert (await post(edge, b"\n".join([line()] * 600))).status == 202


@pytest.mark.parametrize(
    ("error", "expected"),
    [(LogFullError("x"), "log-full"), (LogUnavailableError("x"), "log-unavailable")],
)
async def test_what_the_log_does_not_take_is_to_be_sent_again_whole(
    edge: Edge, error: Exception, expected: str
) -> None:
    """Some of it may be stored; the answer does not claim that none is."""
    edge.log.error = error
    reply = await post(edge, line())

    assert (503, expected) == slug(reply)
    assert "Some events of the batch may be stored" in reply.json["detail"]
    assert reply.headers["Retry-After"] == "2"


async def test_a_batch_whose_keys_cannot_be_compared_is_503(edge: Edge) -> None:
    """Neither 202 nor 422 would be known to be true."""
    edge.log.events.append(Event("c-1", event_id_from_key("a"), 1, line()))
    assert edge.log.reader is not None
    edge.log.reader.silent = True

    assert (503, "key-not-compared") == slug(await post(edge, line(event_id="a") + b"\n" + line(event_id="b")))


async def test_the_log_line_of_a_batch_quotes_nothing(edge: Edge, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a batch, with numbers."""
    await post(edge, line("Sxcrxt", event_id="Sxcrxt") + b"\n" + line("Sxcrxt"))

    output = capsys.readouterr().out
    assert "BATCH_QUEUED" in output
    assert "Sxcrxt" not in output
