"""Reading over HTTP: pages, one event, consultations, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime

import orjson
import pytest

from services.ingest import reading
from services.ingest.reading import MAX_READS
from services.log.errors import CorpusAwayError, LogRefusedError, LogUnavailableError
from services.log.protocol import Page
from tests.support.ingest import WRITTEN_AFTER_NS, Edge, Reply, running_edge

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
    assert ["sequence", "message_id", "received", "status", "written", "event"] == list(first)
    assert [(1, ids[0], "persisted"), (2, ids[1], "queued")] == [
        (one["sequence"], one["message_id"], one["status"]) for one in (first, second)
    ]
    seconds, _, nanoseconds = first["received"].rstrip("Z").partition(".")
    assert (19, 9) == (len(seconds), len(nanoseconds))
    assert ("c-1", None) == (reply.json["consultation_id"], reply.json["next"])
    assert "Link" not in reply.headers


async def test_times_are_told_to_the_nanosecond(edge: Edge) -> None:
    """As they stand in HDF5; the time of the writing is null while the event waits."""
    await fill(edge, 2, persisted=1)
    received = edge.log.events[0].received_ns
    first, second = (await edge.request("GET", EVENTS)).json["events"]
    assert f"{received % 10**9:09d}Z" == first["received"].partition(".")[2]
    assert f"{(received + WRITTEN_AFTER_NS) % 10**9:09d}Z" == first["written"].partition(".")[2]
    assert second["written"] is None


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


async def test_pages_lead_back_from_before_through_all_events(edge: Edge) -> None:
    """Each ends where the one that was read before it begins; its events are in order."""
    await fill(edge, 25)
    await fill(edge, 3, "other")
    found: list[int] = []
    path: str | None = f"{EVENTS}?limit=10&before={2**63 - 1}"
    while path:
        reply = await edge.request("GET", path)
        found = [one["sequence"] for one in reply.json["events"]] + found
        assert "next" not in reply.json
        path = reply.json["previous"]
        assert reply.headers.get("Link", "") == (f'<{path}>; rel="prev"' if path else "")
    assert list(range(1, 26)) == found


@pytest.mark.parametrize(
    ("query", "expected", "link"),
    [
        ("before=4", [1, 2, 3], None),
        ("before=4&limit=2", [2, 3], "before=2"),
        ("before=0", [], None),
        ("before=5&after=2", [3, 4], None),
        ("before=5&after=1&limit=2", [2, 3], "after=3"),
        ("before=2&after=4", [], None),
    ],
)
async def test_before_is_where_a_page_ends(edge: Edge, query: str, expected: list[int], link: str | None) -> None:
    """With after it is a bound of all pages; without it the page holds the last events below it."""
    await fill(edge, 6)
    reply = await edge.request("GET", f"{EVENTS}?{query}")
    assert expected == [one["sequence"] for one in reply.json["events"]]
    found = reply.json["next" if "after" in query else "previous"]
    assert (link is None) == (found is None)
    assert link is None or link in found.split("?")[1].split("&")


async def test_events_are_chosen_by_type_and_time(edge: Edge) -> None:
    """Together, in either direction; pages go on with the same choice."""
    for number in range(12):
        await edge.post(body=b'{"event_type":"%b","n":%d}' % (b"A" if number % 3 else b"B\\u00e9", number))
    edge.log.events = [replace(event, received_ns=(1000 + n) * 10**9) for n, event in enumerate(edge.log.events)]
    for query, expected in (
        ("type=A", [1, 2, 4, 5, 7, 8, 10, 11]),
        ("type=B%C3%A9", [0, 3, 6, 9]),
        ("type=C", []),
        ("since=1970-01-01T00:16:45Z", [5, 6, 7, 8, 9, 10, 11]),
        ("since=1970-01-01T01:16:44.5%2B01:00&type=A", [5, 7, 8, 10, 11]),
        ("since=1969-12-31T23:16:49.000000001-01:00&type=A", [10, 11]),
        ("since=1970-01-01t00:16:51.0z&type=A", [11]),
        ("since=1970-01-01 00:15:60Z&type=A&before=4", [1, 2]),
        ("since=0001-01-01T00:00:00Z&type=A&before=9", [1, 2, 4, 5, 7]),
    ):
        for limit in (2, 100):
            found: list[int] = []
            path: str | None = f"{EVENTS}?limit={limit}&{query}"
            while path:
                page = (await edge.request("GET", path)).json
                numbers = [one["event"]["n"] for one in page["events"]]
                assert len(numbers) <= limit
                found = numbers + found if "previous" in page else found + numbers
                path = page["previous"] if "previous" in page else page["next"]
            assert (query, expected) == (query, found)


async def test_a_page_of_few_among_many_says_where_to_go_on(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request looks at so much and no more: the page may be empty although there are more."""
    monkeypatch.setattr(reading, "LOOKED_EVENTS", 10)
    edge.log.page_events = 5
    await fill(edge, 25)
    await edge.post(body=b'{"event_type":"rare"}')
    first = (await edge.request("GET", f"{EVENTS}?type=rare")).json
    assert ([], "type=rare&limit=100&after=10") == (first["events"], first["next"].partition("?")[2])
    second = (await edge.request("GET", first["next"])).json
    third = (await edge.request("GET", second["next"])).json
    assert ([26], None) == ([one["sequence"] for one in third["events"]], third["next"])


