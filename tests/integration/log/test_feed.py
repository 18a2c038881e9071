"""The stream as a feed of all consultations: whole, in order, from any position that it still holds."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from nats.aio.msg import Msg

from services.cli.embedded.processes import Cluster
from services.log.errors import PositionGoneError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.reader import JetStreamFeed, StreamReading
from services.log.jetstream.stream import STREAM
from services.log.protocol import SequencedEvent
from tests.support.cluster import delete_streams
from tests.support.persisters import Log, provisioned


@pytest.fixture
async def log(single_node: Cluster) -> AsyncIterator[Log]:
    await delete_streams(single_node)
    async with provisioned(single_node) as made:
        yield made


async def read(feed: JetStreamFeed, after: int) -> list[SequencedEvent]:
    """Read all after *after*, page by page."""
    found: list[SequencedEvent] = []
    more = True
    while more:
        page = await feed.page(after)
        found += page.events
        after, more = page.reached, page.more
    return found


async def test_all_events_come_in_order_from_any_position(log: Log) -> None:
    """Also what takes several batches; each has its consultation, its id and its body."""
    feed = JetStreamFeed(log.nc)
    assert (0, []) == (await feed.last(), await read(feed, 0))
    contents = await log.publish(600, consultations=("a", "b", "c"), batch=100)
    assert 600 == await feed.last()
    found = await read(feed, 0)
    assert list(range(1, 601)) == [one.sequence for one in found]
    for name, ids in contents.items():
        assert ids == [one.event.event_id for one in found if one.event.consultation == name]
    assert b'{"event_type":"T","payload":599}' == found[-1].event.body
    assert [590] == [one.sequence for one in (await read(feed, 589))[:1]]
    assert [] == await read(feed, 600)
    assert (True, False) == (await feed.has_news(599), await feed.has_news(600))


async def test_what_is_no_event_moves_the_position_and_is_not_shown(log: Log) -> None:
    """The persister sets it aside."""
    await log.publish(1)
    await log.nc.request("fi.events.c1", b"garbage", timeout=10)
    await log.publish(1)
    assert [1, 3] == [one.sequence for one in await read(JetStreamFeed(log.nc), 0)]


@pytest.mark.parametrize(("below", "only"), [(11, None), (20, "fi.events.*.a")])
async def test_a_position_before_what_was_trimmed_is_gone(log: Log, below: int, only: str | None) -> None:
    """At the beginning of the stream or in its middle; the message says from where on it can be followed."""
    feed = JetStreamFeed(log.nc)
    await log.publish(20, consultations=("a", "b"))
    await log.api.purge(STREAM, below, only=only)
    with pytest.raises(PositionGoneError, match=f"after={10 if only is None else 1}\\."):
        await read(feed, 0)
    first = 10 if only is None else 19
    assert [one + 1 for one in range(first, 20)] == [one.sequence for one in await read(feed, first)]
    await log.api.purge(STREAM, 21)
    with pytest.raises(PositionGoneError, match=r"after=20\."):
        await read(feed, 10)
    assert [] == await read(feed, 20)


async def test_a_position_beyond_the_end_is_of_another_log(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was made anew begins at 1 again: to wait for the position would skip all that is new."""
    monkeypatch.setattr("services.log.jetstream.reader._LEADER_PAUSES", (0.01,))
    await log.publish(3)
    with pytest.raises(PositionGoneError, match="ends at position 3"):
        await read(JetStreamFeed(log.nc), 4)


async def test_a_replica_that_lags_delays_and_skips_nothing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a part of the stream, or nothing after the position."""
    await log.publish(10)
    feed = JetStreamFeed(log.nc)
    whole = StreamReading._batch
    has = 0

    async def lagging(self: StreamReading, subject: str, start: int) -> list[Msg]:
        return [one for one in await whole(self, subject, start) if int((one.headers or {})["Nats-Sequence"]) <= has]

    monkeypatch.setattr(StreamReading, "_batch", lagging)
    page = await feed.page(0)
    assert ([], 0) == (page.events, page.reached)
    has = 4
    page = await feed.page(0)
    assert ([1, 2, 3, 4], 4) == ([one.sequence for one in page.events], page.reached)
    has = 10
    assert list(range(5, 11)) == [one.sequence for one in await read(feed, page.reached)]


async def test_a_full_page_is_one_request(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader is asked only where a replica has nothing."""
    await log.publish(10)

    async def never(*_: object, **__: object) -> None:
        raise AssertionError("the leader was asked")

    monkeypatch.setattr(JetStreamApi, "request", never)
    page = await JetStreamFeed(log.nc).page(0)
    assert (10, False) == (len(page.events), page.more)
