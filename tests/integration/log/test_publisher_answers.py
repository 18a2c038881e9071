"""The publisher against a scripted broker on a real server: answers that a healthy cluster would not give."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from fiq.event import Event, new_event_id
from services.cli.embedded.processes import Cluster
from services.log.errors import DuplicateInFlightError, LogRefusedError, LogUnavailableError
from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.publisher import Publisher
from services.log.protocol import Appended
from services.log.settings import LogSettings
from tests.support.broker import refused, scripted, stored
from tests.support.cluster import delete_streams
from tests.support.polling import eventually


@pytest.fixture
async def nc(single_node: Cluster) -> AsyncIterator[Connection]:
    await delete_streams(single_node)
    connection = await connect(LogSettings(servers=tuple(single_node.urls)), name="test", on_closed=pytest.fail)
    yield connection
    await close(connection)


async def _publisher(nc: Connection, deadline: float) -> Publisher:
    publisher = Publisher(nc, deadline=deadline, max_in_flight=10)
    await publisher.start()
    return publisher


def _event() -> Event:
    return Event("c1", new_event_id(), 1, b"{}")


@pytest.mark.parametrize("err_code", [10008, 10023, 10077, 10158, 10167])
async def test_passing_trouble_is_retried_with_the_same_id(nc: Connection, single_node: Cluster, err_code: int) -> None:
    """Until the broker can; the caller sees one position."""
    event = _event()
    publisher = await _publisher(nc, 5)

    async with scripted(single_node.url, lambda n: refused(err_code) if n < 4 else stored(9)) as broker:
        outcome = await publisher.append(event)

    assert outcome == Appended(9, duplicate=False)
    assert broker.received == 4 * [event.message_id]
    assert publisher.retries == 3


async def test_no_responders_is_retried_until_there_is_one(nc: Connection, single_node: Cluster) -> None:
    """Status 503 comes at once while no node leads."""
    publisher = await _publisher(nc, 10)
    call = asyncio.create_task(publisher.append(_event()))
    await eventually(lambda: publisher.retries > 1)

    async with scripted(single_node.url, lambda _: stored(3)):
        assert await call == Appended(3, duplicate=False)


async def test_silence_is_broken_by_another_attempt(nc: Connection, single_node: Cluster) -> None:
    """The first answer was lost with a node."""
    publisher = await _publisher(nc, 5)

    async with scripted(single_node.url, lambda n: None if n == 1 else stored(4, duplicate=True)):
        assert await publisher.append(_event()) == Appended(4, duplicate=True)


async def test_another_writer_that_does_not_end_is_told_apart(nc: Connection, single_node: Cluster) -> None:
    """The client should wait and send the same key again."""
    publisher = await _publisher(nc, 0.5)

    async with scripted(single_node.url, lambda _: refused(10158, "in process")):
        with pytest.raises(DuplicateInFlightError):
            await publisher.append(_event())


async def test_an_attempt_of_our_own_that_hangs_is_no_other_writer(nc: Connection, single_node: Cluster) -> None:
    """The first attempt had no answer, so what is in flight is most likely that one: the outcome is open."""
    publisher = await _publisher(nc, 1.5)

    async with scripted(single_node.url, lambda n: None if n == 1 else refused(10158, "in process")):
        with pytest.raises(LogUnavailableError):
            await publisher.append(_event())


@pytest.mark.parametrize("err_code", [10025, 10054, 10060, 10071, 10097])
async def test_a_fatal_code_ends_the_call_at_once(nc: Connection, single_node: Cluster, err_code: int) -> None:
    """The same message would be refused again."""
    publisher = await _publisher(nc, 5)

    async with scripted(single_node.url, lambda _: refused(err_code, code=400)) as broker:
        with pytest.raises(LogRefusedError):
            await publisher.append(_event())

    assert len(broker.received) == 1


async def test_another_stream_that_answers_is_refused(nc: Connection, single_node: Cluster) -> None:
    """It took the event away from ours."""
    publisher = await _publisher(nc, 5)

    async with scripted(single_node.url, lambda _: b'{"stream":"greedy","seq":1}'):
        with pytest.raises(LogRefusedError, match="'greedy' took a message of fi-events"):
            await publisher.append(_event())


async def test_a_server_that_is_away_costs_the_deadline_and_no_more(nc: Connection, single_node: Cluster) -> None:
    """Nothing is buffered for later while there is no connection; when it is back, so is the publisher."""
    # given
    publisher = await _publisher(nc, 0.5)
    single_node.kill(0)
    await eventually(lambda: not nc.is_connected)

    # when
    started = time.monotonic()
    with pytest.raises(LogUnavailableError, match="no connection"):
        await publisher.append(_event())

    # then
    assert 0.4 < time.monotonic() - started < 10  # the server stays away
    assert nc.pending_data_size == 0
    single_node.start_node(0)
    await eventually(lambda: nc.is_connected)
    async with scripted(single_node.url, lambda _: stored()):
        assert await publisher.append(_event()) == Appended(1, duplicate=False)


async def test_a_frozen_server_costs_the_deadline_and_no_more(nc: Connection, single_node: Cluster) -> None:
    """Its connection stays open and takes megabytes that the server does not read; no call may hang in the socket."""
    publisher = await _publisher(nc, 1)
    large = replace(_event(), body=b"x" * 1_500_000)
    single_node.pause(0)
    try:
        started = time.monotonic()
        calls = (publisher.append(replace(large, event_id=new_event_id())) for _ in range(10))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        took = time.monotonic() - started
    finally:
        single_node.resume(0)

    assert {type(outcome) for outcome in outcomes} == {LogUnavailableError}
    assert took < 10  # the server is frozen until after this
    assert publisher.in_flight == 0


async def test_what_gathers_behind_publishes_that_hang_has_its_own_deadline(
    nc: Connection, single_node: Cluster
) -> None:
    """It is sent after a while although nothing before it was answered, and fails in time."""
    publisher = await _publisher(nc, 2)
    async with scripted(single_node.url, lambda _: None):
        started = time.monotonic()
        outcomes = await asyncio.gather(*(publisher.append(_event()) for _ in range(10)), return_exceptions=True)

    assert {type(outcome) for outcome in outcomes} == {LogUnavailableError}
    assert time.monotonic() - started < 3.5
    assert publisher.in_flight == 0


async def test_what_gathered_is_told_that_the_publisher_was_closed(nc: Connection, single_node: Cluster) -> None:
    """Nothing waits for ever."""
    publisher = await _publisher(nc, 30)
    async with scripted(single_node.url, lambda _: None):
        calls = [asyncio.create_task(publisher.append(_event())) for _ in range(10)]
        await asyncio.sleep(0)
        await publisher.close(grace=0.1)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert {type(outcome) for outcome in outcomes} == {LogUnavailableError}


async def test_closing_fails_what_is_in_flight_after_the_grace(nc: Connection, single_node: Cluster) -> None:
    """And takes nothing more; closing twice is fine."""
    publisher = await _publisher(nc, 30)
    async with scripted(single_node.url, lambda _: None):
        call = asyncio.create_task(publisher.append(_event()))
        await asyncio.sleep(0)

        await publisher.close(grace=0.1)
        await publisher.close()

        with pytest.raises(LogUnavailableError, match="closed before the broker answered"):
            await call
    with pytest.raises(LogUnavailableError, match="not open"):
        await publisher.append(_event())


async def test_closing_lets_what_is_in_flight_end(nc: Connection, single_node: Cluster) -> None:
    """An answer within the grace counts."""
    publisher = await _publisher(nc, 30)
    async with scripted(single_node.url, lambda n: refused(10008) if n == 1 else stored(5)):
        call = asyncio.create_task(publisher.append(_event()))
        await asyncio.sleep(0)

        await publisher.close(grace=5)

        assert await call == Appended(5, duplicate=False)