async def test_an_event_is_found_by_its_key(edge: Edge) -> None:
    """That of a request, and that of a line of a batch; a page with one event or none."""
    await edge.post(Idempotency_Key="k-1")
    body, kind = b'{"event_type":"A"}\n{"event_type":"B","event_id":"own"}', {"Content-Type": "application/x-ndjson"}
    await edge.request("POST", EVENTS + "/batch", data=body, headers=kind | {"Idempotency-Key": "part"})
    for query, expected in (
        ("key=k-1", [1]),
        ("key=%22k-1%22", [1]),
        ("key=part:1", [2]),
        ("key=own", [3]),
        ("key=never", []),
        ("key=own&type=B", [3]),
        ("key=own&type=A", []),
        ("key=own&before=3", []),
        ("key=own&since=9999-12-31T23:59:59Z", []),
    ):
        page = (await edge.request("GET", f"{EVENTS}?{query}")).json
        assert (query, expected) == (query, [one["sequence"] for one in page["events"]])


async def test_bodies_can_be_left_out(edge: Edge) -> None:
    """Then a record has the event's type and length instead; pages may be as long as is asked for."""
    edge.log.page_events = 2
    for number in range(5):
        await edge.post(body=b'{"event_type":"T\\"","n":%d}' % number)
    reply = await edge.request("GET", EVENTS + "?bodies=0&limit=4")
    first, *_ = records = reply.json["events"]
    assert ["sequence", "message_id", "received", "status", "written", "event_type", "bytes"] == list(first)
    assert ('T"', len(edge.log.events[0].body)) == (first["event_type"], first["bytes"])
    assert [1, 2, 3, 4] == [one["sequence"] for one in records]
    last = await edge.request("GET", reply.json["next"])
    assert ([5], None) == ([one["sequence"] for one in last.json["events"]], last.json["next"])
    assert "event" not in last.json["events"][0]
    assert "bytes" in orjson.loads(
        (await edge.request("GET", EVENTS + "?bodies=0&limit=1", headers={"Accept": "application/x-ndjson"})).content
    )


