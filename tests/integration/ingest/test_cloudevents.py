"""CloudEvents 1.0 over HTTP, as the official client writes them: binary, structured, batched."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_http_event, to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

from fiq.event import event_id_of_cloudevent
from services.ingest.formats import MAX_MEMBERS
from tests.support.ingest import Edge, Reply, running_edge

PATH = "/consultations/c-1/events"
ATTRIBUTES = {"id": "7", "source": "/ward/ü 3", "type": "MESSAGE_RECEIVED", "subject": "c-1"}


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


def event(data: Any = None, **attributes: Any) -> CloudEvent:
    given = {"time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), **ATTRIBUTES, **attributes}
    return CloudEvent({name: value for name, value in given.items() if value is not None}, data)


async def post(edge: Edge, message: HTTPMessage, path: str = PATH, **headers: str) -> Reply:
    names = message.headers | {name.replace("_", "-"): value for name, value in headers.items()}
    options: dict[str, Any] = {"data": message.body, "headers": names, "skip_auto_headers": ["Content-Type"]}
    return await edge.request("POST", path, **options)


def batch(*events: CloudEvent) -> HTTPMessage:
    """Put events together as the specification's batch; the official client knows no batches."""
    body = b"[" + b", ".join(to_structured_event(one).body for one in events) + b"]"
    return HTTPMessage({"Content-Type": "application/cloudevents-batch+json"}, body)


def stored(edge: Edge) -> Any:
    return orjson.loads(edge.log.events[-1].body)


def slug(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json["type"].removeprefix("/problems/")


@pytest.mark.parametrize("write", [to_binary_event, to_structured_event])
async def test_a_cloudevent_becomes_an_event_with_its_attributes(edge: Edge, write: Any) -> None:
    """type is event_type, data is payload, source and id make the id; nothing of it is lost."""
    reply = await post(edge, write(event({"text": "hello"}, datacontenttype="application/json", ward="3b")))

    event_id = event_id_of_cloudevent("/ward/ü 3", "7")
    assert (202, str(event_id)) == (reply.status, reply.json["message_id"])
    document = stored(edge)
    time = document["cloudevent"].pop("time")
    assert datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC) == datetime.fromisoformat(time)
    expected = {"specversion": "1.0", "datacontenttype": "application/json", "ward": "3b", **ATTRIBUTES}
    assert {"event_type": "MESSAGE_RECEIVED", "payload": {"text": "hello"}, "cloudevent": expected} == document


async def test_the_mode_makes_no_difference(edge: Edge) -> None:
    """A gateway may write an event anew in the other mode: it stays a retry of the first."""
    given = event({"text": "hello"}, datacontenttype="application/json")
    first = await post(edge, to_binary_event(given))
    again = await post(edge, to_structured_event(given))

    assert (202, first.json | {"duplicate": True}) == (again.status, again.json)


async def test_another_event_under_the_same_source_and_id_is_refused(edge: Edge) -> None:
    """As with any key."""
    await post(edge, to_structured_event(event({"text": "hello"})))

    assert (422, "idempotency-key-reused") == slug(await post(edge, to_structured_event(event({"text": "bye"}))))
    assert (await post(edge, to_structured_event(event({"text": "bye"}, source="/other")))).status == 202


async def test_data_keeps_its_bytes(edge: Edge) -> None:
    """Numbers, escapes and order stay as they came, in each mode."""
    data = b'{ "n": 1.10, "s": "\\u00e4", "b": [1,\t{"a":"}"}] }'
    message = to_binary_event(event(None, datacontenttype="application/json"))
    await post(edge, HTTPMessage(message.headers, data))
    body = orjson.dumps(ATTRIBUTES | {"specversion": "1.0", "id": "8"})[:-1] + b', "data" : ' + data + b"}"
    await post(edge, HTTPMessage({"Content-Type": "application/cloudevents+json; charset=utf-8"}, body))

    assert [True, True] == [b'"payload":' + data + b"," in stored.body for stored in edge.log.events]


@pytest.mark.parametrize(
    ("data", "kind", "member", "expected"),
    [
        (b"plain \xc3\xa4", "text/plain", "payload", "plain ä"),
        (b"<a/>", "application/xml", "data_base64", base64.b64encode(b"<a/>").decode()),
        (b"\x00\xff", "application/octet-stream", "data_base64", base64.b64encode(b"\x00\xff").decode()),
        (b'{"a":1}', "application/vnd.ward+json", "payload", {"a": 1}),
    ],
)
@pytest.mark.parametrize("write", [to_binary_event, to_structured_event])
async def test_data_of_any_type_is_kept(
    edge: Edge, write: Any, data: bytes, kind: str, member: str, expected: Any
) -> None:
    """JSON as it is, text as a string, anything else in Base64, whatever the mode."""
    assert (await post(edge, write(event(data, datacontenttype=kind)))).status == 202

    assert expected == stored(edge)[member]
    assert kind == stored(edge)["cloudevent"]["datacontenttype"]


