"""The embedded cluster: real servers that start, fail, come back and leave no process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import nats
import psutil
import pytest
from nats.js.api import StreamConfig

from services.cli.embedded import processes as module
from services.cli.embedded.processes import Cluster, free_ports
from services.cli.errors import ChildFailedError, PortTakenError
from tests.support.cluster import heal
from tests.support.polling import eventually_sync

STREAM = "fi-events"


@pytest.fixture
async def stream(fresh_log: Cluster) -> Cluster:
    """A cluster with one replicated stream of ten messages."""
    connection = await nats.connect(fresh_log.urls)
    js = connection.jetstream()
    await js.add_stream(StreamConfig(name=STREAM, subjects=["test"], num_replicas=3))
    for number in range(10):
        await js.publish("test", b"%d" % number)
    await connection.close()
    return fresh_log


def test_three_nodes_elect_one_meta_leader(cluster: Cluster) -> None:
    """A started cluster has healthy nodes and exactly one leader that sees all of them."""
    views = cluster.views()
    assert [seen.healthy for seen in views] == [True, True, True]
    assert [seen.meta_current for seen in views if seen.leads_meta] == [3]
    assert views[cluster.meta_leader() or 0].leads_meta


async def test_a_killed_leader_is_replaced_and_catches_up(stream: Cluster) -> None:
    """After kill -9 another node leads; after its restart every replica is current and nothing is gone."""
    first = stream.wait_stream_leader(STREAM)

    stream.kill(first)

    second = stream.wait_stream_leader(STREAM)
    assert first != second
    assert not stream.running(first)
    assert stream.views()[first].streams == {}

    stream.start_node(first)
    stream.wait_ready()

    assert [seen.streams[STREAM].messages for seen in stream.views()] == [10, 10, 10]


async def test_a_lame_duck_hands_its_leadership_over(stream: Cluster) -> None:
    """A node stopped with SIGUSR2 ends by itself, and another one leads the stream."""
    first = stream.wait_stream_leader(STREAM)

    stream.stop(first, lame_duck=True)

    assert stream.nodes[first].exit_code in {0, 1}  # it ended by itself: a killed one shows minus the signal
    assert stream.wait_stream_leader(STREAM) != first
    await heal(stream)


def test_data_survive_the_end_of_the_cluster(tmp_path: Path) -> None:
    """A cluster on the folder of an earlier one continues with its streams, on other ports."""

    async def publish(urls: list[str]) -> int:
        connection = await nats.connect(urls)
        js = connection.jetstream()
        await js.add_stream(StreamConfig(name=STREAM, subjects=["test"], num_replicas=1))
        sequence = (await js.publish("test", b"x")).seq
        await connection.close()
        return sequence

    with Cluster(tmp_path, nodes=1) as first:
        assert asyncio.run(publish(first.urls)) == 1
    with Cluster(tmp_path, nodes=1) as second:
        assert asyncio.run(publish(second.urls)) == 2
    assert first.urls != second.urls


def test_no_process_is_left_after_a_stop(tmp_path: Path) -> None:
    """stop_all ends every node that start began; a second call does nothing."""
    cluster = Cluster(tmp_path)
    cluster.start()
    pids = [node.pid for node in cluster.nodes]

    cluster.stop_all()
    cluster.stop_all()

    assert [pid for pid in pids if pid is not None and psutil.pid_exists(pid)] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
def test_no_process_is_left_when_the_parent_is_killed(tmp_path: Path) -> None:
    """kill -9 of the process that runs a cluster takes the nodes with it."""
    script = f"""
import pathlib, time
from services.cli.embedded.processes import Cluster
cluster = Cluster(pathlib.Path({str(tmp_path)!r}))
cluster.start()
print(*[node.pid for node in cluster.nodes], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        os.kill(parent.pid, signal.SIGKILL)

    assert len(pids) == 3
    eventually_sync(lambda: not any(_lives(pid) for pid in pids), timeout=10)


def test_a_port_that_was_taken_meanwhile_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of ports is repeated when a node finds its port in use."""
    with Cluster(tmp_path / "first", nodes=1) as first:
        taken = [ports for node in first.ports for ports in (node.client, node.monitoring, node.cluster)]
        choices = iter([taken, free_ports(3)])
        monkeypatch.setattr(module, "free_ports", lambda _: next(choices))
        with Cluster(tmp_path / "second", nodes=1) as second:
            assert first.urls != second.urls


def test_a_fixed_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    """A port that was asked for is not replaced silently."""
    with Cluster(tmp_path / "first", nodes=1) as first:
        second = Cluster(tmp_path / "second", nodes=1, client_ports=(first.ports[0].client,))
        with pytest.raises(PortTakenError, match="already in use"):
            second.start()
        assert not second.running(0)


def test_a_node_that_ends_at_once_shows_why(tmp_path: Path) -> None:
    """The error carries the end of the node's log."""
    with pytest.raises(ChildFailedError, match="max_file_store"):
        Cluster(tmp_path, nodes=1, max_file_store="plenty").start()


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