async def test_a_page_that_looks_at_many_events_stays_small(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is that of a page, whatever limit says."""
    monkeypatch.setattr(reading, "PAGE_BYTES", 300)
    await fill(edge, 10)
    page = (await edge.request("GET", EVENTS + "?type=T")).json
    assert 1 <= len(page["events"]) <= 2
    assert page["next"].endswith(f"after={page['events'][-1]['sequence']}")


@pytest.mark.parametrize(
    "query",
    [
        *(
            "before=x",
            "before=-1",
            "type=",
            "bodies=2",
            "key=",
            "key=a%20b",
            "since=yesterday",
            "since=2026-02-30T00:00:00Z",
        ),
        *("since=2026-01-01", "since=2026-01-01T00:00:00", "since=2026-01-01T24:00:00Z", "since=2026-01-01T00:00:61Z"),
        *("since=2026-01-01T00:00:00%2B24:00", "follow=1&before=3", "follow=1&key=k", "follow=1&type=", "follow=2"),
    ],
)
async def test_a_malformed_choice_is_refused(edge: Edge, query: str) -> None:
    """Rather than answered with other events than were meant."""
    reply = await edge.request("GET", f"{EVENTS}?{query}")
    assert (400, "/problems/invalid-parameter") == (reply.status, reply.json["type"])


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
        assert (status == "queued") == (reply.json["written"] is None)


async def test_one_event_is_shown_with_its_trace_while_the_log_has_it(edge: Edge) -> None:
    """Its time in the log as well; once it is trimmed, or while the log does not answer, they are null."""
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    posted = await edge.post(body=b'{"event_type":"T"}', traceparent=parent)
    shown = (await edge.request("GET", posted.headers["Location"])).json
    assert ("a" * 32, edge.log.reader.stored) == (shown["trace_id"], shown["stored"])
    edge.log.persisted = 1
    edge.log.reader.silent = True
    shown = (await edge.request("GET", posted.headers["Location"])).json
    assert (None, None, "persisted") == (shown["trace_id"], shown["stored"], shown["status"])
    edge.log.reader.silent = False
    edge.log.reader.trimmed = {1}
    shown = (await edge.request("GET", posted.headers["Location"])).json
    assert (None, None, {"event_type": "T"}) == (shown["trace_id"], shown["stored"], shown["event"])


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
    assert ["b-1", "b-2"] == [one["consultation_id"] for one in reply.json["consultations"]]
    reply = await edge.request("GET", reply.json["next"], headers={"Accept": "application/x-ndjson"})
    (time,) = {event.received_ns for event in edge.log.events if event.consultation == "b-3"}
    shown = f"{datetime.fromtimestamp(time // 10**9, UTC):%Y-%m-%dT%H:%M:%S}.{time % 10**9:09d}Z"
    assert {"consultation_id": "b-3", "events": 1, "first_received": shown, "last_received": shown} == orjson.loads(
        reply.content
    )
    assert ["a-1", "b-1", "b-2", "b-3"] == [
        one["consultation_id"] for one in (await edge.request("GET", "/consultations")).json["consultations"]
    ]


async def test_consultations_are_listed_by_activity_page_by_page(edge: Edge) -> None:
    """The newest first; the next page begins where the URL says."""
    for name in ("b-2", "a-1", "b-1", "b-3", "b-2"):
        await fill(edge, 1, name)
    edge.log.persisted = 5
    reply = await edge.request("GET", "/consultations?prefix=b-&limit=2&order=activity")
    assert [("b-2", 2), ("b-3", 1)] == [(one["consultation_id"], one["events"]) for one in reply.json["consultations"]]
    reply = await edge.request("GET", reply.json["next"])
    assert ["b-1"] == [one["consultation_id"] for one in reply.json["consultations"]]
    assert reply.json["next"] is None
    reply = await edge.request("GET", "/consultations?order=activity&after=b-3")
    assert ["b-1", "a-1"] == [one["consultation_id"] for one in reply.json["consultations"]]
    reply = await edge.request("GET", "/consultations?order=activity&after=none")
    assert ([], None) == (reply.json["consultations"], reply.json["next"])


@pytest.mark.parametrize(
    "query",
    [
        *("prefix=a%20b", "after=%2F", "limit=0", "prefix=" + "x" * 129),
        *("order=size", "order=activity&after=1.%2F", "after=99999999999999999999.a"),
    ],
)
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
