"""What the benchmarks need, and what they make of the reports of a load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.jobs import LoadJob, Report, run
from benchmarks.plan import CONSULTATIONS, Plan
from benchmarks.processes import Product
from benchmarks.results import Latency, Throughput, middle, percentile
from services.cli.embedded.cluster import Cluster

#: says what is going on
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bench:
    """What the benchmarks need.

    Attributes:
        cluster: of this checkout; runs when a benchmark was asked for that needs it.
        plan: how much is measured.
        dialogues: where the real dialogues are.
        folder: for files and logs; removed afterwards.
        tell: says what is going on.
        products: what is measured at work and draining: this checkout, and perhaps others.
        failed: parts of the run that failed.
    """

    cluster: Cluster
    plan: Plan
    dialogues: Path
    folder: Path
    tell: Tell
    products: tuple[Product, ...]
    failed: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        """Note that a part of the run failed; the rest goes on."""
        self.failed.append(what)
        self.tell(f"FAILED: {what}")

    def load(
        self,
        target: str | int,
        clients: int,
        kind: str = "http",
        *,
        name: str = "bench",
        pause: float = 0.0,
        on_ready: Callable[[], None] = lambda: None,
    ) -> Report:
        """Run one load against *target*, a port or a URL."""
        plan = self.plan
        job = LoadJob(
            target=str(target),
            clients=clients,
            seconds=plan.seconds,
            warm_up=plan.warm_up,
            limit=plan.limit,
            folder=str(self.dialogues),
            consultations=CONSULTATIONS,
            name=name,
            pause=pause,
        )
        return run(kind, job, seconds=plan.seconds + plan.warm_up, on_ready=on_ready)


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
