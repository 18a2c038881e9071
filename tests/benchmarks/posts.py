"""Benchmarks of the HTTP edge: latency and throughput, in rounds that take turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.cli.cluster import Cluster
from tests.benchmarks import processes, streams
from tests.benchmarks.jobs import LoadJob, Report, run
from tests.benchmarks.plan import CLIENTS, FULL_LOAD, PARTITIONS, Plan
from tests.benchmarks.results import (
    EMPTY,
    OLD_WAY,
    POST,
    PUBLISH,
    Latency,
    Throughput,
    middle,
    percentile,
)

#: says what is going on
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bench:
    """What the benchmarks need.

    Attributes:
        cluster: running.
        plan: how much is measured.
        dialogues: where the real dialogues are.
        folder: for files and logs; removed afterwards.
        tell: says what is going on.
    """

    cluster: Cluster
    plan: Plan
    dialogues: Path
    folder: Path
    tell: Tell

    def load(self, target: str | int, clients: int, kind: str = "http") -> Report:
        """Run one load against *target*, a port or a URL."""
        plan = self.plan
        job = LoadJob(str(target), clients, plan.seconds, plan.warm_up, plan.limit, str(self.dialogues))
        return run(kind, job, seconds=plan.seconds + plan.warm_up)


def latency(bench: Bench) -> list[Latency]:
    """Measure POST, a bare publish to the same node, and the old way, at each number of clients."""
    streams.fresh_stream(bench.cluster, PARTITIONS)
    url = bench.cluster.urls[0]
    reports: dict[tuple[int, str], list[Report]] = {}
    with processes.ingest(url, bench.folder, partitions=PARTITIONS) as (_, port):
        for number in range(bench.plan.rounds):
            for clients in CLIENTS:
                bench.tell(f"latency: round {number + 1}, {clients} clients")
                of = {POST: bench.load(port, clients), PUBLISH: bench.load(url, clients, "publish")}
                with processes.reference("old", bench.folder) as old_port:
                    of[OLD_WAY] = bench.load(old_port, clients)
                for target, report in of.items():
                    reports.setdefault((clients, target), []).append(report)
    return [summary(target, clients, reports[clients, target]) for clients, target in sorted(reports, key=_order)]


def throughput(bench: Bench) -> list[Throughput]:
    """Measure POST, an aiohttp handler that only parses the JSON, and a bare publish for what the cluster takes."""
    streams.fresh_stream(bench.cluster, PARTITIONS)
    url = bench.cluster.urls[0]
    reports: dict[str, list[Report]] = {POST: [], EMPTY: [], PUBLISH: []}
    with (
        processes.ingest(url, bench.folder, partitions=PARTITIONS) as (_, port),
        processes.reference("empty", bench.folder) as empty_port,
    ):
        for number in range(bench.plan.rounds):
            bench.tell(f"throughput: round {number + 1}")
            reports[POST].append(bench.load(port, FULL_LOAD))
            reports[EMPTY].append(bench.load(empty_port, FULL_LOAD))
            reports[PUBLISH].append(bench.load(url, FULL_LOAD, "publish"))
    return [of_rounds(target, FULL_LOAD, of) for target, of in reports.items()]


def _order(key: tuple[int, str]) -> tuple[int, int]:
    clients, target = key
    return clients, (POST, PUBLISH, OLD_WAY).index(target)


def summary(target: str, clients: int, reports: list[Report]) -> Latency:
    """Return the medians over the rounds."""

    def at(share: float) -> float:
        return middle([percentile(report.latencies_us, share) / 1000 for report in reports])

    return Latency(
        target=target,
        clients=clients,
        p50_ms=at(0.5),
        p95_ms=at(0.95),
        p99_ms=at(0.99),
        events_per_s=middle([report.rate for report in reports]),
        samples=sum(report.events for report in reports),
        failures=sum(report.failures for report in reports),
    )


def of_rounds(target: str, clients: int, reports: list[Report]) -> Throughput:
    """Return the row of *target*, whose rounds *reports* are about."""
    rates = [report.rate for report in reports]
    return Throughput(
        target=target,
        clients=clients,
        events_per_s=middle(rates),
        rounds=rates,
        failures=sum(report.failures for report in reports),
    )
