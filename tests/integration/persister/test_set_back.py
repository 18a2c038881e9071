"""A log that was set back, under a whole pipeline: what docs/operations.md says loses nothing of either history."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.cli.embedded.processes import Cluster
from services.log.jetstream.log import Trimmer
from services.log.jetstream.placement import BucketPlacements
from tests.support.cluster import set_back, stores_copied
from tests.support.persisters import PARTITIONS, Contents, Log, Persister, corpus_of, joined, persisted, provisioned
from tests.support.polling import eventually
from tests.support.service import Service


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[Log]:
    """A cluster of its own: its disks are exchanged."""
    with Cluster(tmp_path / "cluster") as cluster:
        async with provisioned(cluster) as made:
            yield made


# nats-py forgets a socket at a reconnect
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_log_that_was_set_back_loses_nothing_of_either_history(log: Log, tmp_path: Path) -> None:
    """50 events, a copy of the disks, 100 more, the copy is put back, 150 more: all of them were answered with 202.

    The partitions stop and skip nothing. A new store takes what the stream has, and gets what only the old corpus has.
    """
    old, new, copy = tmp_path / "old", tmp_path / "new", tmp_path / "copy"
    with Persister(tmp_path / "a", log.cluster, old) as persister:
        await persister.ready()
        first = await log.publish(50)
        await persisted(old, first)
        await asyncio.to_thread(stores_copied, log.cluster, copy)
        await persister.ready()
        only_in_hdf5 = await log.publish(100)
        await persisted(old, first, only_in_hdf5)
        assert 0 == await persister.end()
    await asyncio.to_thread(set_back, log.cluster, copy)

    with Persister(tmp_path / "b", log.cluster, old) as persister:
        await persister.port()
        only_in_the_stream = await log.publish(150)
        body = await persister.not_ready("A log that was set back")
        await eventually(lambda: _all_stopped(persister))
        assert 0 == await persister.end()
    assert "skipped" in body
    assert joined([first, only_in_hdf5]) == corpus_of(old)
    state = await log.state()
    assert (1, 200) == (state["first_seq"], state["last_seq"])

    with (
        Persister(tmp_path / "c", log.cluster, new, FI_STORE="main2") as persister,
        Service(tmp_path, "services.ingest", **_ingest(log)) as ingest,
    ):
        await persister.ready()
        await persisted(new, first, only_in_the_stream)
        port = (await asyncio.to_thread(ingest.wait_for, "INGEST_STARTED"))["port"]
        exported = tmp_path / "exported.ndjson"
        await _fiq("export", "--all", "--after", "40", "--corpus", str(old), "--output", str(exported))
        told = await _fiq("post", str(exported), "--exported", "--url", f"http://127.0.0.1:{port}")
        assert ["accepted", "110", "duplicates", "10"] == told.split()[:4]
        everything = joined([first, only_in_the_stream, only_in_hdf5])
        await eventually(lambda: _ids(corpus_of(new)) == _ids(everything))
        assert 0 == await persister.end()


# nats-py forgets a socket at a reconnect
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_log_that_is_set_back_under_living_persisters_is_not_trimmed(log: Log, tmp_path: Path) -> None:
    """Their keys go back with it, and they put nothing of the other history there: it would delete what no file has."""
    data, copy = tmp_path / "data", tmp_path / "copy"
    with Persister(tmp_path / "a", log.cluster, data, FI_RETENTION="2") as persister:
        await persister.ready()
        first = await log.publish(50)
        await persisted(data, first)
        await asyncio.to_thread(stores_copied, log.cluster, copy)
        await persister.ready()
        await eventually(lambda: _least_committed(log, 50), timeout=20)
        only_in_hdf5 = await log.publish(100)
        await persisted(data, first, only_in_hdf5)
        await asyncio.to_thread(set_back, log.cluster, copy)
        await log.publish(150)
        await persister.not_ready("A log that was set back")
        await eventually(lambda: _all_stopped(persister))
        refused = await Trimmer(log.nc, retention=0).trim()
        assert 0 == await persister.end()
    assert refused.committed <= 50
    assert (await log.state())["first_seq"] <= 51


async def _least_committed(log: Log, sequence: int) -> bool:
    placed = (await BucketPlacements(log.nc, log.settings).read()).partitions
    return min(one.committed for one in placed.values()) >= sequence


async def _all_stopped(persister: Persister) -> bool:
    _, body = await persister.ask("/readyz")
    return body.count("is stopped") == PARTITIONS


def _ids(contents: Contents) -> dict[str, list[str]]:
    return {name: sorted(str(event_id) for event_id in ids) for name, ids in contents.items()}


def _ingest(log: Log) -> dict[str, str]:
    return {
        "FI_LOG_URL": log.cluster.url,
        "FI_STORE": "main2",
        "FI_PARTITIONS": str(PARTITIONS),
        "FI_STREAM_MAX_BYTES": "64MiB",
        "FI_PORT": "0",
    }


async def _fiq(*arguments: str) -> str:
    command = [sys.executable, "-m", "services.cli.main", *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False, timeout=60)
    assert 0 == done.returncode, done.stderr
    return str(done.stdout)
