"""Reading back: pages, one event, and following over connections that break."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import aclosing
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any
from uuid import UUID

import orjson
import pytest

from fiq.client import (
    AsyncClient,
    GaveUpError,
    InvalidArgumentError,
    RefusedError,
    RetryPolicy,
    StoredEvent,
    UnexpectedAnswerError,
)
from tests.support.polling import eventually
from tests.support.scripted_http import (
    RECEIVED,
    WRITTEN,
    Step,
    cut,
    lost,
    page,
    record,
    refused,
    says,
    scripted,
    sent,
    silent,
    stream,
)

QUICK = RetryPolicy(deadline=20, attempt_timeout=5, initial_backoff=0.01, max_backoff=0.05)
SHORT = RetryPolicy(deadline=0.4, attempt_timeout=0.1, initial_backoff=0.01, max_backoff=0.05)


async def taken(client: AsyncClient, count: int, after: int = 0, silence: float = 60.0) -> list[int]:
    """Follow c-1 until *count* events have come, and return their sequences."""
    found: list[int] = []
    async with aclosing(client.follow("c-1", after, silence=silence)) as events:
        async for event in events:
            found.append(event.sequence)
            if len(found) == count:
                break
    return found


async def test_pages_are_read_to_the_last_one() -> None:
    """Each begins after the last event of the one before."""
    async with scripted(page(3, 5, more=True), page(9)) as server, AsyncClient(server.url) as client:
        events = [event async for event in client.read("c-1", 2, page=2)]
    assert [3, 5, 9] == [event.sequence for event in events]
    expected = StoredEvent("c-1", UUID(int=3), 3, True, RECEIVED, WRITTEN, {"event_type": "A", "n": 3})
    assert expected == events[0]
    assert [
        "/consultations/c-1/events?after=2&limit=2",
        "/consultations/c-1/events?after=5&limit=2",
    ] == [request.path for request in server.seen]


async def test_a_page_that_breaks_off_is_asked_for_again() -> None:
    """From where it began: what came of it is not believed."""
    broken = cut(200, b'{"consultation_id":"c-1","events":[')
    steps = (page(1, more=True), broken, refused(503, "corpus-away"), page(2))
    async with scripted(*steps) as server, AsyncClient(server.url, retry=QUICK) as client:
        assert [1, 2] == [event.sequence async for event in client.read("c-1")]
    assert ["0", "1", "1", "1"] == [request.path.partition("after=")[2].partition("&")[0] for request in server.seen]


@pytest.mark.parametrize(
    "answer",
    [page(2, 1), page(more=True), says(200, b"<html>"), says(200, b"[]"), says(200, b'{"events":[{}],"next":null}')],
    ids=["out of order", "empty but not the last", "no JSON", "another document", "no records"],
)
async def test_a_page_that_cannot_be_is_not_believed(answer: Step) -> None:
    """Better an error than a gap, or a loop."""
    async with scripted(answer) as server, AsyncClient(server.url) as client:
        with pytest.raises(UnexpectedAnswerError):
            [event async for event in client.read("c-1")]
    assert 1 == len(server.seen)


async def test_chosen_events_are_read_over_pages_without_any() -> None:
    """The link of a page says how far it looked; the choice goes with each request."""
    since = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=1)))
    steps = (page(3, more=True, reached=50), page(more=True, reached=90), page(95))
    async with scripted(*steps) as server, AsyncClient(server.url) as client:
        events = [event async for event in client.read("c-1", page=2, before=99, type="A B", since=since)]
    assert [3, 95] == [event.sequence for event in events]
    chosen = "type=A+B&since=2026-01-02T02:04:05.000006Z&before=99"
    assert [f"/consultations/c-1/events?{chosen}&after={after}&limit=2" for after in (0, 50, 90)] == [
        request.path for request in server.seen
    ]


async def test_a_page_of_chosen_events_that_leads_to_itself_is_not_believed() -> None:
    """It would be asked for without an end."""
    steps = (page(more=True, reached=5), page(more=True, reached=5))
    async with scripted(*steps) as server, AsyncClient(server.url) as client:
        with pytest.raises(UnexpectedAnswerError):
            [event async for event in client.read("c-1", type="A")]
    assert 2 == len(server.seen)


@pytest.mark.parametrize("choice", [{"type": ""}, {"type": 1}, {"since": "today"}, {"since": datetime(2026, 1, 1)}])  # noqa: DTZ001
async def test_a_malformed_choice_is_refused_before_anything_is_sent(choice: Any) -> None:
    """By each method that takes one."""
    async with AsyncClient("http://127.0.0.1:1") as client:
        for call in (partial(client.read, "c-1"), partial(client.follow, "c-1"), client.follow_all):
            with pytest.raises(InvalidArgumentError):
                call(**choice)


async def test_an_event_is_found_by_its_key() -> None:
    """Or there is none; a message id or a key is needed."""
    async with scripted(page(7), page()) as server, AsyncClient(server.url) as client:
        event = await client.event("c-1", key="line/7")
        assert event is not None
        assert (7, None) == (event.sequence, await client.event("c-1", key="never"))
        for arguments in ({}, {"message_id": UUID(int=7), "key": "k"}, {"key": "a b"}):
            with pytest.raises(InvalidArgumentError):
                await client.event("c-1", **arguments)
    assert "/consultations/c-1/events?key=line/7&after=0&limit=1" == server.seen[0].path


async def test_all_consultations_are_followed_from_where_the_stream_began() -> None:
    """Its first id is the position; a comment's id moves it on, so that what was not shown is not read again."""
    of_other = (
        sent(8).replace(b'{"sequence"', b'{"consultation_id":"other","sequence"').replace(b'"status":"persisted",', b"")
    )
    steps = (
        stream(b"retry: 2000\nid: 5\n\n"),
        stream(b"id: 5\n\n", of_other, b"id: 20\n: nothing new\n\n", b"id: 30\n"),
        stream(sent(21).replace(b'{"sequence"', b'{"consultation_id":"c-1","sequence"'), open_end=True),
    )
    found = []
    async with (
        scripted(*steps) as server,
        AsyncClient(server.url, retry=QUICK) as client,
        aclosing(client.follow_all(type="A")) as events,
    ):
        async for event in events:
            found.append((event.consultation, event.sequence, event.persisted))
            if len(found) == 2:
                break
    assert [("other", 8, False), ("c-1", 21, True)] == found
    paths = ["/events?follow=1&type=A", "/events?follow=1&after=5&type=A", "/events?follow=1&after=20&type=A"]
    assert paths == [request.path for request in server.seen]
    assert [None, "5", "20"] == [request.headers.get("Last-Event-ID") for request in server.seen]


