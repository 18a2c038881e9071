"""Raw requests to a real JetStream API: what nats-py's manager does not offer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime

import pytest
from nats.aio.client import Client

from services.cli.cluster import Cluster
from services.contract.errors import PermanentError
from services.eventlog.errors import LogUnavailableError
from services.eventlog.jetstream.api import ApiError, JetStreamApi
from services.eventlog.jetstream.connection import close, connect
from services.eventlog.jetstream.definitions import cursor_config
from services.eventlog.jetstream.names import STREAM
from services.eventlog.jetstream.provision import provision
from services.eventlog.settings import LogSettings
from tests.support.cluster import delete_streams


@pytest.fixture
def settings(single_node: Cluster) -> LogSettings:
    return LogSettings(servers=tuple(single_node.urls), replicas=1, partitions=100, max_bytes=64 * 2**20)


@pytest.fixture
async def nc(single_node: Cluster, settings: LogSettings) -> AsyncIterator[Client]:
    await delete_streams(single_node)
    connection = await connect(settings, name="test", on_closed=pytest.fail)
    await provision(connection, settings)
    yield connection
    await close(connection)


async def test_what_does_not_exist_is_none(nc: Client) -> None:
    """Not an error: callers decide."""
    api = JetStreamApi(nc)

    assert await api.stream_info("nothing") is None
    assert await api.consumer_info(STREAM, "nothing") is None
    assert await api.get_message(STREAM, 1) is None


async def test_an_error_answer_carries_its_codes(nc: Client) -> None:
    """And its root says whether to try again."""
    with pytest.raises(ApiError) as caught:
        await JetStreamApi(nc).request("CONSUMER.INFO.nothing.at_all")

    assert (caught.value.code, caught.value.err_code) == (404, 10059)
    assert isinstance(caught.value, PermanentError)


async def test_every_consumer_is_listed_over_several_pages(nc: Client, settings: LogSettings) -> None:
    """The broker gives 256 at a time."""
    # a stream that nobody deletes: while the files of so many consumers go, nats-server 2.15.1 may bring messages of a
    # deleted stream back in the next one of that name
    api = JetStreamApi(nc)
    await api.request("STREAM.CREATE.many", {"name": "many", "subjects": ["many.*"]})
    for number in range(300):
        name = f"c{number}"
        config = {**cursor_config("main", 1, 1, 1), "name": name, "durable_name": name, "filter_subject": "many.1"}
        await api.create_consumer("many", config)

    listed = await api.list_consumers("many")

    assert {consumer["name"] for consumer in listed} == {f"c{number}" for number in range(300)}


async def test_a_message_comes_back_as_it_was_stored(nc: Client) -> None:
    """With the time at which the broker stored it."""
    await nc.request("fi.events.c1", b"body", headers={"Nats-Msg-Id": "c1/1"}, timeout=5)

    message = await JetStreamApi(nc).get_message(STREAM, 1)

    assert message is not None
    assert (message["subject"], message["seq"], message["data"]) == ("fi.events.57.c1", 1, b"body")
    assert message["headers"] == {"Nats-Msg-Id": "c1/1"}
    assert datetime.fromisoformat(message["time"][:19] + "Z").tzinfo is not None


async def test_purging_deletes_below_the_sequence(nc: Client) -> None:
    """And says how many."""
    for _ in range(5):
        await nc.request("fi.events.c1", b"x", timeout=5)
    api = JetStreamApi(nc)

    assert await api.purge(STREAM, 4) == 3
    assert await api.get_message(STREAM, 3) is None
    assert await api.get_message(STREAM, 4) is not None


async def test_a_closed_connection_is_unavailable(nc: Client) -> None:
    """Whatever nats-py raises is translated."""
    await close(nc)

    with pytest.raises(LogUnavailableError):
        await JetStreamApi(nc).stream_info(STREAM)
