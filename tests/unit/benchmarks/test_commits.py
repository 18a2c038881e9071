"""What the benchmarks make of the persisters' logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks.commits import Commit, CommitLog, ages, committed_until
from benchmarks.processes import ROOT, Product

SECOND = 1_000_000_000


def line(second: int, persisted: int, **more: Any) -> bytes:
    stamp = f"1970-01-01T00:00:{second:02d}Z"
    return orjson.dumps({"event": "EVENT_PERSISTED", "timestamp": stamp, "persisted": persisted, **more}) + b"\n"


def log(*commits: Commit) -> CommitLog:
    return CommitLog(Path("unused"), list(commits))


def test_a_log_is_read_as_it_grows(tmp_path: Path) -> None:
    """A line that is being written waits; starting the process is no part of a drain."""
    path = tmp_path / "log"
    started = {"event": "EVENT_WORKER_STARTED", "timestamp": "1970-01-01T00:00:01Z"}
    path.write_bytes(b"plain text\n" + orjson.dumps(started) + b"\n" + line(2, 60, partition="03") + b'{"event": "EV')
    found = CommitLog(path)
    assert found.read() == 60
    path.write_bytes(path.read_bytes().removesuffix(b'{"event": "EV') + line(3, 0) + line(4, 40))
    assert found.read() == 100
    assert found.started_ns == SECOND
    assert [Commit(2 * SECOND, 60, 3), Commit(4 * SECOND, 40)] == found.commits


def test_a_log_that_is_not_there_yet_has_no_commits(tmp_path: Path) -> None:
    """The process may be about to start."""
    assert CommitLog(tmp_path / "log").read() == 0


def test_the_plain_service_says_when_each_event_was_received(tmp_path: Path) -> None:
    """Its events have no order."""
    path = tmp_path / "log"
    path.write_bytes(orjson.dumps({"committed_ns": 9, "received_ns": [2, 5]}) + b"\n")
    found = CommitLog(path)
    assert found.read() == 2
    assert [(2, 7), (5, 4)] == list(ages([found], [set()], {}))


def test_a_line_of_a_partition_commits_its_next_events() -> None:
    """The n-th event of a partition belongs to the line with which its count reaches n."""
    found = log(Commit(10, 1, 0), Commit(20, 2, 1), Commit(30, 2, 0))
    assert [(1, 9), (2, 28), (3, 27), (4, 16), (5, 15)] == list(ages([found], [{0, 1}], {0: [1, 2, 3], 1: [4, 5]}))


def test_a_line_of_a_round_commits_the_oldest_events_of_the_process() -> None:
    """Another process's partitions have lines of their own."""
    found = [log(Commit(10, 2), Commit(30, 1)), log(Commit(50, 1))]
    assert [(1, 9), (3, 7), (4, 26), (2, 48)] == list(ages(found, [{0, 1}, {2}], {0: [1, 4], 1: [3], 2: [2]}))


def test_what_is_committed_at_a_moment_is_what_the_lines_until_then_say() -> None:
    """That is the lag when the last event is accepted."""
    assert committed_until([log(Commit(10, 3), Commit(20, 4)), log(Commit(15, 5))], 15) == 8


def test_another_checkout_has_a_label(tmp_path: Path) -> None:
    """It is run with its own Python where it has one."""
    (tmp_path / "services").mkdir()
    found = Product.parse(f"before={tmp_path}")
    assert ("before", tmp_path) == (found.label, found.root)
    assert Product.parse(str(tmp_path)).label == tmp_path.name
    assert Product().root == ROOT
    with pytest.raises(ValueError, match="no checkout"):
        Product.parse(f"before={tmp_path / 'services'}")
