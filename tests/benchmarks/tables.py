"""Markdown tables of a run's results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tests.benchmarks.aims import aims
from tests.benchmarks.results import (
    APPEND,
    BARE_BATCH,
    CORPUS_READER,
    EMPTY,
    PERSISTER,
    PLAIN,
    PUBLISH,
    PULL,
    Drain,
    Results,
)


def latency(results: Results) -> str:
    """Return the table of latencies."""
    rows = []
    for row in results["latency"]:
        reference = _of(results["latency"], target=PUBLISH, clients=row["clients"])
        rows.append(
            [
                f"{row['clients']}",
                row["target"],
                *(f"{value:.2f}" for value in (row["p50_ms"], row["p95_ms"], row["p99_ms"])),
                _ratio(row["p50_ms"], reference["p50_ms"] if reference else math.nan),
                _count(row["events_per_s"]),
                _count(row["samples"]),
                f"{row['failures']}",
            ]
        )
    heads = "clients|target|p50 ms|p95 ms|p99 ms|p50 / bare publish|events/s|samples|failures"
    return table(heads.split("|"), rows, text=2)


def security(results: Results) -> str:
    """Return the table of what security costs."""
    rows = []
    for row in results["security"]:
        plain = _of(results["security"], target=PLAIN, clients=row["clients"])
        rows.append(
            [
                f"{row['clients']}",
                row["target"],
                *(f"{value:.2f}" for value in (row["p50_ms"], row["p95_ms"], row["p99_ms"])),
                _ratio(row["p50_ms"], plain["p50_ms"] if plain else math.nan),
                _count(row["events_per_s"]),
                _ratio(row["events_per_s"], plain["events_per_s"] if plain else math.nan),
                f"{row['failures']}",
            ]
        )
    heads = "clients|target|p50 ms|p95 ms|p99 ms|p50 / plain|events/s|events/s / plain|failures"
    return table(heads.split("|"), rows, text=2)


def upgrade(results: Results) -> str:
    """Return the table of what clients see of a rolling restart; or a line that says why it was not measured."""
    found = results["upgrade"]
    if found["missing"]:
        return f"Not measured: {found['missing']}.\n"
    rows = [
        [
            row["phase"],
            f"{row['clients']}",
            f"{row['seconds']:.0f}",
            *(f"{value:.1f}" for value in (row["p50_ms"], row["p95_ms"], row["p99_ms"], row["most_ms"])),
            _count(row["events"]),
            f"{row['retried']}",
            f"{row['failures']}",
        ]
        for row in found["phases"]
    ]
    heads = "phase|clients|seconds|p50 ms|p95 ms|p99 ms|longest ms|events|sent a second time|failures"
    return table(heads.split("|"), rows)


def throughput(results: Results) -> str:
    """Return the table of POST's throughput."""
    empty = _of(results["throughput"], target=EMPTY)
    rows = [
        [
            row["target"],
            f"{row['clients']}",
            _count(row["events_per_s"]),
            _ratio(row["events_per_s"], empty["events_per_s"] if empty else math.nan),
            _rounds(row["rounds"]),
            f"{row['failures']}",
        ]
        for row in results["throughput"]
    ]
    return table(["target", "clients", "events/s", "/ empty handler", "rounds", "failures"], rows)


def batches(results: Results) -> str:
    """Return the table of batches."""
    bare = _of(results["batches"], target=BARE_BATCH)
    rows = [
        [
            row["target"],
            f"{row['clients']}",
            _count(row["events_per_s"]),
            _ratio(row["events_per_s"], bare["events_per_s"] if bare else math.nan),
            _rounds(row["rounds"]),
            f"{row['failures']}",
        ]
        for row in results["batches"]
    ]
    return table(["target", "clients", "events/s", "/ bare atomic batch", "rounds", "failures"], rows)


def persister(results: Results) -> str:
    """Return the table of the persister's throughput."""
    rows = []
    for row in results["persister"]:
        pull, append = _peer(results["persister"], row, PULL), _peer(results["persister"], row, APPEND)
        ours = row["target"] == PERSISTER
        rows.append(
            [
                f"{row['spread']}",
                f"{row['partitions']}",
                f"{row['workers']}",
                row["target"],
                _count(row["events_per_s"]),
                _ratio(row["events_per_s"], pull["events_per_s"]) if ours and pull else "",
                _ratio(row["events_per_s"], append["events_per_s"]) if ours and append else "",
                _count(row["batch_events"]) if row["batch_events"] else "",
                _count(row["batch_consultations"]) if row["batch_consultations"] else "",
                _count(row["events"]),
                _rounds(row["rounds"]),
            ]
        )
    heads = (
        "consultations in 500 events|partitions|processes|target|events/s|/ bare pull|/ append + flush|"
        "events a batch|consultations a batch|events|rounds"
    )
    return table(heads.split("|"), rows, text=4)


def reads(results: Results) -> str:
    """Return the table of the ways to read."""
    plain = _of(results["reads"], target=CORPUS_READER)
    rows = [
        [
            row["target"],
            _count(row["events_per_s"]),
            _ratio(row["events_per_s"], plain["events_per_s"] if plain else math.nan),
            _rounds(row["rounds"]),
        ]
        for row in results["reads"]
    ]
    return table(["target", "events/s", "/ plain corpus reader", "rounds"], rows)


def memory(results: Results) -> str:
    """Return the table of resident memory."""
    rows = []
    for row in results["memory"]:
        phases = (row["idle_mb"], row["filling_mb"], row["draining_mb"], row["after_mb"])
        rows.append([row["process"], *(f"{value:.0f}" if value else "" for value in phases)])
    return table(["process", "idle MB", "backlog being posted", "backlog being drained", "after it"], rows)


def verdicts(results: Results) -> str:
    """Return the table of the aims."""
    rows = [
        [aim.text, f"{aim.value:.2f}{aim.unit}", "hit" if aim.hit else "**miss**", f"{abs(aim.margin):.0%}"]
        for aim in aims(results)
    ]
    return table(["aim", "measured", "", "by"], rows)


def all_tables(results: Results) -> list[tuple[str, str]]:
    """Return key and table of each benchmark that was run, in order."""
    makers = {
        "latency": latency,
        "throughput": throughput,
        "batches": batches,
        "security": security,
        "upgrade": upgrade,
        "persister": persister,
        "reads": reads,
        "memory": memory,
    }
    return [(key, make(results)) for key, make in makers.items() if key in results]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """Return a Markdown table; the columns from *text* on are aligned to the right."""
    lines = [heads, ["---" if index < text else "---:" for index in range(len(heads))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _of(rows: Iterable[object], **wanted: object) -> dict[str, float] | None:
    for row in rows:
        if isinstance(row, dict) and all(row[key] == value for key, value in wanted.items()):
            return row
    return None


def _peer(rows: Sequence[Drain], row: Drain, target: str) -> dict[str, float] | None:
    return _of(rows, target=target, spread=row["spread"], partitions=row["partitions"])


def _ratio(value: float, reference: float) -> str:
    if math.isnan(reference) or not reference:
        return ""
    ratio = value / reference
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def _count(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.0f}"


def _rounds(values: Sequence[float]) -> str:
    return " ".join(f"{value:,.0f}" for value in values)
