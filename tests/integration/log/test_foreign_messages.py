"""Messages with bytes that our clients never send arrive and stop nothing (DESIGN, G6).

In the stock client each of the subjects below ends the reading task or the connection, each time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from nats.aio.client import Client

from services.cli.embedded.processes import Cluster
from services.log.jetstream.connection import close, connect
from services.log.jetstream.stream import provision
from services.log.settings import LogSettings
from tests.support.broker import taken
from tests.support.following import Sink
from tests.support.raw_nats import HEADERS, SUBJECTS, message, publish_raw


@pytest.fixture
async def follower(single_node: Cluster) -> AsyncIterator[tuple[Client, Sink]]:
    settings = LogSettings(servers=tuple(single_node.urls), partitions=1, replicas=1, max_bytes=64 * 2**20)
    nc = await connect(settings, name="test", on_closed=lambda _: None)
    identity = await provision(nc, settings)
    async with Sink(nc, identity).following() as made:
        yield nc, made
    await nc.request("$JS.API.STREAM.DELETE.fi-events")
    await close(nc)


async def test_any_subject_and_any_header_is_delivered(single_node: Cluster, follower: tuple[Client, Sink]) -> None:
    """The server checks neither. What is no text shows as U+FFFD; nothing is lost, repeated or repaired."""
    nc, reader = follower
    sent = [message(subject) for subject in SUBJECTS] + [message(b"c", headers) for headers in HEADERS]
    await publish_raw(single_node.urls[0], sent)
    assert list(range(1, len(sent) + 1)) == await reader.take(len(sent), acknowledge=False, timeout=10)
    assert [s.decode("utf-8", "replace") for s in SUBJECTS] == [d.consultation for d in reader.taken[: len(SUBJECTS)]]
    assert [] == reader.repairs
    assert nc.is_connected


async def test_a_request_with_a_reply_subject_that_is_no_text_leaves_the_connection_alive(
    single_node: Cluster, follower: tuple[Client, Sink]
) -> None:
    """Anybody may ask `$SRV.PING`, which persisters listen to."""
    nc, _ = follower
    subscription = await nc.subscribe("$SRV.PING")
    await taken(nc)
    await publish_raw(single_node.urls[0], [b"PUB $SRV.PING \xff\xfe 1\r\nx\r\n", b"PUB $SRV.PING a\x0bb 1\r\nx\r\n"])
    assert "�" in (await subscription.next_msg(timeout=5)).reply
    assert (await subscription.next_msg(timeout=5)).reply == "a\x0bb"
    await nc.flush(timeout=2)
