"""A log that was set back: the disks of all nodes are restored from an older copy, and clients go on posting.

The stream keeps its name and its creation time, so only the message at the sink's position shows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.cli.embedded.processes import Cluster
from services.log.errors import LogMismatchError
from services.log.jetstream import follower as module
from services.log.protocol import Position
from tests.support.cluster import set_back, stores_copied
from tests.support.following import Sink
from tests.support.persisters import Log, provisioned


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[Log]:
    """A cluster of its own: its disks are exchanged."""
    with Cluster(tmp_path / "cluster") as cluster:
        async with provisioned(cluster, partitions=1) as made:
            yield made


async def test_a_stream_that_was_set_back_stops_the_partition(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it ends before the sink's position, and also when it has grown past that; nothing of it is handed out."""
    monkeypatch.setattr(module, "LAG_SECONDS", 1.0)
    copy = tmp_path / "copy"
    async with Sink(log.nc, log.identity).following() as reader:
        await log.publish(50)
        await reader.take(50)
        await asyncio.to_thread(stores_copied, log.cluster, copy)
        await log.publish(100)
        await reader.take(100)
        position = reader.position
        before_the_copy = Position(50, (reader.taken[49].headers or {})["Nats-Msg-Id"])

    await asyncio.to_thread(set_back, log.cluster, copy)
    assert 50 == (await log.state())["last_seq"]
    with pytest.raises(LogMismatchError, match=r"ends at sequence 50, .*holds events up to 150.*after 50 are only in"):
        await Sink(log.nc, log.identity).follower.start(position)
    await log.publish(150)
    with pytest.raises(LogMismatchError, match=r"sequence 150 .*not the event.*A log that was set back"):
        await Sink(log.nc, log.identity).follower.start(position)
    async with Sink(log.nc, log.identity).following(before_the_copy) as other:
        assert list(range(51, 201)) == await other.take(150)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # nats-py forgets a socket at a reconnect
async def test_a_follower_that_lives_through_it_stops_too(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All nodes were away for seconds only, and its cursor is made anew: it must not go on with another history."""
    monkeypatch.setattr(module, "LAG_SECONDS", 20.0)
    copy = tmp_path / "copy"
    await log.publish(50)
    await asyncio.to_thread(stores_copied, log.cluster, copy)
    async with Sink(log.nc, log.identity).following() as reader:
        await log.publish(100)
        await reader.take(150)
        await asyncio.to_thread(set_back, log.cluster, copy)
        await log.publish(150)
        with pytest.raises(LogMismatchError, match="was set back"):
            await reader.take(1)
        assert [] == reader.follower.take(max_events=100, max_bytes=2**20)
