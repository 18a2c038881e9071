"""What the persisters' logs say of their commits: how many events each one put into HDF5, and when.

That costs the measured processes nothing: they write these lines anyway.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import orjson

from services.core.logs import EVENT_PERSISTED, EVENT_WORKER_STARTED
from services.log.partitions import partition_of


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit.

    Attributes:
        at_ns: when, nanoseconds since the epoch.
        events: how many it committed.
        partition: whose it was, when the line says so.
        received_ns: when each of its events was received, when the line says so.
    """

    at_ns: int
    events: int
    partition: int | None = None
    received_ns: tuple[int, ...] = ()


@dataclass(slots=True)
class CommitLog:
    """The commits of one process, read from its log as it grows.

    Attributes:
        path: of the log.
        commits: so far.
        started_ns: when it first asked for events; 0 before that.
    """

    path: Path
    commits: list[Commit] = field(default_factory=list)
    started_ns: int = 0
    _offset: int = 0
    _events: int = 0

    def read(self) -> int:
        """Read the complete lines that have come, and return how many events are committed in all."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            lines, _, _ = file.read().rpartition(b"\n")
        self._offset += len(lines) + (1 if lines else 0)
        for line in lines.splitlines():
            if line.startswith(b"{"):
                self._take(orjson.loads(line))
        return self._events

    def _take(self, line: dict[str, Any]) -> None:
        if "committed_ns" in line:  # of the plain service
            received = tuple(line["received_ns"])
            self._add(Commit(line["committed_ns"], len(received), received_ns=received))
        elif line.get("event") == EVENT_WORKER_STARTED:
            self.started_ns = self.started_ns or _nanoseconds(line)
        elif line.get("event") == EVENT_PERSISTED and line["persisted"]:
            partition = line.get("partition")
            self._add(
                Commit(_nanoseconds(line), line["persisted"], int(partition) if isinstance(partition, str) else None)
            )

    def _add(self, commit: Commit) -> None:
        self.commits.append(commit)
        self._events += commit.events


def ages(logs: list[CommitLog], partitions: list[set[int]], stored: dict[int, list[int]]) -> Iterator[tuple[int, int]]:
    """Yield of each event when it was received, and how many nanoseconds later it was committed.

    A process commits the events of a partition in their order. Where a line says whose partition it was, the n-th event
    of that partition belongs to the line with which the partition's count reaches n. Otherwise the line is of all
    partitions of the process, and the same holds for their events in the order in which they were received.

    Args:
        logs: of each process.
        partitions: that each process has.
        stored: when each event of a partition was received, in the order of the stream.
    """
    for log, own in zip(logs, partitions, strict=True):
        told = [commit for commit in log.commits if commit.received_ns]
        for commit in told:
            yield from ((received, commit.at_ns - received) for received in commit.received_ns)
        rest = [commit for commit in log.commits if not commit.received_ns]
        for partition in own:
            mine = [commit for commit in rest if commit.partition == partition]
            if mine:
                yield from _in_order(mine, stored.get(partition, []))
        shared = [commit for commit in rest if commit.partition is None]
        if shared:
            yield from _in_order(shared, sorted(one for partition in own for one in stored.get(partition, [])))


def committed_until(logs: list[CommitLog], at_ns: int) -> int:
    """Return how many events were committed at *at_ns*."""
    return sum(commit.events for log in logs for commit in log.commits if commit.at_ns <= at_ns)


def received(data: Path, partitions: int) -> dict[int, list[int]]:
    """Return when each event of each partition was received, as the files of stopped persisters say."""
    found: dict[int, list[tuple[int, int]]] = {}
    for path in sorted(data.glob("[0-9][0-9].h5")):
        with h5py.File(path, "r") as file:
            for name, group in file["consultations"].items():
                rows = group["events"][:]
                pairs = zip(rows["seq"].tolist(), rows["received_ns"].tolist(), strict=True)
                found.setdefault(partition_of(name, partitions), []).extend(pairs)
    return {partition: [at for _, at in sorted(pairs)] for partition, pairs in found.items()}


def _in_order(commits: list[Commit], events: list[int]) -> Iterator[tuple[int, int]]:
    reached = list(accumulate(commit.events for commit in commits))
    for number, at in enumerate(events):
        place = bisect_right(reached, number)
        if place < len(commits):
            yield at, commits[place].at_ns - at


def _nanoseconds(line: dict[str, Any]) -> int:
    return round(datetime.fromisoformat(line["timestamp"]).timestamp() * 1e6) * 1000
