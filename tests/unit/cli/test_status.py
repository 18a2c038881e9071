"""What `fiq status` shows of a cluster."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping

import pytest

from services.cli.status import ClusterSnapshot, ClusterStatus, Partition, Worker, _nodes, show_status
from services.log.status import LiveProcess, LogState, PartitionProgress, ReplicaReport, StreamReport

VOLUMES = ("0192f0c2-0000-7000-8000-00000000000a", "0192f0c2-0000-7000-8000-00000000000b")


class Terminal(io.StringIO):
    """What a terminal shows."""

    def isatty(self) -> bool:
        return True


def partition(number: int, volume: str) -> Partition:
    return Partition(f"{number:02d}", 123456789012, 87654321, 4711.0, volume, 1, 1, ("persister-1",))


def test_status_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lag and sequences are whole, each partition is one line, and a volume's id is there once, above the table."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    workers = (Worker("persister-1", "host", "1234567", VOLUMES[0], ("00",)),)
    partitions = tuple(partition(number, VOLUMES[number % 2]) for number in range(16))

    show_status(ClusterStatus((), None, None, workers, partitions, ()))

    shown = terminal.getvalue()
    assert [1, 1] == [shown.count(volume) for volume in VOLUMES]
    assert [f"volume 1: {VOLUMES[0]}", f"volume 2: {VOLUMES[1]}"] == re.findall("^volume .*$", shown, re.MULTILINE)
    rows = re.findall(r"^\d\d .*$", shown, re.MULTILINE)
    expected = [
        f"{n:02d} 123456789012 87654321 4711 s persister-1 (pid 1234567) {1 + n % 2}".split() for n in range(16)
    ]
    assert expected == [row.split() for row in rows]
    assert max(map(len, shown.splitlines())) <= 80


def test_the_status_of_a_log_without_a_broker_begins_with_its_volume(capsys: pytest.CaptureFixture[str]) -> None:
    """Without nodes and streams there is nothing to set apart."""
    workers = (Worker("persister-1", "host", "7", VOLUMES[0], ("00",)),)
    show_status(ClusterStatus((), None, None, workers, (partition(0, VOLUMES[0]),), ()))
    assert capsys.readouterr().out.startswith(f"volume 1: {VOLUMES[0]}\n")


def process(partitions: set[int], progress: Mapping[int, PartitionProgress], store: str = "main") -> LiveProcess:
    return LiveProcess(store, VOLUMES[0], frozenset(partitions), progress, stream_sequence=9)


def test_while_the_stream_has_no_leader_the_persisters_say_what_is_committed() -> None:
    """Placements are known by the leader only; progress by each owner. In a handover the furthest counts."""
    processes = (
        process({0, 1}, {0: PartitionProgress(5, 2), 1: PartitionProgress(7, 0)}),
        process({1}, {1: PartitionProgress(8, 1)}),
        process({0}, {0: PartitionProgress(99, 0)}, store="second"),
    )
    found = ClusterSnapshot("main", LogState(processes=processes), ()).partitions

    assert [(0, 5, 2, 1), (1, 8, 1, 2)] == [(p.partition, p.committed, p.waiting.events, p.owners) for p in found]


@pytest.mark.parametrize(
    ("replica", "expected"),
    [
        (ReplicaReport("n1", current=True, offline=False, lag=0, seen_seconds=0.2), "current"),
        (ReplicaReport("n1", current=False, offline=False, lag=7, seen_seconds=0.2), "7 behind"),
        (ReplicaReport("n1", current=False, offline=False, lag=7, seen_seconds=60.0), "silent for 60 s"),
        (ReplicaReport("n1", current=False, offline=False, lag=7, seen_seconds=None), "silent since the election"),
        (ReplicaReport("n1", current=False, offline=True, lag=7, seen_seconds=60.0), "offline"),
    ],
)
def test_a_node_that_is_silent_does_not_look_like_one_that_catches_up(replica: ReplicaReport, expected: str) -> None:
    """A frozen former leader was never heard by its successor."""
    stream = StreamReport("", True, "n2", (replica,), 0, 0, 1, 1, 0)
    nodes = {node.name: node.condition for node in _nodes(stream, (), ())}
    assert {"n1": expected, "n2": "current"} == nodes
