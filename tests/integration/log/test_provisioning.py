"""Provisioning: idempotent, safe in races, and every refusal says what to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.cli.embedded.processes import Cluster
from services.log.errors import LogUnavailableError, ProvisionError
from services.log.jetstream import stream as module
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.stream import (
    DEAD_STREAM,
    STREAM,
    dead_stream_config,
    provision,
    stream_config,
    stream_identity,
)
from services.log.protocol import LogIdentity
from services.log.settings import LogSettings
from tests.support.broker import plain_server
from tests.support.cluster import delete_streams
from tests.support.polling import eventually

MIB = 2**20


def _settings(cluster: Cluster, **different: Any) -> LogSettings:
    settings = LogSettings(servers=tuple(cluster.urls), max_bytes=64 * MIB, dead_max_bytes=16 * MIB)
    return replace(settings, **different)


async def _provision_once(settings: LogSettings) -> LogIdentity:
    nc = await connect(settings, name="test", on_closed=pytest.fail)
    try:
        return await provision(nc, settings)
    finally:
        await close(nc)


@pytest.fixture
async def nc(fresh_log: Cluster) -> AsyncIterator[Connection]:
    connection = await connect(_settings(fresh_log), name="test", on_closed=pytest.fail)
    yield connection
    await close(connection)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe a refusal of placement at once: these nodes have been up for long."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)


async def test_provisioning_creates_both_streams_as_they_are_defined(nc: Connection, cluster: Cluster) -> None:
    """Every field of the definitions, as the broker shows it."""
    settings = _settings(cluster)

    await provision(nc, settings)

    for name, wanted in ((STREAM, stream_config(settings)), (DEAD_STREAM, dead_stream_config(settings))):
        info = await JetStreamApi(nc).stream_info(name)
        assert info is not None
        metadata = info["config"].pop("metadata")
        assert wanted.pop("metadata").items() <= metadata.items()
        assert {key: info["config"].get(key) for key in wanted} == wanted


async def test_provisioning_twice_changes_nothing(nc: Connection, cluster: Cluster) -> None:
    """The same log, under the same identity, which reading it gives too."""
    first = await provision(nc, _settings(cluster))
    second = await provision(nc, _settings(cluster))

    assert second == first
    assert await stream_identity(nc, _settings(cluster)) == first


async def test_eight_processes_at_once_end_with_one_log(fresh_log: Cluster) -> None:
    """Services start together, and any of them may create the log."""
    settings = _settings(fresh_log)

    identities = await asyncio.gather(*(_provision_once(settings) for _ in range(8)))

    assert len(set(identities)) == 1


async def test_a_cluster_that_has_only_just_been_started_is_awaited(tmp_path: Path) -> None:
    """The nodes have no leader yet, and do not know each other."""
    young = Cluster(tmp_path)
    await asyncio.to_thread(young.launch)
    try:
        identity = await _provision_once(_settings(young))
    finally:
        await asyncio.to_thread(young.stop_all)

    assert identity.name == STREAM


async def test_limits_are_raised_and_lowered_within_what_is_safe(nc: Connection, cluster: Cluster) -> None:
    """An empty stream keeps 8 MiB free."""
    for limit in (64 * MIB, 96 * MIB, 8 * MIB):
        await provision(nc, _settings(cluster, max_bytes=limit))

        info = await JetStreamApi(nc).stream_info(STREAM)
        assert info is not None
        assert info["config"]["max_bytes"] == limit


async def test_an_experiment_grows_into_a_cluster_with_its_consumers(nc: Connection, cluster: Cluster) -> None:
    """From one replica to three, under the same identity; consumers follow their stream."""
    # given
    alone = await provision(nc, _settings(cluster, replicas=1))
    api = JetStreamApi(nc)
    consumer = {"name": "c", "durable_name": "c", "filter_subject": "fi.events.1.*", "ack_policy": "all"}
    await api.create_consumer(STREAM, {**consumer, "num_replicas": 0})

    # when
    grown = await provision(nc, _settings(cluster, replicas=3))

    # then
    async def followed() -> bool:
        info = await api.consumer_info(STREAM, "c")
        return info is not None and len(info.get("cluster", {}).get("replicas", [])) == 2

    await eventually(followed)
    assert grown == alone


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"partitions": 8}, "Set FI_PARTITIONS=16"),
        ({"replicas": 1}, "Set FI_REPLICAS=3"),
        ({"max_bytes": 2 * MIB}, "FI_STREAM_MAX_BYTES to 8"),
        ({"dead_max_bytes": 2 * MIB}, "FI_DEAD_MAX_BYTES to 8"),
        ({"max_bytes": 2**45}, "raise max_file_store"),
        ({"replicas": 5}, "start 5 nodes"),
    ],
)
@pytest.mark.usefixtures("impatient")
async def test_settings_that_the_log_cannot_follow_are_refused(
    nc: Connection, cluster: Cluster, different: dict[str, Any], message: str
) -> None:
    """And the stream stays what it was."""
    before = await provision(nc, _settings(cluster))

    with pytest.raises(ProvisionError, match=message):
        await provision(nc, _settings(cluster, **different))

    assert await provision(nc, _settings(cluster)) == before


@pytest.mark.parametrize(
    ("different", "message"), [({"max_bytes": 2**45}, "raise max_file_store"), ({"replicas": 5}, "start 5 nodes")]
)
@pytest.mark.usefixtures("impatient")
async def test_a_creation_that_has_no_room_is_refused(
    nc: Connection, cluster: Cluster, different: dict[str, Any], message: str
) -> None:
    """The nodes reserve the limit when the stream is created."""
    with pytest.raises(ProvisionError, match=message):
        await provision(nc, _settings(cluster, **different))


async def test_a_stream_of_another_program_is_left_alone(nc: Connection, cluster: Cluster) -> None:
    """It has our name, but not our metadata."""
    await JetStreamApi(nc).request(f"STREAM.CREATE.{STREAM}", {"name": STREAM, "subjects": ["orders"]})

    with pytest.raises(ProvisionError, match="was not made by fiq"):
        await provision(nc, _settings(cluster))


async def test_a_stream_that_takes_our_subjects_is_named_as_the_trouble(nc: Connection, cluster: Cluster) -> None:
    """It would acknowledge events into nowhere."""
    api = JetStreamApi(nc)
    await api.request("STREAM.CREATE.greedy", {"name": "greedy", "subjects": ["fi.>"]})
    try:
        with pytest.raises(ProvisionError, match="another stream takes subjects"):
            await provision(nc, _settings(cluster))
    finally:
        await api.request("STREAM.DELETE.greedy")


async def test_one_server_is_too_few_for_three_replicas(single_node: Cluster) -> None:
    """And there is a way out for experiments."""
    await delete_streams(single_node)

    with pytest.raises(ProvisionError, match=r"needs 3 nodes.*FI_REPLICAS=1"):
        await _provision_once(_settings(single_node))

    assert (await _provision_once(_settings(single_node, replicas=1))).name == STREAM


async def test_a_server_without_jetstream_is_refused(tmp_path: Path) -> None:
    """A plain nats-server stores nothing."""
    with plain_server(tmp_path) as url, pytest.raises(ProvisionError, match="JetStream is not enabled"):
        await _provision_once(LogSettings(servers=(url,)))


async def test_a_user_who_may_not_provision_is_told_so(tmp_path: Path) -> None:
    """Instead of a timeout: the violation arrives apart from the request."""
    users = '{ user: a, password: b, permissions: { publish: { deny: "$JS.API.INFO" } } }'
    configuration = f'jetstream {{ store_dir: "{tmp_path}/store" }}\nauthorization {{ users: [ {users} ] }}'
    with plain_server(tmp_path, configuration) as url, pytest.raises(ProvisionError, match="may not provision"):
        await _provision_once(LogSettings(servers=(url.replace("//", "//a:b@"),)))


async def test_a_log_that_was_not_provisioned_has_no_identity(nc: Connection, cluster: Cluster) -> None:
    """With FI_PROVISION off, another process must have created it."""
    with pytest.raises(ProvisionError, match="run `fiq provision`"):
        await stream_identity(nc, _settings(cluster))


async def test_without_a_majority_provisioning_gives_up_at_its_deadline(fresh_log: Cluster) -> None:
    """It says what to look at; the caller may try again."""
    await asyncio.gather(asyncio.to_thread(fresh_log.kill, 1), asyncio.to_thread(fresh_log.kill, 2))
    nc = await connect(_settings(fresh_log), name="test", on_closed=pytest.fail)

    with pytest.raises(LogUnavailableError, match="majority of its nodes"):
        await provision(nc, _settings(fresh_log), deadline=1)

    await close(nc)