@pytest.mark.parametrize("write", [to_binary_event, to_structured_event])
async def test_an_event_without_data_has_no_payload(edge: Edge, write: Any) -> None:
    """Data are optional in CloudEvents, as payload is here."""
    assert (await post(edge, write(event()))).status == 202

    assert {"event_type", "cloudevent"} == set(stored(edge))


async def test_a_batch_of_cloudevents_is_a_batch(edge: Edge) -> None:
    """On the path of the events as on that of batches."""
    for number, path in enumerate((PATH, PATH + "/batch", "/events", "/events/batch")):
        reply = await post(edge, batch(event({"n": 1}, id=f"a{number}"), event({"n": 2}, id=f"b{number}")), path)
        assert (202, 2) == (reply.status, len(reply.json["results"]))

    assert [2, 2, 2, 2] == edge.log.batches


async def test_a_wrong_event_in_a_batch_is_named(edge: Edge) -> None:
    """By its number; nothing is stored."""
    reply = await post(edge, batch(event(), event(subject="c-2", id="8")))

    assert ((422, "invalid-batch"), [2]) == (slug(reply), [wrong["line"] for wrong in reply.json["lines"]])
    assert [] == edge.log.events


@pytest.mark.parametrize("write", [to_binary_event, to_structured_event])
async def test_the_subject_names_the_consultation_where_the_path_does_not(edge: Edge, write: Any) -> None:
    """POST /events; path and subject must agree where both name one."""
    assert (await post(edge, write(event(subject="c-9")), "/events")).status == 202
    assert "c-9" == edge.log.events[-1].consultation
    assert (await post(edge, write(event(subject=None, id="8")))).status == 202
    assert (422, "invalid-event") == slug(await post(edge, write(event(subject=None)), "/events"))
    assert (422, "invalid-event") == slug(await post(edge, write(event(subject="c-2"))))
    assert (422, "invalid-event") == slug(await post(edge, write(event(subject="ward 7")), "/events"))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"ce-id": ""}, (422, "invalid-event")),
        ({"ce-specversion": "0.3"}, (422, "invalid-event")),
        ({"ce-datacontenttype": "text/plain"}, (422, "invalid-event")),
        ({"ce-source": "%ff"}, (422, "invalid-event")),
        ({"ce-not_good": "1"}, (422, "invalid-event")),
        ({"Content-Type": "application/json; charset=latin-1"}, (415, "unsupported-media-type")),
        ({"Idempotency-Key": "k"}, (400, "invalid-idempotency-key")),
    ],
)
async def test_a_binary_event_that_breaks_the_rules_is_refused(
    edge: Edge, headers: dict[str, str], expected: tuple[int, str]
) -> None:
    """Each attribute once, in its place and form; its key is its source and id."""
    message = to_binary_event(event({"a": 1}, datacontenttype="application/json"))
    assert expected == slug(await post(edge, HTTPMessage(message.headers | headers, message.body)))
    assert [] == edge.log.events


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (b"[]", (422, "invalid-event")),
        (b"{", (400, "invalid-json")),
        ({"specversion": "2.0"}, (422, "invalid-event")),
        ({"id": 7}, (422, "invalid-event")),
        ({"extra": {"a": 1}}, (422, "invalid-event")),
        ({"Extra": "a"}, (422, "invalid-event")),
        ({"data": 1, "data_base64": "AA=="}, (422, "invalid-event")),
        ({"data_base64": "secret!"}, (422, "invalid-event")),
        ({"data_base64": "c2VjcmV0"}, (422, "invalid-event")),
    ],
)
async def test_a_structured_event_that_breaks_the_rules_is_refused(
    edge: Edge, change: Any, expected: tuple[int, str]
) -> None:
    """The reason quotes nothing of it."""
    valid = ATTRIBUTES | {"specversion": "1.0"}
    body = change if isinstance(change, bytes) else orjson.dumps(valid | change)
    reply = await post(edge, HTTPMessage({"Content-Type": "application/cloudevents+json"}, body))
    assert expected == slug(reply)
    assert "secret" not in reply.content.decode()
    assert [] == edge.log.events


async def test_an_event_without_a_subject_is_told_what_names_the_consultation(edge: Edge) -> None:
    """Where the path names none: the attribute, and its header."""
    for message in (to_binary_event(event({"a": 1})), to_structured_event(event({"a": 1}))):
        headers = {name: value for name, value in message.headers.items() if name != "ce-subject"}
        reply = await post(edge, HTTPMessage(headers, message.body.replace(b'"subject"', b'"other"')), "/events")
        assert (422, "invalid-event") == slug(reply)
        expected = "Invalid: subject (in the binary mode ce-subject) is missing: it names the consultation."
        assert expected == reply.json["detail"]


