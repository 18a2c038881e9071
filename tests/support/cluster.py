"""The embedded cluster as tests use it."""

from __future__ import annotations

import asyncio
import json

import nats

from services.cli.cluster import Cluster

#: the streams of the product
STREAMS = ("fi-events", "fi-dead")
#: the broker's error code for a stream that does not exist
_STREAM_NOT_FOUND = 10059


async def delete_streams(cluster: Cluster) -> None:
    """Delete the product's streams with their consumers; it is fine when there are none."""
    connection = await nats.connect(cluster.urls, name="test clean-up")
    try:
        for stream in STREAMS:
            reply = await connection.request(f"$JS.API.STREAM.DELETE.{stream}", timeout=10)
            error = json.loads(reply.data).get("error")
            assert error is None or error["err_code"] == _STREAM_NOT_FOUND, error
    finally:
        await connection.close()


async def heal(cluster: Cluster) -> None:
    """Start the nodes that a test left dead or frozen, and wait until the cluster is whole."""
    for index in range(cluster.size):
        cluster.resume(index)
        if not cluster.running(index):
            cluster.start_node(index)
    await asyncio.to_thread(cluster.wait_ready)
