"""The embedded cluster as tests use it."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import nats
import nats.errors

from services.cli.embedded.processes import Cluster
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, connect
from services.log.settings import LogSettings
from tests.support.polling import eventually

#: the streams of the product
STREAMS = ("fi-events", "fi-dead", "KV_fi-partitions")
#: the broker's error code for a stream that does not exist
_STREAM_NOT_FOUND = 10059


def reload(cluster: Cluster) -> None:
    """Have every node read its configuration and its certificates again."""
    for node in cluster.nodes:
        node.send(signal.SIGHUP)


async def delete_streams(cluster: Cluster) -> None:
    """Delete the product's streams with their consumers; it is fine when there are none."""
    connection = await connect(LogSettings(servers=tuple(cluster.urls)), name="test clean-up", on_closed=lambda _: None)
    try:
        for stream in STREAMS:
            await eventually(partial(_deleted, connection, stream), 30)
    finally:
        await connection.close()


async def _deleted(connection: Connection, stream: str) -> bool:
    try:
        reply = await connection.request(f"$JS.API.STREAM.DELETE.{stream}", timeout=5)
    except nats.errors.TimeoutError:  # some answers never come, although the request took effect
        return False
    error = json.loads(reply.data).get("error")
    assert error is None or error["err_code"] == _STREAM_NOT_FOUND, error
    return True


async def heal(cluster: Cluster) -> None:
    """Start the nodes that a test left dead or frozen, and wait until the cluster is whole."""
    for index in range(cluster.size):
        cluster.resume(index)
        if not cluster.running(index):
            cluster.start_node(index)
    await asyncio.to_thread(cluster.wait_ready)


async def consumers_of(nc: Connection, stream: str) -> list[dict[str, Any]]:
    """Return what each consumer of *stream* says of itself, as far as they answer."""
    api = JetStreamApi(nc)
    infos = [await api.consumer_info(stream, name) for name in await api.consumer_names(stream)]
    return [info for info in infos if info is not None]


def stores_copied(cluster: Cluster, target: Path) -> None:
    """Stop all nodes, copy their stores to *target*, as a backup of disks does, and start them again."""
    cluster.stop_all()
    for name in cluster.names:
        shutil.copytree(cluster.folder / name, target / name)
    _start(cluster)


def set_back(cluster: Cluster, copies: Path) -> None:
    """Stop all nodes, put the *copies* of their stores back, and start them again on the same ports."""
    cluster.stop_all()
    for name in cluster.names:
        shutil.rmtree(cluster.folder / name)
        shutil.copytree(copies / name, cluster.folder / name)
    _start(cluster)


def _start(cluster: Cluster) -> None:
    for index in range(cluster.size):
        cluster.start_node(index)
    cluster.wait_ready()