async def test_a_binary_event_is_told_which_headers_are_missing(edge: Edge) -> None:
    """All at once."""
    headers = {"ce-specversion": "1.0", "ce-subject": "c-1", "Content-Type": "application/json"}
    reply = await post(edge, HTTPMessage(headers, b"{}"), "/events")
    expected = "Invalid: a CloudEvent in the binary mode has these headers, too: ce-id, ce-source, ce-type."
    assert (422, expected) == (reply.status, reply.json["detail"])


async def test_plain_json_belongs_to_a_consultation(edge: Edge) -> None:
    """POST /events takes CloudEvents only: a plain event names no consultation there."""
    reply = await post(edge, HTTPMessage({"Content-Type": "application/json"}, b'{"event_type":"A"}'), "/events")
    assert (415, "unsupported-media-type") == slug(reply)


async def test_a_cloudevent_is_read_back_as_it_was_posted(edge: Edge) -> None:
    """In the form of the official SDK; posted again it is a duplicate, whatever its data are."""
    posted = [
        event({"a": [1, 2]}, subject="c-1", datacontenttype="application/json", extra="x"),
        event("Good\nnight", id="2", subject="c-1", datacontenttype="text/plain"),
        event(b"\x00\xff", id="3", subject="c-1", datacontenttype="application/octet-stream"),
        event(None, id="4", subject="c-1"),
    ]
    locations = [(await post(edge, to_structured_event(one), "/events")).headers["Location"] for one in posted]
    kind = "application/cloudevents+json"
    for path, one in zip(locations, posted, strict=True):
        reply = await edge.request("GET", path, headers={"Accept": kind})
        assert (200, kind) == (reply.status, reply.headers["Content-Type"])
        read = from_http_event(HTTPMessage(reply.headers, reply.content))
        assert (one.get_attributes(), one.get_data()) == (read.get_attributes(), read.get_data())
        again = await post(edge, HTTPMessage({"Content-Type": kind}, reply.content), "/events")
        assert (202, True) == (again.status, again.json["duplicate"])
    batch = {"Accept": "application/cloudevents-batch+json"}
    reply = await edge.request("GET", "/consultations/c-1/events?limit=3", headers=batch)
    assert ["7", "2", "3"] == [one["id"] for one in reply.json]
    assert 'rel="next"' in reply.headers["Link"]
    again = await post(edge, HTTPMessage({"Content-Type": batch["Accept"]}, reply.content), "/events")
    assert [True] * 3 == [one["duplicate"] for one in again.json["results"]]


async def test_a_plain_event_is_read_as_a_cloudevent(edge: Edge) -> None:
    """Its attributes come from its record; payload is its data byte for byte."""
    await edge.post(body=b'{"event_type":"A","payload":{"n": 1.0},"more":1}')
    await edge.post(body=b'{"cloudevent":{"id":"no type"},"event_type":"B"}')
    batch = {"Accept": "application/cloudevents-batch+json"}
    reply = await edge.request("GET", "/consultations/c-1/events", headers=batch)
    first, second = reply.json
    records = (await edge.request("GET", "/consultations/c-1/events")).json["events"]
    assert b'"data":{"n": 1.0}}' in reply.content
    assert {
        "specversion": "1.0",
        "id": records[0]["message_id"],
        "source": "/consultations/c-1",
        "type": "A",
        "subject": "c-1",
        "time": records[0]["received"],
        "datacontenttype": "application/json",
        "data": {"n": 1},
    } == first
    assert ("B", False, False) == (second["type"], "data" in second, "datacontenttype" in second)
    reply = await edge.request("GET", "/consultations/c-1/events?bodies=0&type=A", headers=batch)
    assert [{name: value for name, value in first.items() if name != "data"}] == reply.json
    assert [] == (await edge.request("GET", "/consultations/other/events", headers=batch)).json


async def test_the_number_of_attributes_is_bounded(edge: Edge) -> None:
    """Each becomes some objects in memory; data may be as large as a plain event."""
    own = len(orjson.loads(to_structured_event(event()).body))
    extensions = {f"a{number}": 1 for number in range(MAX_MEMBERS - own)}
    largest = await post(edge, to_structured_event(event(**extensions)))
    refused = await post(edge, to_structured_event(event(**extensions, b="1")))

    assert (202, (422, "invalid-event")) == (largest.status, slug(refused))
    assert "a CloudEvent has at most 1000 attributes" in refused.json["detail"]
