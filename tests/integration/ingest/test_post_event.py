"""POST /consultations/{id}/events: each row of the table in DESIGN, section 6."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from fiq.event import event_id_from_key
from services.log.errors import (
    DuplicateInFlightError,
    LogFullError,
    LogRefusedError,
    LogUnavailableError,
    TooManyInFlightError,
)
from tests.support.ingest import Edge, Reply, running_edge
from tests.support.polling import eventually

BODY = b'{"event_type":"MESSAGE_RECEIVED","payload":{"text":"hello"}}'


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


def slug(reply: Reply) -> str:
    """Return which problem a reply is, after checking that it is a whole problem document."""
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert {"type", "title", "status", "detail"} == set(reply.json)
    assert reply.status == reply.json["status"]
    return str(reply.json["type"]).removeprefix("/problems/")


async def test_a_new_event_is_accepted_and_can_be_found(edge: Edge) -> None:
    """202 with the names of the user's documents, and where the event will be."""
    reply = await edge.post("c-1", BODY, Idempotency_Key="abc")
    event_id = str(event_id_from_key("abc"))
    expected = {"status": "accepted", "message_id": event_id, "consultation_id": "c-1", "sequence": 1}
    assert (202, expected) == (reply.status, reply.json)
    assert ("application/json", f"/consultations/c-1/events/{event_id}") == (
        reply.headers["Content-Type"],
        reply.headers["Location"],
    )


async def test_the_log_gets_what_the_client_sent(edge: Edge) -> None:
    """Byte for byte, with the time of arrival."""
    before = time.time_ns()
    await edge.post("c-1", BODY, Idempotency_Key="aa4d205e-3bfa-81b2-8bc0-91f8ffe555a3")
    after = time.time_ns()
    (event,) = edge.log.events
    assert ("c-1", UUID("aa4d205e-3bfa-81b2-8bc0-91f8ffe555a3"), BODY) == (
        event.consultation,
        event.event_id,
        event.body,
    )
    assert before <= event.received_ns <= after


async def test_a_retry_gets_the_same_answer_and_is_marked(edge: Edge) -> None:
    """Same key, same consultation: the first one's sequence, and nothing is stored twice."""
    first = await edge.post("c-1", BODY, Idempotency_Key="abc")
    await edge.post("c-1", BODY, Idempotency_Key="other")
    retry = await edge.post("c-1", BODY, Idempotency_Key='"abc"')
    assert (202, first.json | {"duplicate": True}) == (retry.status, retry.json)
    assert (len(edge.log.events), edge.metric("fi_ingest_duplicates_total")) == (2, 1.0)


async def test_the_same_key_in_another_consultation_is_another_event(edge: Edge) -> None:
    """A key belongs to its consultation."""
    await edge.post("c-1", BODY, Idempotency_Key="abc")
    reply = await edge.post("c-2", BODY, Idempotency_Key="abc")
    assert (reply.status, reply.json["sequence"], "duplicate" in reply.json) == (202, 2, False)


async def test_without_a_key_the_service_makes_the_id(edge: Edge) -> None:
    """A UUIDv7, returned as message_id."""
    reply = await edge.post("c-1", BODY)
    assert UUID(reply.json["message_id"]).version == 7


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'])
async def test_json_in_utf_8_is_taken_however_it_is_spelt(edge: Edge, content_type: str) -> None:
    """Media types and charsets have no case; a charset that says the obvious is fine."""
    reply = await edge.post(body=BODY, Content_Type=content_type, Content_Encoding="identity")
    assert reply.status == 202


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Content_Type": "text/plain"}, "unsupported-media-type"),
        ({"Content_Type": "application/x-ndjson"}, "unsupported-media-type"),
        ({"Content_Type": "application/json; charset=latin-1"}, "unsupported-media-type"),
        ({"Content_Type": ""}, "unsupported-media-type"),
        ({"Content_Encoding": "gzip"}, "unsupported-content-encoding"),
        ({"Content_Encoding": "identity, gzip"}, "unsupported-content-encoding"),
    ],
)
async def test_another_content_type_or_encoding_is_415(edge: Edge, headers: dict[str, str], expected: str) -> None:
    """What is stored is JSON in UTF-8 as it came, so nothing is guessed or unpacked."""
    reply = await edge.post(body=BODY, **headers)
    assert (415, expected) == (reply.status, slug(reply))


