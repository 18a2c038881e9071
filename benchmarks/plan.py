"""How much is measured, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass

#: consultations that 500 events in a row touch, in the persister's benchmark
SPREADS = (10, 100, 500)
#: a "number of clients" that stands for one client which pauses, and the pause, seconds
ALONE, ALONE_PAUSE = 0, 0.2
#: concurrent clients, in the benchmark of what security costs
CLIENTS = (1, 10, 50)
#: concurrent clients of a full load
FULL_LOAD = 50
#: consultations that get events at the same time
CONSULTATIONS = 200
#: events of a batch, in the benchmark of batches: the most that a batch may have
BATCH_EVENTS = 1000
#: concurrent clients there
BATCH_CLIENTS = 4
#: spread of the drains of 16 partitions, and of the reads
TYPICAL_SPREAD = 100
#: clients of the deployment during a rolling restart; each pauses between two events, as people do
PEOPLE = 8
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
        appended: events that are appended and flushed one by one, for each spread.
        drain_timeout: seconds that one drain may take before the run is given up.
        settle: seconds for which memory is watched before the load and after it.
        undisturbed: seconds for which clients of the deployment are watched before its rolling restart.
        restarted: services that are restarted; none stands for all.
    """

    rounds: int
    drain_rounds: int
    clients: tuple[int, ...]
    seconds: float
    warm_up: float
    limit: int
    backlog: int
    appended: int
    drain_timeout: float
    settle: float
    undisturbed: float
    restarted: tuple[str, ...]


FULL = Plan(
    rounds=3,
    drain_rounds=5,
    clients=(ALONE, 1, 10, 20, 50),
    seconds=6.0,
    warm_up=1.0,
    limit=100_000,
    backlog=100_000,
    appended=2_000,
    drain_timeout=180.0,
    settle=10.0,
    undisturbed=30.0,
    restarted=(),
)
QUICK = Plan(
    rounds=1,
    drain_rounds=1,
    clients=(ALONE, 1, 20),
    seconds=1.0,
    warm_up=0.3,
    limit=20_000,
    backlog=10_000,
    appended=300,
    drain_timeout=60.0,
    settle=1.0,
    undisturbed=5.0,
    restarted=("n2",),
)
