"""How much is measured, what the benchmarks need, and what they make of the reports of a load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load import LoadJob, Report, run
from benchmarks.processes import Product
from benchmarks.results import Throughput, middle
from services.cli.embedded.processes import Cluster

#: a "number of clients" that stands for one client which pauses, and the pause, seconds
ALONE, ALONE_PAUSE = 0, 0.2
#: concurrent clients of a full load
FULL_LOAD = 50
#: consultations that get events at the same time
CONSULTATIONS = 200
#: concurrent clients there
BATCH_CLIENTS = 4
#: spread of the drains of 16 partitions, and of the reads
TYPICAL_SPREAD = 100
#: partitions that the product has when nothing else is asked for
PARTITIONS = 16
#: persister processes at work
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a run.

    Attributes:
        rounds: how often each target is measured, in turn with the others; the median counts.
        drain_rounds: the same of the drains of 16 partitions.
        clients: concurrent clients, in the benchmark of the product at work.
        seconds: how long a load lasts.
        warm_up: seconds before that, not counted.
        limit: requests of one load at most, warm-up included.
        backlog: events that the persister drains.
        drain_timeout: seconds that one drain may take before the run is given up.
        settle: seconds for which memory is watched before the load and after it.
    """

    rounds: int
    drain_rounds: int
    clients: tuple[int, ...]
    seconds: float
    warm_up: float
    limit: int
    backlog: int
    drain_timeout: float
    settle: float


FULL = Plan(
    rounds=3,
    drain_rounds=5,
    clients=(ALONE, 1, 10, 20, 50),
    seconds=6.0,
    warm_up=1.0,
    limit=100_000,
    backlog=100_000,
    drain_timeout=180.0,
    settle=10.0,
)
QUICK = Plan(
    rounds=1,
    drain_rounds=1,
    clients=(ALONE, 1, 20),
    seconds=1.0,
    warm_up=0.3,
    limit=20_000,
    backlog=10_000,
    drain_timeout=60.0,
    settle=1.0,
)


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