async def test_a_wrong_content_type_is_answered_with_the_accepted_ones(edge: Edge) -> None:
    """The usual mistake is curl without the header."""
    reply = await edge.post(body=BODY, Content_Type="application/x-www-form-urlencoded")
    others = "application/cloudevents+json, application/cloudevents-batch+json"
    said = f"Send Content-Type: application/json, in UTF-8; this resource also takes {others}."
    assert said == reply.json["detail"]
    reply = await edge.post(body=BODY, Content_Type="text/csv", ce_time="x")
    assert reply.json["detail"].startswith(said)
    assert reply.json["detail"].endswith("these headers are missing: ce-id, ce-source, ce-specversion, ce-type.")
    reply = await edge.post(body=BODY, Content_Type="text/csv", ce_id="1", CE_Type="A", ce_time="x")
    assert reply.json["detail"].endswith("these headers are missing: ce-source, ce-specversion.")


async def test_plain_json_for_the_cloudevents_resource_is_told_where_it_belongs(edge: Edge) -> None:
    """The path of all consultations takes single events as CloudEvents only."""
    reply = await edge.request("POST", "/events", data=BODY, headers={"Content-Type": "application/json"})
    assert (415, "unsupported-media-type") == (reply.status, slug(reply))
    assert "Post plain JSON to /consultations/{consultation}/events." in reply.json["detail"]


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"", 400, "invalid-json"),
        (b"{", 400, "invalid-json"),
        (b'{"event_type":"\xe9"}', 400, "invalid-json"),
        (b"[1]", 422, "invalid-event"),
        (b'{"payload":{}}', 422, "invalid-event"),
        (b'{"event_type":""}', 422, "invalid-event"),
        (b'{"event_type":7}', 422, "invalid-event"),
    ],
)
async def test_a_body_that_is_no_event_is_refused(edge: Edge, body: bytes, status: int, expected: str) -> None:
    """400 when it cannot be read, 422 when it can but is no event; nothing reaches the log."""
    reply = await edge.post(body=body)
    assert (status, expected) == (reply.status, slug(reply))
    assert edge.log.events == []


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"event_type": "A",\n "name": secret}', "line 2, column 10"),
        (b'{"\xc3\xa9\xf0\x9f\x98\x80": secret}', "line 1, column 8"),
        (b'{"event_type":\r\n"A",\r\n "name": "\xc3\xa9\xffsecret"}', "line 3, column 12"),
        (b'{"event_type": "A", "name": "secret', "line 1, column 36"),
        (b'{"event_type": "A"}\n{"secret": 1}', "line 2, column 1"),
    ],
)
async def test_invalid_json_is_answered_with_the_place_and_no_content(edge: Edge, body: bytes, place: str) -> None:
    """The first character that is wrong, counted as an editor counts."""
    for headers in ({}, {"Content_Type": "application/cloudevents+json"}):
        reply = await edge.post(body=body, **headers)
        assert f"The body is not JSON in UTF-8: see {place}." == reply.json["detail"]


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        (b'"c-2"', "consultation_id names another consultation than the path"),
        (b'"c 1"', "a consultation id is 1 to 128 characters of A-Z a-z 0-9 _ -"),
        (b"7", "consultation_id must be a string"),
    ],
)
async def test_an_event_that_names_another_consultation_than_the_path_is_refused(
    edge: Edge, named: bytes, reason: str
) -> None:
    """As in a batch: one of the two is wrong, and would put the event into the consultation of another patient."""
    reply = await edge.post("c-1", b'{"event_type":"A","consultation_id":%b}' % named)
    assert (422, "invalid-event", f"Invalid: {reason}.") == (reply.status, slug(reply), reply.json["detail"])
    assert edge.log.events == []


@pytest.mark.parametrize("named", [b'"c-1"', b"null"])
async def test_an_event_may_repeat_the_consultation_of_the_path(edge: Edge, named: bytes) -> None:
    """It is stored as it is; its event_id is an ordinary member."""
    body = b'{"event_type":"A","consultation_id":%b,"event_id":7}' % named
    assert 202 == (await edge.post("c-1", body)).status
    assert [("c-1", body)] == [(event.consultation, event.body) for event in edge.log.events]


