"""Raw requests to a real JetStream API: what nats-py's manager does not offer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import nats
import pytest
from nats.aio.msg import Msg

from fiq.errors import PermanentError
from services.cli.embedded.processes import Cluster
from services.log.errors import LogUnavailableError
from services.log.jetstream.api import ApiError, JetStreamApi
from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.reader import StreamReading
from services.log.jetstream.stream import STREAM, cursor_config, cursor_name, provision
from services.log.settings import LogSettings
from tests.support.broker import connected, plain_server, taken
from tests.support.cluster import delete_streams
from tests.support.polling import eventually
from tests.support.raw_nats import message, publish_raw

#: what the broker might say instead of a message, and what it never says
STATUS = (b"404", b"204", b"408", b"4x")


@pytest.fixture
def settings(single_node: Cluster) -> LogSettings:
    return LogSettings(servers=tuple(single_node.urls), replicas=1, partitions=100, max_bytes=64 * 2**20)


@pytest.fixture
async def nc(single_node: Cluster, settings: LogSettings) -> AsyncIterator[Connection]:
    await delete_streams(single_node)
    connection = await connect(settings, name="test", on_closed=pytest.fail)
    await provision(connection, settings)
    yield connection
    await close(connection)


async def test_what_does_not_exist_is_none(nc: Connection) -> None:
    """Not an error: callers decide."""
    api = JetStreamApi(nc)

    assert await api.stream_info("nothing") is None
    assert await api.consumer_info(STREAM, "nothing") is None
    assert await api.get_message(STREAM, 1) is None


async def test_an_error_answer_carries_its_codes(nc: Connection) -> None:
    """And its root says whether to try again."""
    with pytest.raises(ApiError) as caught:
        await JetStreamApi(nc).request("CONSUMER.INFO.nothing.at_all")

    assert (caught.value.code, caught.value.err_code) == (404, 10059)
    assert isinstance(caught.value, PermanentError)


async def test_every_consumer_is_named(nc: Connection) -> None:
    """And one that is deleted twice is gone."""
    api = JetStreamApi(nc)
    for generation in (1, 2, 3):
        await api.create_consumer(STREAM, cursor_config("main", 57, generation, 1))
    for _ in range(2):
        await api.delete_consumer(STREAM, cursor_name("main", 57, 2))

    assert ["fi-workers-main-57-1", "fi-workers-main-57-3"] == sorted(await api.consumer_names(STREAM))


async def test_the_leader_shows_a_message_as_any_replica_does(nc: Connection) -> None:
    """By its sequence, and the next one of a subject; None where there is none."""
    await nc.request("fi.events.c1", b"body", headers={"Nats-Msg-Id": "c1/1"}, timeout=5)
    api = JetStreamApi(nc)

    replica, leader = await api.get_message(STREAM, 1), await api.leader_message(STREAM, 1)
    assert replica is not None
    assert leader is not None
    assert {**replica, "pending": 0} == {**leader, "pending": 0}
    assert await api.leader_message(STREAM, 1) == await api.leader_message(STREAM, 1, next_of="fi.events.57.*")
    assert await api.leader_message(STREAM, 2) is None


async def test_a_message_comes_back_as_it_was_stored(nc: Connection) -> None:
    """With the time at which the broker stored it."""
    await nc.request("fi.events.c1", b"body", headers={"Nats-Msg-Id": "c1/1"}, timeout=5)

    message = await JetStreamApi(nc).get_message(STREAM, 1)

    assert message is not None
    assert (message["subject"], message["seq"], message["data"]) == ("fi.events.57.c1", 1, b"body")
    assert message["headers"] == {"Nats-Msg-Id": "c1/1"}
    assert datetime.fromisoformat(message["time"][:19] + "Z").tzinfo is not None


@pytest.mark.parametrize("headers", [b"NATS/1.0 503\r\n\r\n", *(b"NATS/1.0\r\nStatus: %b\r\n\r\n" % s for s in STATUS)])
async def test_a_stored_message_may_look_like_a_status(nc: Connection, single_node: Cluster, headers: bytes) -> None:
    """Anybody who may publish could stop trim otherwise, or hide a message."""
    await publish_raw(single_node.urls[0], [message(b"c1", headers)])
    api = JetStreamApi(nc)

    await eventually(lambda: api.leader_message(STREAM, 1))
    found = await api.get_message(STREAM, 1)
    read = [at async for at, _ in StreamReading(nc, timeout=5).tail(57, "c1", 0, 1)]

    assert found is not None
    assert ([1], 1, b"garbage") == (read, found["seq"], found["data"])


async def test_purging_deletes_below_the_sequence(nc: Connection) -> None:
    """And says how many."""
    for _ in range(5):
        await nc.request("fi.events.c1", b"x", timeout=5)
    api = JetStreamApi(nc)

    assert await api.purge(STREAM, 4) == 3
    assert await api.get_message(STREAM, 3) is None
    assert await api.get_message(STREAM, 4) is not None


async def test_a_purge_that_was_not_sent_never_is(nc: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would delete at the next connection, when an operator may have put an older file in a partition's place."""
    await nc.request("fi.events.c1", b"x", timeout=5)
    with monkeypatch.context() as lost:
        lost.setattr(nc, "_flush_pending", _nothing)
        with pytest.raises(LogUnavailableError, match="no answer"):
            await JetStreamApi(nc, timeout=0.1).purge(STREAM, 2)

    await nc.flush()

    assert await JetStreamApi(nc).leader_message(STREAM, 1)


