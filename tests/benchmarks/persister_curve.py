"""Benchmark of adaptive batches: what is offered a second -> events of a batch, age of its oldest event at the commit.

``python -m tests.benchmarks.persister_curve`` runs three nodes and one persister process with all partitions, publishes
at rising rates, and then leaves backlogs for it: in all partitions, and in one of them. What it made of them is read
from its log.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from services.cli.cluster import Cluster
from services.contract.event import Event
from services.contract.ids import new_event_id
from services.contract.logs import EVENT_PERSISTED
from services.eventlog.jetstream.connection import close, connect
from services.eventlog.jetstream.publisher import Publisher
from services.eventlog.partitions import partition_of
from services.eventlog.settings import LogSettings
from tests.benchmarks import processes, streams
from tests.benchmarks.corpus_commits import percentile
from tests.benchmarks.drains import persister
from tests.benchmarks.plan import PARTITIONS

#: events offered a second, one by one
RATES = (5, 50, 500, 2_000)
#: consultations under way at the same time
CONSULTATIONS = 200
_BODY = b'{"event_type":"MESSAGE_RECEIVED","payload":{"speaker":"Doctor","text":"' + b"word " * 29 + b'"}}'
_DEADLINE = 20.0
_PATIENCE = 300.0


@dataclass(slots=True)
class Batches:
    """What the log says of the batches of one load.

    Attributes:
        events: of each batch.
        ages_ms: age of the oldest event of each, at its commit.
    """

    events: list[float] = field(default_factory=list)
    ages_ms: list[float] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Run, and print Markdown."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.persister_curve", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each rate")
    parser.add_argument("--backlog", type=int, default=50_000, help="events of each backlog")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fiq-bench-") as name:
        folder = Path(name)
        with Cluster(folder / "cluster") as cluster:
            print("| offered | events/s | events a batch p50 | largest | age at commit p50 ms | p99 ms |")
            print("|---|---:|---:|---:|---:|---:|")
            _rates(cluster, folder, options.seconds)
            _backlog(cluster, folder, options.backlog, "all", list(range(PARTITIONS)))
            _backlog(cluster, folder, options.backlog, "one", [3])
    return 0


def _rates(cluster: Cluster, folder: Path, seconds: float) -> None:
    streams.fresh_stream(cluster, PARTITIONS)
    with persister(cluster.urls[0], folder, "curve", partitions=PARTITIONS) as running:
        # every partition is claimed and has its file
        asyncio.run(_publish(cluster, 1000, CONSULTATIONS))
        _wait_for(running, 0, CONSULTATIONS)
        done = CONSULTATIONS
        for rate in RATES:
            count = max(20, int(rate * seconds))
            started = time.perf_counter()
            asyncio.run(_publish(cluster, rate, count))
            took = time.perf_counter() - started
            found = _wait_for(running, done, count)
            done += count
            print(_row(f"{rate:,}/s", count / took, found), flush=True)


def _backlog(cluster: Cluster, folder: Path, count: int, name: str, partitions: list[int]) -> None:
    streams.fresh_stream(cluster, PARTITIONS)
    streams.fill(cluster, _events(count, partitions))
    with persister(cluster.urls[0], folder, f"backlog{name}", partitions=PARTITIONS) as running:
        processes.wait(lambda: bool(_persisted(running.log)), running, _PATIENCE)
        started = time.perf_counter()
        found = _wait_for(running, 0, count)
        rate = count / (time.perf_counter() - started)
        print(_row(f"a backlog of {count:,} in {name} of {PARTITIONS} partitions", rate, found), flush=True)


async def _publish(cluster: Cluster, rate: int, count: int) -> None:
    nc = await connect(LogSettings(servers=tuple(cluster.urls)), name="bench", on_closed=lambda _: None)
    publisher = Publisher(nc, deadline=_DEADLINE, max_in_flight=10_000)
    await publisher.start()
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        events = _events(count, list(range(PARTITIONS)))
        for number in range(count):
            await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
            group.create_task(publisher.append(next(events)))  # accepted just now
    await publisher.close()
    await close(nc)


def _events(count: int, partitions: list[int]) -> Iterator[Event]:
    names = [name for number in range(20_000) if partition_of(name := f"c-{number:05d}", PARTITIONS) in partitions]
    for number in range(count):
        yield Event(names[number % min(CONSULTATIONS, len(names))], new_event_id(), time.time_ns(), _BODY)


def _wait_for(running: Any, before: int, count: int) -> Batches:
    """Wait until *count* events more than *before* are committed, and return their batches."""
    processes.wait(lambda: sum(n for n, _ in _persisted(running.log)) >= before + count, running, _PATIENCE, poll=0.5)
    batches, seen = Batches(), 0
    for events, age in _persisted(running.log):
        seen += events
        if seen > before:
            batches.events.append(events)
            batches.ages_ms.append(age * 1000)
    return batches


def _persisted(log: Path) -> list[tuple[int, float]]:
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    found = [orjson.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"\n")]
    return [(one["persisted"], one["age_s"]) for one in found if one["event"] == EVENT_PERSISTED and one["persisted"]]


def _row(offered: str, rate: float, batches: Batches) -> str:
    cells = [
        offered,
        f"{rate:,.0f}",
        f"{percentile(batches.events, 0.5):,.0f}",
        f"{max(batches.events):,.0f}",
        f"{percentile(batches.ages_ms, 0.5):,.1f}",
        f"{percentile(batches.ages_ms, 0.99):,.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