async def test_a_message_id_is_unique_within_its_consultation_only(edge: Edge) -> None:
    """The same key in two consultations is two events with one id, and each is found."""
    first, second = [await edge.post(name, BODY, Idempotency_Key="k") for name in ("a", "b")]
    assert first.json["message_id"] == second.json["message_id"]
    assert [1, 2] == [reply.json["sequence"] for reply in (first, second)]
    for reply, name in ((first, "a"), (second, "b")):
        found = await edge.request("GET", reply.headers["Location"])
        assert (200, name) == (found.status, found.json["consultation_id"])


async def test_an_empty_body_is_called_empty(edge: Edge) -> None:
    """There is no place in it."""
    for body in (b"", b" \n"):
        assert "The body is empty." == (await edge.post(body=body)).json["detail"]


@pytest.mark.parametrize("consultation", ["a.b", "a%20b", "%3E", "a" * 129, "%C3%A9", "a%2Fb", "%FF", "a%00"])
async def test_a_bad_consultation_id_is_404(edge: Edge, consultation: str) -> None:
    """There is no such resource, and never will be."""
    reply = await edge.post(consultation, BODY)
    assert (reply.status, slug(reply)) == (404, "invalid-consultation-id")


@pytest.mark.parametrize("key", ["", "a b", "\u00e9", "x" * 256])
async def test_a_bad_key_is_400(edge: Edge, key: str) -> None:
    """Trimming or cutting it would give two events one id."""
    reply = await edge.post(body=BODY, Idempotency_Key=key)
    assert (reply.status, slug(reply)) == (400, "invalid-idempotency-key")