async def test_a_position_that_is_gone_ends_following_at_once() -> None:
    """The caller must know that it missed something."""
    async with scripted(refused(410, "position-gone")) as server, AsyncClient(server.url, retry=QUICK) as client:
        with pytest.raises(RefusedError) as caught:
            [event async for event in client.follow_all(3)]
    assert (410, "/problems/position-gone") == (caught.value.status, caught.value.type)
    assert 1 == len(server.seen)


async def test_one_event_is_found_or_none() -> None:
    """Queued or persisted."""
    document = {"consultation_id": "c-1", **record(7, status="queued")}
    steps = (says(200, orjson.dumps(document)), refused(404, "unknown-event"), refused(404, "not-found"))
    async with scripted(*steps) as server, AsyncClient(server.url) as client:
        event = await client.event("c-1", UUID(int=7))
        assert event is not None
        assert (7, False, {"event_type": "A", "n": 7}) == (event.sequence, event.persisted, event.event)
        assert None is await client.event("c-1", str(UUID(int=8)))
        with pytest.raises(RefusedError):
            await client.event("c-1", UUID(int=7))
        with pytest.raises(InvalidArgumentError, match="UUID"):
            await client.event("c-1", "../../x")
    assert f"/consultations/c-1/events/{UUID(int=7)}" == server.seen[0].path


