"""The aims of the project, and whether a run met them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.benchmarks.plan import FULL_LOAD, TYPICAL_SPREAD
from tests.benchmarks.results import APPEND, BARE_BATCH, BATCH, EMPTY, PERSISTER, POST, PUBLISH, PULL, Drain, Results

#: the most that any process may hold, MB
MEMORY_MB = 250.0
#: POST's median latency in terms of the bare publish's, at most
POST_LATENCY = 1.5
#: POST's events a second in terms of the empty handler's, at least
POST_RATE = 0.5
#: events a second of batches over HTTP in terms of bare atomic batches', at least, and in all
BATCH_SHARE = 0.8
BATCH_RATE = 10_000.0
#: the persister's events a second in terms of the bare pull's, at least
PULL_RATE = 0.5
#: the persister's events a second in terms of the event-by-event append's, at least
APPEND_RATE = 20.0


@dataclass(frozen=True, slots=True)
class Aim:
    """One aim and its measured value.

    Attributes:
        text: what is aimed at.
        value: what was measured.
        limit: where hit and miss meet.
        at_most: whether the value must not exceed the limit; otherwise it must reach it.
        unit: of both.
    """

    text: str
    value: float
    limit: float
    at_most: bool
    unit: str = "x"

    @property
    def hit(self) -> bool:
        """Whether the aim was met."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def margin(self) -> float:
        """By how much, as a share of the limit; negative when it was missed."""
        share = (self.value - self.limit) / self.limit
        return -share if self.at_most else share


def aims(results: Results) -> list[Aim]:
    """Return the aims that *results* say something about."""
    return [*_of_posts(results), *_of_batches(results), *_of_the_persister(results), *_of_memory(results)]


def _of_posts(results: Results) -> Iterator[Aim]:
    p50 = {row["target"]: row["p50_ms"] for row in results.get("latency", []) if row["clients"] == FULL_LOAD}
    if POST in p50 and PUBLISH in p50:
        text = f"POST p50 at {FULL_LOAD} clients at most {POST_LATENCY:g}x the {PUBLISH}'s"
        yield Aim(text, p50[POST] / p50[PUBLISH], POST_LATENCY, at_most=True)
    rates = {row["target"]: row["events_per_s"] for row in results.get("throughput", [])}
    if POST in rates and EMPTY in rates:
        yield Aim(f"POST events/s at least {POST_RATE:g}x the {EMPTY}'s", rates[POST] / rates[EMPTY], POST_RATE, False)


def _of_batches(results: Results) -> Iterator[Aim]:
    rates = {row["target"]: row["events_per_s"] for row in results.get("batches", [])}
    if BATCH in rates and BARE_BATCH in rates:
        text = f"{BATCH} events/s at least {BATCH_SHARE:g}x the {BARE_BATCH}'s"
        yield Aim(text, rates[BATCH] / rates[BARE_BATCH], BATCH_SHARE, at_most=False)
        yield Aim(f"{BATCH} events/s", rates[BATCH], BATCH_RATE, at_most=False, unit="/s")


def _of_the_persister(results: Results) -> Iterator[Aim]:
    rates = {row["target"]: row["events_per_s"] for row in results.get("persister", []) if _is_typical(row)}
    where = f"at {TYPICAL_SPREAD} consultations"
    for reference, least in ((PULL, PULL_RATE), (APPEND, APPEND_RATE)):
        if PERSISTER in rates and reference in rates:
            text = f"persister events/s {where} at least {least:g}x of: {reference}"
            yield Aim(text, rates[PERSISTER] / rates[reference], least, at_most=False)


def _is_typical(row: Drain) -> bool:
    return row["spread"] == TYPICAL_SPREAD and row["partitions"] == 1


def _of_memory(results: Results) -> Iterator[Aim]:
    for row in results.get("memory", []):
        most = max(row["idle_mb"], row["filling_mb"], row["draining_mb"], row["after_mb"])
        yield Aim(f"memory of {row['process']} at most {MEMORY_MB:g} MB", most, MEMORY_MB, at_most=True, unit=" MB")