async def test_two_keys_are_400(edge: Edge) -> None:
    """Which of them counts would be a guess, also when they are the same."""
    headers = [("Content-Type", "application/json"), ("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    reply = await edge.request("POST", "/consultations/c-1/events", data=BODY, headers=headers)
    assert (reply.status, slug(reply)) == (400, "invalid-idempotency-key")


async def test_a_body_at_the_limit_is_taken_and_one_byte_more_is_413() -> None:
    """The limit is FI_MAX_EVENT_BYTES, whether the length is declared or the body comes in chunks."""

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    async with running_edge(max_event_bytes=5000) as edge:
        fits = BODY + b" " * (5000 - len(BODY))
        url, headers = "/consultations/c-1/events", {"Content-Type": "application/json"}
        replies = [
            await edge.request("POST", url, data=data, headers=headers)
            for data in (fits, fits + b" ", chunks(fits), chunks(fits + b" "))
        ]
    assert [reply.status for reply in replies] == [202, 413, 202, 413]
    assert {"body-too-large"} == {slug(reply) for reply in replies[1::2]}


@pytest.mark.parametrize(
    ("error", "status", "expected", "outcome"),
    [
        (LogFullError("x"), 503, "log-full", "full"),
        (LogUnavailableError("x"), 503, "log-unavailable", "unavailable"),
        (LogRefusedError("x"), 503, "log-refused", "refused"),
        (DuplicateInFlightError("x"), 409, "duplicate-in-flight", "duplicate_in_flight"),
        (TooManyInFlightError("x"), 429, "too-many-in-flight", "too_many_in_flight"),
    ],
)
async def test_what_the_log_cannot_take_is_answered_with_retry_after(
    error: Exception, status: int, expected: str, outcome: str
) -> None:
    """Honest back-pressure: why, and when to come back, in whole seconds (RFC 9110, section 10.2.3)."""
    async with running_edge(retry_after=2.5) as edge:
        edge.log.error = error
        reply = await edge.post(body=BODY)
        assert (status, expected, "3") == (reply.status, slug(reply), reply.headers["Retry-After"])
        assert edge.metric("fi_ingest_publishes_total", outcome=outcome) == 1.0
        assert edge.metric("fi_ingest_requests_total", status=str(status), problem=expected) == 1.0


async def test_an_unexpected_error_is_500_without_its_text(edge: Edge, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of an exception may quote a body; its class and place are logged."""
    edge.log.error = RuntimeError("name of a patient")
    reply = await edge.post(body=BODY)
    assert (reply.status, slug(reply)) == (500, "internal-error")
    output = capsys.readouterr().out
    assert "RuntimeError" in output
    assert "append" in output
    assert "patient" not in output + reply.content.decode()


async def test_no_answer_and_no_line_quotes_a_request(edge: Edge, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is refused, and wherever the secret stands."""
    secret = "Sxcrxt"
    replies = [
        await edge.post(body=b'{"event_type": ' + secret.encode()),
        await edge.post(body=b'{"event_type": ["' + secret.encode() + b'"]}'),
        await edge.post(consultation=f"{secret}.1", body=BODY),
        await edge.post(body=BODY, Idempotency_Key=f"{secret} 1"),
        await edge.post(body=BODY, Content_Type=secret),
        await edge.request("GET", f"/{secret}?{secret}"),
        await edge.request("GET", "/problems/not-found", headers={"Expect": secret}),
    ]
    assert all(reply.status >= 400 for reply in replies)
    assert secret not in capsys.readouterr().out
    assert secret not in "".join(str(reply) for reply in replies)


async def test_each_request_is_counted_and_timed(edge: Edge) -> None:
    """Accepted and refused alike."""
    await edge.post(body=BODY)
    await edge.post(body=b"{")
    assert edge.metric("fi_ingest_requests_total", status="202", problem="") == 1.0
    assert edge.metric("fi_ingest_requests_total", status="400", problem="invalid-json") == 1.0
    assert edge.metric("fi_ingest_request_duration_seconds_count") == 2.0
    assert float(len(BODY)) == edge.metric("fi_ingest_body_size_bytes_sum")


async def test_in_flight_counts_what_waits_for_the_log(edge: Edge) -> None:
    """And goes back to zero."""
    edge.log.gate = asyncio.Event()
    posts = [asyncio.create_task(edge.post(body=BODY)) for _ in range(5)]
    await eventually(lambda: edge.metric("fi_ingest_requests_in_flight") == 5.0)
    edge.log.gate.set()
    assert [reply.status for reply in await asyncio.gather(*posts)] == [202] * 5
    assert edge.metric("fi_ingest_requests_in_flight") == 0.0


TWICE = b'{"event_type":"A","NAME":"c-1","NAME":"sxcrxt"}'
CLOUDEVENT = b'{"specversion":"1.0","id":"1","source":"/s","type":"T","subject":"c-1","NAME":"c-1","NAME":"sxcrxt"}'
BATCH = "/consultations/c-1/events/batch"


@pytest.mark.parametrize(
    ("body", "name", "kind", "path"),
    [
        (TWICE, "consultation_id", "application/json", "/consultations/c-1/events"),
        (TWICE, "payload", "application/json", "/consultations/c-1/events"),
        (TWICE, "consultation_id", "application/x-ndjson", BATCH),
        (TWICE, "event_id", "application/x-ndjson", "/events/batch"),
        (b"[" + TWICE + b"]", "consultation_id", "application/json", "/events/batch"),
        (CLOUDEVENT, "subject", "application/cloudevents+json", "/events"),
        (CLOUDEVENT, "data", "application/cloudevents+json", "/consultations/c-1/events"),
        (b"[" + CLOUDEVENT + b"]", "id", "application/cloudevents-batch+json", "/events/batch"),
    ],
)
async def test_a_name_that_occurs_twice_is_refused(edge: Edge, body: bytes, name: str, kind: str, path: str) -> None:
    """The token was checked for one of the values, and a reader could take the other one."""
    raw = body.replace(b"NAME", name.encode())
    reply = await edge.request("POST", path, data=raw, headers={"Content-Type": kind})

    assert (422, []) == (reply.status, edge.log.events)
    reason = reply.json["lines"][0]["reason"] if "lines" in reply.json else reply.json["detail"]
    assert f"{name} occurs more than once" in reason
    assert "sxcrxt" not in reply.content.decode()


async def test_an_attribute_in_two_headers_is_refused_by_its_name(edge: Edge) -> None:
    """The same of a CloudEvent in the binary mode; the name of an extension is content."""
    headers = [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "T"), ("ce-subject", "c-1")]
    twice = await edge.request("POST", "/events", data=b"1", headers=[*headers, ("ce-subject", "c-2")])
    extension = await edge.request("POST", "/events", data=b"1", headers=[*headers, ("ce-sxc", "1"), ("ce-sxc", "2")])

    assert [422, 422] == [twice.status, extension.status]
    assert "subject occurs more than once" in twice.json["detail"]
    assert "an extension attribute occurs more than once" in extension.json["detail"]
    assert "sxc" not in extension.json["detail"]
