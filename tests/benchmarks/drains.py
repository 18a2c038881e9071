"""Benchmark of the persister: how fast the real process drains a backlog."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from services.cli.processes import ManagedProcess
from services.contract.logs import EVENT_PERSISTED, EVENT_WORKER_STARTED
from services.eventlog.jetstream.follower import MAX_BYTES, MAX_EVENTS
from services.persister.settings import PersisterSettings
from tests.benchmarks import dialogues, processes, streams
from tests.benchmarks.jobs import AppendJob, PullJob, run
from tests.benchmarks.plan import PARTITIONS, SPREADS, TYPICAL_SPREAD, WORKERS
from tests.benchmarks.posts import Bench
from tests.benchmarks.results import APPEND, PERSISTER, PULL, Drain, middle

_stores = (f"bench{number}" for number in itertools.count(1))


@dataclass(slots=True)
class DrainLog:
    """What the log of a persister says of a drain.

    Attributes:
        started: when the first partition asked for its events, seconds since the epoch.
        ended: when the last batch was committed and acknowledged.
        persisted: events in HDF5.
        batches: number of events of each batch.
        consultations: how many consultations each batch touched.
    """

    started: float = 0.0
    ended: float = 0.0
    persisted: int = 0
    batches: list[int] = field(default_factory=list)
    consultations: list[int] = field(default_factory=list)

    def take(self, line: dict[str, Any]) -> None:
        """Take one line of the log into account."""
        if line["event"] == EVENT_WORKER_STARTED:
            self.started = self.started or _seconds(line)
        elif line["event"] == EVENT_PERSISTED:
            self.ended = _seconds(line)
            self.persisted += line["persisted"]
            self.batches.append(line["persisted"])
            self.consultations.append(line["consultations"])

    @property
    def rate(self) -> float:
        """Events a second."""
        return self.persisted / (self.ended - self.started)


def drains(bench: Bench) -> list[Drain]:
    """Measure the persister against a bare pull and an append for each event."""
    rows = [row for spread in SPREADS for row in _compare(bench, spread, partitions=1, workers=1)]
    return rows + _compare(bench, TYPICAL_SPREAD, partitions=PARTITIONS, workers=WORKERS)


@contextmanager
def persister(
    url: str, folder: Path, store: str, *, partitions: int, workers: int = 1, name: str = ""
) -> Iterator[ManagedProcess]:
    """Run the product's persister with a volume of its own until the block ends."""
    name = name or f"persister-{store}"
    env = {
        "FI_NATS_URL": url,
        "FI_DATA_DIR": str(folder / store),
        "FI_STORE": store,
        "FI_PARTITIONS": str(partitions),
        "FI_PERSISTER_PORT": "0",
    }
    with processes.process(name, "services.persister", ["--workers", str(workers)], folder, **env) as running:
        yield running


def read_log(path: Path) -> DrainLog:
    """Read the complete lines of a persister's log."""
    log = DrainLog()
    for line in path.read_bytes().splitlines(keepends=True):
        if line.startswith(b"{") and line.endswith(b"\n"):
            log.take(orjson.loads(line))
    return log


def _compare(bench: Bench, spread: int, *, partitions: int, workers: int) -> list[Drain]:
    plan = bench.plan
    where = f"persister: {spread} consultations, {partitions} partitions"
    bench.tell(f"{where}: publishing {plan.backlog:,} events")
    streams.fresh_stream(bench.cluster, partitions)
    streams.fill(bench.cluster, dialogues.backlog(dialogues.load(bench.dialogues), plan.backlog, spread))
    logs: list[DrainLog] = []
    pulled: list[float] = []
    appended: list[float] = []
    for number in range(plan.rounds):
        bench.tell(f"{where}: round {number + 1}")
        logs.append(_drain(bench, partitions, workers))
        pulled.append(_pull(bench, partitions))
        if partitions == 1:
            appended.append(_append(bench, spread))

    def row(target: str, rates: list[float], processes_: int, events: int) -> Drain:
        ours = target == PERSISTER
        return Drain(
            target=target,
            partitions=partitions,
            workers=processes_,
            spread=spread,
            events=events,
            events_per_s=middle(rates),
            rounds=rates,
            batch_events=_mean([size for log in logs for size in log.batches]) if ours else 0.0,
            batch_consultations=_mean([count for log in logs for count in log.consultations]) if ours else 0.0,
        )

    rows = [
        row(PERSISTER, [log.rate for log in logs], workers, plan.backlog),
        row(PULL, pulled, 1, plan.backlog),
    ]
    return rows + ([row(APPEND, appended, 1, plan.appended)] if appended else [])


def _drain(bench: Bench, partitions: int, workers: int) -> DrainLog:
    """Let a persister drain the stream into an empty volume."""
    store, total = next(_stores), bench.plan.backlog
    url = bench.cluster.urls[0]
    with persister(url, bench.folder, store, partitions=partitions, workers=workers) as running:

        def done() -> bool:
            return running.log.exists() and read_log(running.log).persisted >= total

        # seldom: it costs time on the same cores
        processes.wait(done, running, bench.plan.drain_timeout, poll=0.2)
    streams.delete_consumers(bench.cluster, streams.names(store, partitions))
    return read_log(running.log)


def _pull(bench: Bench, partitions: int) -> float:
    """Pull everything with the persister's sizes and throw it away."""
    settings = PersisterSettings()
    names = streams.make_consumers(bench.cluster, next(_stores), partitions)
    job = PullJob(
        url=bench.cluster.urls[0],
        consumers=names,
        events=bench.plan.backlog,
        pull_events=min(MAX_EVENTS, settings.buffer_events // partitions // 2),
        pull_bytes=max(4 * 2**20, min(MAX_BYTES, settings.buffer_bytes // partitions // 2)),
        ack_events=settings.batch_events // partitions,
    )
    report = run("pull", job, seconds=bench.plan.drain_timeout)
    streams.delete_consumers(bench.cluster, names)
    return report.rate


def _append(bench: Bench, spread: int) -> float:
    path = bench.folder / "append.h5"
    job = AppendJob(str(path), bench.plan.appended, spread, str(bench.dialogues))
    return run("append", job, seconds=bench.plan.drain_timeout).rate


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _seconds(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()
