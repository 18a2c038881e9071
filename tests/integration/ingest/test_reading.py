"""Reading over HTTP: pages, one event, consultations, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import orjson
import pytest

from services.ingest.reading import MAX_READS
from services.log.errors import CorpusAwayError, LogRefusedError, LogUnavailableError
from services.log.protocol import Page
from tests.support.ingest import Edge, Reply, running_edge

EVENTS = "/consultations/c-1/events"


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


async def fill(edge: Edge, count: int, consultation: str = "c-1", *, persisted: int = 0) -> list[str]:
    """Post *count* events, and return their message ids."""
    posted = [await edge.post(consultation, b'{"event_type":"T", "n": %d}' % number) for number in range(count)]
    edge.log.persisted = persisted
    return [str(reply.json["message_id"]) for reply in posted]


async def test_a_page_holds_records_in_order_and_their_bodies_byte_for_byte(edge: Edge) -> None:
    """Sequence, id, time, whether it is in HDF5 yet, and the event as it was sent."""
    ids = await fill(edge, 2, persisted=1)
    reply = await edge.request("GET", EVENTS)
    assert (200, "application/json", "no-store") == (
        reply.status,
        reply.headers["Content-Type"],
        reply.headers["Cache-Control"],
    )
    assert b'"event":{"event_type":"T", "n": 0}' in reply.content
    first, second = reply.json["events"]
    assert ["sequence", "message_id", "received", "status", "event"] == list(first)
    assert [(1, ids[0], "persisted"), (2, ids[1], "queued")] == [
        (one["sequence"], one["message_id"], one["status"]) for one in (first, second)
    ]
    seconds, _, nanoseconds = first["received"].rstrip("Z").partition(".")
    assert (19, 9) == (len(seconds), len(nanoseconds))
    assert ("c-1", None) == (reply.json["consultation_id"], reply.json["next"])
    assert "Link" not in reply.headers


async def test_received_is_told_to_the_nanosecond(edge: Edge) -> None:
    """As it stands in HDF5."""
    await edge.post()
    received = edge.log.events[0].received_ns
    shown = (await edge.request("GET", EVENTS)).json["events"][0]["received"]
    assert f"{received % 10**9:09d}Z" == shown.partition(".")[2]


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
async def test_pages_lead_through_all_events(edge: Edge, accept: str) -> None:
    """The next page is where the answer says, in either media type."""
    await fill(edge, 25)
    await fill(edge, 3, "other")
    found: list[int] = []
    path: str | None = EVENTS + "?limit=10"
    while path:
        reply = await edge.request("GET", path, headers={"Accept": accept})
        assert accept == reply.headers["Content-Type"]
        lines = (
            reply.json["events"] if accept.endswith("/json") else [orjson.loads(x) for x in reply.content.splitlines()]
        )
        found += [line["sequence"] for line in lines]
        link = reply.headers.get("Link", "")
        path = link.partition(">")[0].lstrip("<") or None
        assert link == (f'<{path}>; rel="next"' if path else "")
        if accept.endswith("/json"):
            assert path == reply.json["next"]
    assert list(range(1, 26)) == found


async def test_after_is_where_a_page_begins(edge: Edge) -> None:
    """Behind it, whether or not an event stands there."""
    await fill(edge, 5)
    for after, expected in ((0, [1, 2, 3, 4, 5]), (3, [4, 5]), (5, []), (2**63 - 1, [])):
        reply = await edge.request("GET", f"{EVENTS}?after={after}")
        assert expected == [one["sequence"] for one in reply.json["events"]]


async def test_a_consultation_without_events_is_an_empty_page(edge: Edge) -> None:
    """It begins with its first event, and may be followed before that."""
    reply = await edge.request("GET", "/consultations/never/events")
    assert (200, []) == (reply.status, reply.json["events"])
    reply = await edge.request("GET", "/consultations/never/events", headers={"Accept": "application/x-ndjson"})
    assert (200, b"") == (reply.status, reply.content)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("application/x-ndjson, */*;q=0.1", "application/x-ndjson"),
        ("application/json;q=0.2, application/x-ndjson;q=0.9", "application/x-ndjson"),
        ("application/*, application/json;q=0", "application/x-ndjson"),
        ("APPLICATION/X-NDJSON", "application/x-ndjson"),
        ("text/html", None),
        ("application/json;q=0", None),
        ("application/json;q=x", None),
        ("application/json;q=1e9", None),
        (";;,,/", None),
    ],
)
async def test_accept_decides_the_media_type(edge: Edge, accept: str, expected: str | None) -> None:
    """RFC 9110, section 12.5.1: the most specific range counts; what cannot be served is said."""
    reply = await edge.request("GET", EVENTS, headers={"Accept": accept})
    if expected is None:
        assert (406, "/problems/not-acceptable") == (reply.status, reply.json["type"])
    else:
        assert (200, expected) == (reply.status, reply.headers["Content-Type"])


@pytest.mark.parametrize(
    "query",
    [
        "after=",
        "after=-1",
        "after=1.5",
        "after=x",
        "after=%C2%B2",
        "after=9223372036854775808",
        "after=" + "9" * 5000,
        "limit=0",
        "limit=1001",
        "limit=x",
        "follow=yes",
        "follow=1&after=x",
    ],
)
async def test_a_malformed_parameter_is_named_and_not_quoted(edge: Edge, query: str) -> None:
    """400, whatever it holds."""
    reply = await edge.request("GET", f"{EVENTS}?{query}")
    assert (400, "/problems/invalid-parameter") == (reply.status, reply.json["type"])
    assert reply.json["detail"].partition(" ")[0] in query


async def test_one_event_is_shown_with_where_it_is(edge: Edge) -> None:
    """What Location of its 202 leads to."""
    posted = await edge.post(body=b'{"event_type":"T"}')
    for persisted, status in ((0, "queued"), (1, "persisted")):
        edge.log.persisted = persisted
        reply = await edge.request("GET", posted.headers["Location"])
        assert (200, status, "c-1", {"event_type": "T"}) == (
            reply.status,
            reply.json["status"],
            reply.json["consultation_id"],
            reply.json["event"],
        )
        assert posted.json["message_id"] == reply.json["message_id"]


@pytest.mark.parametrize("event_id", ["6f1b1d4e-0000-4000-8000-000000000000", "no-uuid", "%00"])
async def test_an_event_that_was_not_posted_is_unknown(edge: Edge, event_id: str) -> None:
    """Also one of another consultation, and what cannot be an id."""
    (other,) = await fill(edge, 1, "other")
    for name in (event_id, other):
        reply = await edge.request("GET", f"{EVENTS}/{name}")
        assert (404, "/problems/unknown-event") == (reply.status, reply.json["type"])


async def test_consultations_are_listed_by_prefix_page_by_page(edge: Edge) -> None:
    """Those of which something is persisted."""
    for name in ("b-2", "a-1", "b-1", "b-3", "c"):
        await fill(edge, 1, name)
    edge.log.persisted = 4
    reply = await edge.request("GET", "/consultations?prefix=b-&limit=2")
    assert [{"consultation_id": "b-1"}, {"consultation_id": "b-2"}] == reply.json["consultations"]
    reply = await edge.request("GET", reply.json["next"], headers={"Accept": "application/x-ndjson"})
    assert b'{"consultation_id":"b-3"}\n' == reply.content
    assert ["a-1", "b-1", "b-2", "b-3"] == [
        one["consultation_id"] for one in (await edge.request("GET", "/consultations")).json["consultations"]
    ]


@pytest.mark.parametrize("query", ["prefix=a%20b", "after=%2F", "limit=0", "prefix=" + "x" * 129])
async def test_a_malformed_parameter_of_the_list_is_refused(edge: Edge, query: str) -> None:
    """No id could begin like that."""
    reply = await edge.request("GET", f"/consultations?{query}")
    assert (400, "/problems/invalid-parameter") == (reply.status, reply.json["type"])


@pytest.mark.parametrize("path", [EVENTS, EVENTS + "/6f1b1d4e-0000-4000-8000-000000000000", "/consultations"])
@pytest.mark.parametrize(
    ("error", "slug"),
    [
        (CorpusAwayError("no"), "corpus-away"),
        (LogUnavailableError("no"), "log-unavailable"),
        (LogRefusedError("no"), "log-refused"),
    ],
)
async def test_what_cannot_be_read_now_is_503_with_retry_after(
    edge: Edge, path: str, error: Exception, slug: str
) -> None:
    """And never a page with a gap."""
    edge.log.read_error = error
    reply = await edge.request("GET", path)
    assert (503, f"/problems/{slug}", "2") == (reply.status, reply.json["type"], reply.headers["Retry-After"])
    assert "stored" not in reply.json["detail"]


async def test_an_id_that_cannot_be_is_the_same_404_as_for_a_post(edge: Edge) -> None:
    """Whichever resource."""
    for path in ("/consultations/a%20b/events", "/consultations/a%20b/events/x"):
        reply = await edge.request("GET", path)
        assert (404, "/problems/invalid-consultation-id") == (reply.status, reply.json["type"])


async def test_readers_beyond_the_limit_are_429_and_posts_are_not(edge: Edge) -> None:
    """A page takes memory; what clients have to say has its own bounds."""
    gate = asyncio.Event()
    page = edge.log.reader.page

    async def waiting(consultation: str, after: int, limit: int) -> Page:
        await gate.wait()
        return await page(consultation, after, limit)

    edge.log.reader.page = waiting  # type: ignore[method-assign]
    asked = [asyncio.create_task(edge.request("GET", EVENTS)) for _ in range(MAX_READS + 3)]
    done: set[asyncio.Task[Reply]] = set()
    while len(done) < 3:
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    assert {429} == {task.result().status for task in done}
    assert 202 == (await edge.post()).status
    gate.set()
    assert {200: MAX_READS, 429: 3} == {
        status: [task.result().status for task in asked].count(status)
        for status in {(await task).status for task in asked}
    }


async def test_a_malformed_last_event_id_is_400_for_a_page_too(edge: Edge) -> None:
    """It is described as a number; nothing that is malformed is passed over in silence."""
    for value, status in (("9223372036854775808", 400), ("x", 400), ("7", 200)):
        reply = await edge.request("GET", "/consultations/c-1/events", headers={"Last-Event-ID": value})
        assert (status, value) == (reply.status, value)
