"""What `fiq status` and `/readyz` say of a real cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from nats.aio.client import Client

from services.cli.cluster import Cluster
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.connection import close, connect
from services.eventlog.jetstream.definitions import consumer_config
from services.eventlog.jetstream.names import STREAM
from services.eventlog.jetstream.provision import provision
from services.eventlog.jetstream.report import ClusterReport, cluster_report, stream_ready
from services.eventlog.settings import LogSettings
from tests.support.polling import eventually


@pytest.fixture
def settings(fresh_log: Cluster) -> LogSettings:
    return LogSettings(servers=tuple(fresh_log.urls), partitions=2, max_bytes=64 * 2**20)


@pytest.fixture
async def nc(settings: LogSettings) -> AsyncIterator[Client]:
    connection = await connect(settings, name="test", on_closed=pytest.fail)
    yield connection
    await close(connection)


async def _place(nc: Client, settings: LogSettings, *partitions: int) -> None:
    for partition in partitions:
        metadata = {"fi_volume": f"volume-{partition}", "fi_epoch": "1"}
        await JetStreamApi(nc).create_consumer(STREAM, consumer_config(settings, partition, metadata))


async def test_a_cluster_without_a_log_is_reported_as_such(nc: Client, settings: LogSettings) -> None:
    """Before the first start of a service."""
    report = await cluster_report(nc, settings)

    assert report.stream is None
    assert [partition.exists for partition in report.partitions] == [False, False]
    assert await stream_ready(nc, settings) == ["stream fi-events does not exist"]


async def test_the_report_shows_the_stream_and_each_partitions_place_and_backlog(
    nc: Client, settings: LogSettings
) -> None:
    """c1 lives in partition 1 of 2."""
    # given
    identity = await provision(nc, settings)
    await _place(nc, settings, 1)
    for _ in range(3):
        await nc.request("fi.events.c1", b"x", timeout=5)

    # when
    async def counted() -> ClusterReport | None:  # the broker counts a little behind its answers
        report = await cluster_report(nc, settings)
        return report if report.partitions[1].pending == 3 else None

    report = await eventually(counted)

    # then
    assert report is not None
    stream = report.stream
    assert stream is not None
    assert (stream.created, stream.partitions, stream.messages) == (identity.created, 2, 3)
    assert (stream.first_sequence, stream.last_sequence, stream.max_bytes) == (1, 3, 64 * 2**20)
    assert {stream.leader, *(replica.name for replica in stream.replicas)} == {"n1", "n2", "n3"}
    assert stream.has_quorum
    unplaced, placed = report.partitions
    assert (unplaced.consumer, unplaced.exists) == ("fi-workers-main-00", False)
    assert (placed.volume, placed.epoch, placed.acknowledged) == ("volume-1", 1, 0)


async def test_the_log_is_ready_when_every_partition_has_a_consumer(nc: Client, settings: LogSettings) -> None:
    """Until then nobody would persist what is accepted."""
    await provision(nc, settings)
    await _place(nc, settings, 0)
    assert await stream_ready(nc, settings) == ["1 partitions have no consumer yet: start the persisters"]

    await _place(nc, settings, 1)

    assert await stream_ready(nc, settings) == []


async def test_the_log_stays_ready_without_one_node_and_not_without_two(
    nc: Client, settings: LogSettings, fresh_log: Cluster
) -> None:
    """A leader that lost its followers goes on answering for a while; that must not count."""
    # given
    await provision(nc, settings)
    await _place(nc, settings, 0, 1)
    leader = await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM)
    first, second = (index for index in range(3) if index != leader)

    # when
    fresh_log.kill(first)

    # then
    async def ready() -> bool:
        return await stream_ready(nc, settings) == []

    async def not_ready() -> bool:
        return await stream_ready(nc, settings) != []

    await eventually(ready)
    fresh_log.kill(second)
    await eventually(not_ready)
