"""Batches of more events than a request may hold: what is sent, what comes back, what an error says."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp import web

from fiq.client import AsyncClient, EventBody, GaveUpError, InvalidArgumentError, RefusedError, RetryPolicy
from tests.support.scripted_http import Step, accepted, accepted_batch, every_line, refused, says, scripted

QUICK = RetryPolicy(deadline=20, attempt_timeout=5, initial_backoff=0.01, max_backoff=0.05)


def events(count: int) -> Iterator[EventBody]:
    for number in range(1, count + 1):
        yield {"event_type": "A", "n": number}


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_generators_of_any_length_are_stored_in_order(asynchronous: bool) -> None:
    """In requests of a thousand, one after the other."""

    async def generated() -> AsyncIterator[EventBody]:
        for one in events(2500):
            yield one

    async with scripted(every_line) as server, AsyncClient(server.url) as client:
        stored = await client.post_batch("c-1", generated() if asynchronous else events(2500), "k")
    assert list(range(1, 2501)) == [one.sequence for one in stored]
    assert (["k"] * 3, 3) == ([request.key for request in server.seen], len(server.seen))
    assert [0, 1000, 2000] == [len(request.body) - len(request.body.lstrip(b"\n")) for request in server.seen]


async def test_a_stream_of_posts_holds_one_request() -> None:
    """What was accepted comes before the next events are asked for."""
    taken = 0

    def counted() -> Iterator[EventBody]:
        nonlocal taken
        for one in events(5000):
            taken += 1
            yield one

    async with scripted(every_line) as server, AsyncClient(server.url) as client:
        async for one in client.post_stream("c-1", counted()):
            assert one.sequence <= taken <= one.sequence + 1000
    assert (5000, 5) == (taken, len(server.seen))


async def test_a_retry_of_the_whole_call_sends_the_very_same_requests() -> None:
    """So no event is stored twice, wherever the first call ended."""
    full = refused(503, "log-full", retry_after="3600")
    steps = (every_line, full, every_line)
    async with scripted(*steps) as server, AsyncClient(server.url, retry=QUICK) as client:
        with pytest.raises(GaveUpError) as caught:
            await client.post_batch("c-1", events(2500), "k")
        await client.post_batch("c-1", events(2500), "k")
    first, failed, *again = [(request.key, request.body) for request in server.seen]
    assert caught.value.may_be_stored
    assert ([first, failed], 3) == (again[:2], len(again))


@pytest.mark.parametrize("status", [401, 422])
async def test_after_a_first_request_some_events_are_stored(status: int) -> None:
    """Although the refused request stored nothing."""
    steps = (every_line, refused(status, "refused"))
    async with scripted(*steps) as server, AsyncClient(server.url) as client:
        with pytest.raises(RefusedError) as caught:
            await client.post_batch("c-1", events(1001))
    assert caught.value.may_be_stored


async def test_refused_events_are_named_by_their_numbers_in_the_whole() -> None:
    """The service counts the lines of one request, in blocks of 10,000."""
    lines = [{"line": 3, "reason": "event_type is required"}]
    steps: list[Step] = [*[every_line] * 10, refused(422, "invalid-batch", lines=lines)]
    async with scripted(*steps) as server, AsyncClient(server.url) as client:
        with pytest.raises(RefusedError) as caught:
            await client.post_batch("c-1", events(10_500), "k")
    assert caught.value.problem is not None
    assert [10_003] == [line.number for line in caught.value.problem.lines]
    assert 11 == len(server.seen)


async def test_a_service_with_a_lower_limit_gets_smaller_requests() -> None:
    """413 says that nothing was stored; the halves have the same keys, and later requests the smaller size."""

    async def at_most_300(request: web.BaseRequest) -> web.StreamResponse:
        if len([line for line in (await request.read()).split(b"\n") if line]) > 300:
            return await refused(413, "body-too-large")(request)
        return await every_line(request)

    async with scripted(at_most_300) as server, AsyncClient(server.url) as client:
        stored = await client.post_batch("c-1", events(1000), "k")
        refusals = sum(request.body.count(b"event_type") > 300 for request in server.seen)
        await client.post_batch("c-1", events(1000), "k")
    assert list(range(1, 1001)) == [one.sequence for one in stored]
    assert {"k"} == {request.key for request in server.seen}
    assert refusals == sum(request.body.count(b"event_type") > 300 for request in server.seen) == 2


async def test_an_event_that_is_too_large_alone_is_refused() -> None:
    """Halving ends with one."""
    async with scripted(refused(413, "body-too-large")) as server, AsyncClient(server.url) as client:
        with pytest.raises(RefusedError) as caught:
            await client.post_batch("c-1", events(2))
    assert (False, 2) == (caught.value.may_be_stored, len(server.seen))


async def test_nothing_is_sent_of_an_event_with_nan() -> None:
    """Alone, or in a batch."""
    bad: EventBody = {"event_type": "A", "payload": [math.nan]}
    async with scripted(accepted_batch(), accepted()) as server, AsyncClient(server.url) as client:
        with pytest.raises(InvalidArgumentError) as alone:
            await client.post("c-1", bad)
        with pytest.raises(InvalidArgumentError, match="event 2") as batch:
            await client.post_batch("c-1", [{"event_type": "A"}, bad])
    assert ([], False, False) == (server.seen, alone.value.may_be_stored, batch.value.may_be_stored)


async def test_nothing_is_sent_for_no_events() -> None:
    """A generator may have none."""
    async with scripted(says(500, b"")) as server, AsyncClient(server.url) as client:
        assert [] == await client.post_batch("c-1", iter(()))
    assert [] == server.seen