async def test_following_goes_on_after_the_last_event_of_a_broken_connection() -> None:
    """Each event once: what the second connection repeats is dropped, what the first cut off comes again."""
    steps = (
        stream(b"retry: 2000\n\n", sent(1), sent(2), sent(3)[:-9]),
        lost,
        stream(sent(2), sent(3), b": nothing new\n\n", sent(4)),
        stream(sent(5), open_end=True),
    )
    async with scripted(*steps) as server, AsyncClient(server.url, retry=QUICK) as client:
        assert [1, 2, 3, 4, 5] == await taken(client, 5)
    assert [None, "2", "2", "4"] == [request.headers.get("Last-Event-ID") for request in server.seen]
    assert {"text/event-stream"} == {request.headers["Accept"] for request in server.seen}


async def test_following_begins_after_a_position() -> None:
    """That of a program which was stopped."""
    async with scripted(stream(sent(8), open_end=True)) as server, AsyncClient(server.url) as client:
        assert [8] == await taken(client, 1, after=7)
    assert ("7", "/consultations/c-1/events?follow=1&after=7") == (
        server.seen[0].headers["Last-Event-ID"],
        server.seen[0].path,
    )


async def test_a_connection_that_falls_silent_is_replaced() -> None:
    """The service sends a comment each 15 s: a longer silence is a dead line."""
    steps = (stream(sent(1), open_end=True), stream(sent(2), open_end=True))
    async with scripted(*steps) as server, AsyncClient(server.url, retry=QUICK) as client:
        assert [1, 2] == await taken(client, 2, silence=0.2)


def test_a_silent_connection_is_replaced_long_before_the_deadline_of_the_call() -> None:
    """With the defaults of both: otherwise the first silence would end the call."""
    silence = inspect.signature(AsyncClient.follow).parameters["silence"].default
    assert 15 < silence < 0.7 * RetryPolicy().deadline


async def test_following_has_no_deadline_as_long_as_it_hears_something() -> None:
    """The deadline counts from the last word, not from the beginning."""
    retry = RetryPolicy(deadline=1.5, attempt_timeout=1, initial_backoff=0.01)
    steps = [stream(sent(number), open_end=True) for number in range(1, 6)]
    async with scripted(*steps) as server, AsyncClient(server.url, retry=retry) as client:
        assert [1, 2, 3, 4, 5] == await taken(client, 5, silence=0.5)


async def test_following_outlives_an_outage() -> None:
    """Refusals that pass are waited for, as long as they ask."""
    steps = (stream(sent(1)), refused(503, "corpus-away", retry_after="1"), lost, stream(sent(2), open_end=True))
    async with scripted(*steps) as server, AsyncClient(server.url, retry=QUICK) as client:
        assert [1, 2] == await taken(client, 2)
    assert server.seen[2].at - server.seen[1].at >= 1


@pytest.mark.parametrize("failure", [lost, refused(429, "too-many-followers"), silent], ids=["lost", "429", "silent"])
async def test_following_gives_up_after_the_deadline_without_a_word(failure: Step) -> None:
    """The caller must learn that no more events come."""
    async with scripted(failure) as server, AsyncClient(server.url, retry=SHORT) as client:
        with pytest.raises(GaveUpError) as caught:
            await taken(client, 1, silence=0.1)
    assert not caught.value.may_be_stored
    assert len(server.seen) > 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refused(403, "forbidden"), RefusedError),
        (says(200, b"{}", "application/json"), UnexpectedAnswerError),
        (stream(b"data: {}\n\n"), UnexpectedAnswerError),
    ],
    ids=["refused", "no stream", "no events"],
)
async def test_what_will_not_pass_ends_following_at_once(answer: Step, error: type[Exception]) -> None:
    """As it ends a post."""
    async with scripted(answer) as server, AsyncClient(server.url, retry=QUICK) as client:
        with pytest.raises(error):
            await taken(client, 1)
    assert 1 == len(server.seen)


async def test_a_cancelled_follower_closes_its_connection() -> None:
    """A cancelled follower leaves no connection open."""
    async with scripted(stream(sent(1), open_end=True)) as server, AsyncClient(server.url) as client:
        task = asyncio.create_task(taken(client, 2))
        await eventually(lambda: server.seen)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
