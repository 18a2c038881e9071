"""What a run brings, in the form of its JSON; and the few statistics that it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TypedDict

# -- what is measured, as the tables call it ----------------------------------------------------------------------
AT_WORK = "at work"
ZEROMQ = "at work, ZeroMQ"
NO_PERSISTER = "no persister"
PLAIN_SERVICE = "plain service"
PUBLISH = "bare publish"
OLD_WAY = "HDF5 in the request"
EMPTY = "empty handler"
BATCH = "POST batch"
BARE_BATCH = "bare atomic batch"
PERSISTER = "persister"
CORPUS_READER = "plain corpus reader"
READ_NDJSON = "GET events, NDJSON"
READ_JSON = "GET events, JSON"
READ_FOLLOW = "GET events, follow=1"
READ_ONE = "GET one event, one by one"


class About(TypedDict):
    """Where, when and how it was measured."""

    date: str
    command: str
    quick: bool
    seconds: float
    machine: dict[str, str]
    data: str
    rounds: int
    drain_rounds: int
    load_seconds: float
    backlog: int
    failed: list[str]


class AtWork(TypedDict):
    """One target with one number of clients (0: one that pauses): medians over the rounds; None where there is none."""

    target: str
    clients: int
    events_per_s: float
    rounds: list[float]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    age_p50_ms: float | None
    age_p99_ms: float | None
    lag_events: float | None
    caught_up_s: float | None
    nodes_ms: float | None
    ingest_ms: float | None
    persisters_ms: float | None
    client_ms: float
    samples: int
    failures: int


class Throughput(TypedDict):
    """One target under full load."""

    target: str
    clients: int
    events_per_s: float
    rounds: list[float]
    failures: int


class Drain(TypedDict):
    """One target that takes a backlog."""

    target: str
    partitions: int
    workers: int
    spread: int
    events: int
    events_per_s: float
    rounds: list[float]


class Read(TypedDict):
    """One way to read the events of a corpus."""

    target: str
    events: int
    events_per_s: float
    rounds: list[float]


class Memory(TypedDict):
    """The most that one process was seen to hold in each phase, in MB (10^6 bytes); 0 while it did not run."""

    process: str
    idle_mb: float
    filling_mb: float
    draining_mb: float
    after_mb: float


class Results(TypedDict, total=False):
    """A run; a benchmark that was not asked for is missing."""

    about: About
    at_work: list[AtWork]
    batches: list[Throughput]
    drain: list[Drain]
    reads: list[Read]
    memory: list[Memory]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of *values* that at least *share* (0 to 1) of them do not exceed; nan without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def middle(values: Sequence[float]) -> float:
    """Return the median; nan without values."""
    return median(values) if values else math.nan
