"""Markdown tables of a run's results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.aims import aims
from benchmarks.results import (
    APPEND,
    BARE_BATCH,
    CORPUS_READER,
    PERSISTER,
    PLAIN,
    PULL,
    Drain,
    Results,
)


def at_work(results: Results) -> str:
    """Return the table of the product at work."""
    rows = [
        [
            f"{row['clients']}" if row["clients"] else "alone",
            row["target"],
            _count(row["events_per_s"]),
            _spread(row["rounds"]),
            *(f"{value:.1f}" for value in (row["p50_ms"], row["p95_ms"], row["p99_ms"])),
            *(_known(value, ".0f") for value in (row["age_p50_ms"], row["age_p99_ms"], row["lag_events"])),
            _known(row["caught_up_s"], ".2f"),
            *(_known(value, ".2f") for value in (row["nodes_ms"], row["ingest_ms"], row["persisters_ms"])),
            f"{row['client_ms']:.3f}" if row["clients"] else "",
            f"{row['failures']}",
        ]
        for row in results["at_work"]
    ]
    heads = (
        "clients|target|events/s|rounds|p50 ms|p95 ms|p99 ms|age at commit p50 ms|p99 ms|lag, events|"
        "all committed after s|nodes ms|ingest ms|persisters ms|client ms|failures"
    )
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


def drain(results: Results) -> str:
    """Return the table of how one and two processes drain all partitions."""
    rows = []
    for row in results["drain"]:
        one = _of(results["drain"], target=row["target"], workers=1)
        rows.append(
            [
                row["target"],
                f"{row['workers']}",
                _count(row["events_per_s"]),
                _ratio(row["events_per_s"], one["events_per_s"] if one else math.nan),
                _spread(row["rounds"]),
                _rounds(row["rounds"]),
            ]
        )
    return table(["target", "processes", "events/s", "/ one process", "lowest to highest", "rounds"], rows)


def persister(results: Results) -> str:
    """Return the table of the persister's throughput."""
    rows = []
    for row in results["persister"]:
        pull, append = _peer(results["persister"], row, PULL), _peer(results["persister"], row, APPEND)
        ours = row["target"] == PERSISTER
        rows.append(
            [
                f"{row['spread']}",
                row["target"],
                _count(row["events_per_s"]),
                _ratio(row["events_per_s"], pull["events_per_s"]) if ours and pull else "",
                _ratio(row["events_per_s"], append["events_per_s"]) if ours and append else "",
                _count(row["events"]),
                _rounds(row["rounds"]),
            ]
        )
    heads = "consultations in 500 events|target|events/s|/ bare pull|/ append + flush|events|rounds"
    return table(heads.split("|"), rows, text=2)


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
        "at_work": at_work,
        "batches": batches,
        "security": security,
        "upgrade": upgrade,
        "drain": drain,
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


def _known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, f",{form}" if form == ".0f" else form)


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):,.0f} to {max(values):,.0f}"


def _count(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.0f}"


def _rounds(values: Sequence[float]) -> str:
    return " ".join(f"{value:,.0f}" for value in values)
