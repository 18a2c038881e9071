"""The stream is read whole, also when messages get lost on their way here: NATS itself promises at most once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fiq.event import Event, new_event_id
from services.cli.embedded.processes import Cluster
from services.log.jetstream.reader import StreamReading
from services.log.jetstream.stream import stored_subject
from services.log.partitions import partition_of
from tests.support.broker import connected
from tests.support.cluster import delete_streams
from tests.support.lossy import lossy
from tests.support.persisters import PARTITIONS, Log, provisioned

PARTITION = partition_of("c1", PARTITIONS)


@pytest.fixture
async def log(single_node: Cluster) -> AsyncIterator[Log]:
    await delete_streams(single_node)
    async with provisioned(single_node) as made:
        yield made


async def append(log: Log, count: int) -> list[int]:
    events = [Event("c1", new_event_id(), 1, b'{"event_type":"%d"}' % number) for number in range(count)]
    return [(await log.publisher.append(event)).sequence for event in events]


class Losses:
    """Loses direct gets' answers for some sequences, each *times* over."""

    def __init__(self, *sequences: int, times: int) -> None:
        self.left = dict.fromkeys(sequences, times)
        self.lost: list[int] = []

    def __call__(self, message: bytes) -> bool:
        for sequence, left in self.left.items():
            if left and b"\r\nNats-Sequence: %d\r\n" % sequence in message:
                self.left[sequence] -= 1
                self.lost.append(sequence)
                return True
        return False


@asynccontextmanager
async def reading(log: Log, losses: Losses) -> AsyncIterator[StreamReading]:
    async with lossy(log.cluster.url, losses) as url:
        nc = await connected(url)
        yield StreamReading(nc, timeout=10)
        await nc.close()


async def read(log: Log, losses: Losses, last: int) -> list[int]:
    async with reading(log, losses) as stream:
        return [sequence async for sequence, event in stream.tail(PARTITION, "c1", 0, last) if event is not None]


async def test_the_broker_numbers_the_answers_of_a_batch(log: Log) -> None:
    """Each says which sequence was sent before it, and the end says what the last one was (ADR-31)."""
    stands = await append(log, 3)
    answers = await log.nc.subscribe(inbox := log.nc.new_inbox())
    wanted = b'{"seq":1,"next_by_subj":"%s","batch":2}' % stored_subject(PARTITION, "c1").encode()
    await log.nc.publish("$JS.API.DIRECT.GET.fi-events", wanted, reply=inbox)
    headers = [(await answers.next_msg(10)).headers or {} for _ in range(3)]
    assert [str(stands[0]), str(stands[1]), None] == [one.get("Nats-Sequence") for one in headers]
    assert ["0", str(stands[0]), str(stands[1])] == [one["Nats-Last-Sequence"] for one in headers]
    assert "204" == headers[2]["Status"]


@pytest.mark.parametrize("places", [(0,), (4,), (9,), (0, 1, 2), (3, 4, 9), range(10)])
async def test_a_message_that_was_lost_on_its_way_is_asked_for_again(log: Log, places: tuple[int, ...]) -> None:
    """The first of a batch, one in the middle, the last, all of them."""
    stands = await append(log, 10)
    losses = Losses(*(stands[place] for place in places), times=1)
    assert stands == await read(log, losses, stands[-1])
    assert sorted(losses.lost) == [stands[place] for place in places]


@pytest.mark.parametrize("place", [0, 4])
async def test_what_gets_lost_each_time_comes_from_the_leader(log: Log, place: int) -> None:
    """One by one, as where a replica lags: asking for batches has an end."""
    stands = await append(log, 10)
    assert stands == await read(log, Losses(stands[place], times=1000), stands[-1])
