"""The aims of the project, and whether a run met them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.plan import ALONE, FULL_LOAD, TYPICAL_SPREAD
from benchmarks.results import (
    APPEND,
    AT_WORK,
    BARE_BATCH,
    BATCH,
    NO_PERSISTER,
    OLD_WAY,
    PERSISTER,
    PLAIN_SERVICE,
    PUBLISH,
    PULL,
    AtWork,
    Drain,
    Results,
)

#: the most that any process may hold, MB
MEMORY_MB = 250.0
#: clients with which the rates at work are judged
BUSY = (20, FULL_LOAD)
#: events a second at work in terms of the others', at least
RATES = ((NO_PERSISTER, 0.75), (OLD_WAY, 4.0), (PLAIN_SERVICE, 1.5))
#: seconds from the last 202 to the last commit, at most
CAUGHT_UP = 1.0
#: processor time of ingest for a POST, and of everything at full load for an event, milliseconds, at most
INGEST_MS, TOTAL_MS = 0.5, 0.8
#: POST's median latency at work in terms of the bare publish's, at most, by clients
POST_LATENCY = {1: 2.0, 20: 2.5}
#: age at commit: the median of a lone event, the 99th percentile at full load, milliseconds, at most
AGE_ALONE, AGE_FULL = 50.0, 1000.0
#: events a second of two processes in terms of one's, at least
TWO_PROCESSES = 1.5
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
    return [
        *_at_work({(row["target"], row["clients"]): row for row in results.get("at_work", [])}),
        *_of_drains(results),
        *_of_batches(results),
        *_of_the_persister(results),
        *_of_memory(results),
    ]


def _at_work(rows: dict[tuple[str, int], AtWork]) -> Iterator[Aim]:
    for clients in (ALONE, 1, *BUSY):
        ours = rows.get((AT_WORK, clients))
        if ours is not None:
            others = {target: row for (target, of), row in rows.items() if of == clients}
            yield from _rates(ours, others, f"at work, {clients} clients: " if clients else "at work, alone: ")


def _rates(ours: AtWork, others: dict[str, AtWork], where: str) -> Iterator[Aim]:
    clients = ours["clients"]
    if clients == 1 and PLAIN_SERVICE in others:
        ratio = ours["events_per_s"] / others[PLAIN_SERVICE]["events_per_s"]
        yield Aim(f"{where}events/s at least the {PLAIN_SERVICE}'s", ratio, 1.0, at_most=False)
    if clients in BUSY:
        for target, least in RATES:
            if target in others:
                ratio = ours["events_per_s"] / others[target]["events_per_s"]
                yield Aim(f"{where}events/s at least {least:g}x of: {target}", ratio, least, at_most=False)
        yield from _most(f"{where}all committed after", ours["caught_up_s"], CAUGHT_UP, " s")
        yield from _most(f"{where}processor time of ingest", ours["ingest_ms"], INGEST_MS, " ms")
    if clients in POST_LATENCY and PUBLISH in others:
        most, ratio = POST_LATENCY[clients], ours["p50_ms"] / others[PUBLISH]["p50_ms"]
        yield Aim(f"{where}p50 at most {most:g}x of: {PUBLISH}", ratio, most, at_most=True)
    if clients == ALONE:
        yield from _most(f"{where}age at commit, p50", ours["age_p50_ms"], AGE_ALONE, " ms")
    if clients == FULL_LOAD:
        parts = (ours["nodes_ms"], ours["ingest_ms"], ours["persisters_ms"])
        yield from _most(f"{where}processor time in all", sum(part or 0.0 for part in parts), TOTAL_MS, " ms")
        yield from _most(f"{where}age at commit, p99", ours["age_p99_ms"], AGE_FULL, " ms")


def _most(text: str, value: float | None, limit: float, unit: str) -> Iterator[Aim]:
    if value is not None:
        yield Aim(f"{text} at most {limit:g}{unit}", value, limit, at_most=True, unit=unit)


def _of_drains(results: Results) -> Iterator[Aim]:
    rates = {row["workers"]: row["events_per_s"] for row in results.get("drain", []) if row["target"] == PERSISTER}
    if 1 in rates and 2 in rates:
        text = f"two persister processes drain at least {TWO_PROCESSES:g}x of one"
        yield Aim(text, rates[2] / rates[1], TWO_PROCESSES, at_most=False)


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
    return row["spread"] == TYPICAL_SPREAD


def _of_memory(results: Results) -> Iterator[Aim]:
    for row in results.get("memory", []):
        most = max(row["idle_mb"], row["filling_mb"], row["draining_mb"], row["after_mb"])
        yield Aim(f"memory of {row['process']} at most {MEMORY_MB:g} MB", most, MEMORY_MB, at_most=True, unit=" MB")