async def test_nothing_is_purged_without_a_connection(nc: Connection, single_node: Cluster) -> None:
    """Nor at the next one."""
    await nc.request("fi.events.c1", b"x", timeout=5)
    await asyncio.to_thread(single_node.stop_all)
    try:
        await eventually(lambda: not nc.is_connected)
        with pytest.raises(LogUnavailableError, match="no connection"):
            await JetStreamApi(nc).purge(STREAM, 2)
    finally:
        await asyncio.to_thread(single_node.start_node, 0)
        await asyncio.to_thread(single_node.wait_ready)
    await eventually(lambda: nc.is_connected)
    await nc.flush()

    assert await JetStreamApi(nc).leader_message(STREAM, 1)


@pytest.mark.parametrize("answered", [1, 3])
async def test_what_only_reads_is_asked_again_and_the_first_answer_counts(tmp_path: Path, answered: int) -> None:
    """Nodes that elect a leader say nothing; one that is slow may answer the first question after the last."""
    asked: list[str] = []

    async def answer(message: Msg) -> None:
        asked.append(message.reply)
        if len(asked) == 3:
            await message._client.publish(asked[answered - 1], b'{"state": {}}')

    with plain_server(tmp_path) as url:
        async with _answering(url, answer) as nc:
            assert {"state": {}} == await JetStreamApi(nc).stream_info(STREAM)

    assert 3 == len(asked) == len(set(asked))


async def test_silence_ends_and_what_changes_something_is_asked_once(tmp_path: Path) -> None:
    """It may have taken effect all the same."""
    asked: list[str] = []

    async def answer(message: Msg) -> None:
        asked.append(message.subject)

    with plain_server(tmp_path) as url:
        async with _answering(url, answer) as nc:
            api = JetStreamApi(nc, timeout=1)
            with pytest.raises(LogUnavailableError, match="no answer within 1 s"):
                await api.delete_message(STREAM, 1)
            with pytest.raises(LogUnavailableError, match="no answer within 1 s"):
                await api.get_message(STREAM, 1)
            await eventually(lambda: not [task for task in asyncio.all_tasks() if "request" in str(task.get_coro())])

    assert [f"$JS.API.STREAM.MSG.DELETE.{STREAM}", *[f"$JS.API.DIRECT.GET.{STREAM}"] * 2] == asked


@asynccontextmanager
async def _answering(url: str, answer: Callable[[Msg], Awaitable[None]]) -> AsyncIterator[Connection]:
    """Let *answer* speak for the JetStream API on a server without it, and yield another connection."""
    async with await nats.connect(url) as api:
        await api.subscribe("$JS.API.>", cb=answer)
        await taken(api)
        nc = await connected(url)
        yield nc
        await close(nc)


async def _nothing(**_: object) -> None:
    """Send nothing."""


async def test_a_closed_connection_is_unavailable(nc: Connection) -> None:
    """Whatever nats-py raises is translated."""
    await close(nc)

    with pytest.raises(LogUnavailableError):
        await JetStreamApi(nc).stream_info(STREAM)
