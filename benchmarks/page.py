"""Makes docs/benchmarks.md of a run's results: its tables, and whether the aims were met."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import ALONE, BATCH_CLIENTS, FULL_LOAD
from benchmarks.load import BATCH_EVENTS
from benchmarks.results import (
    AT_WORK,
    BARE_BATCH,
    BATCH,
    CORPUS_READER,
    EMPTY,
    NO_PERSISTER,
    OLD_WAY,
    PERSISTER,
    PLAIN_SERVICE,
    PUBLISH,
    ZEROMQ,
    AtWork,
    Results,
)

#: the most that any process may hold, MB
MEMORY_MB = 250.0
#: clients with which the rates at work are judged
BUSY = (20, FULL_LOAD)
#: events a second at work in terms of the others', at least
RATES = ((NO_PERSISTER, 0.75), (OLD_WAY, 4.0), (PLAIN_SERVICE, 1.5))
#: the log without a broker in terms of the old way, which has the same guarantee: events a second at full load, at
#: least, and median latency of one client, at most
ZEROMQ_RATE, ZEROMQ_LATENCY = 5.0, 1.5
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
        *_of_memory(results),
    ]


def _at_work(rows: dict[tuple[str, int], AtWork]) -> Iterator[Aim]:
    for clients in (ALONE, 1, *BUSY):
        ours = rows.get((AT_WORK, clients))
        if ours is not None:
            others = {target: row for (target, of), row in rows.items() if of == clients}
            yield from _rates(ours, others, f"at work, {clients} clients: " if clients else "at work, alone: ")
    yield from _without_broker(rows)


def _without_broker(rows: dict[tuple[str, int], AtWork]) -> Iterator[Aim]:
    for clients in (1, FULL_LOAD):
        ours, old = rows.get((ZEROMQ, clients)), rows.get((OLD_WAY, clients))
        if ours is None or old is None:
            continue
        where = f"{ZEROMQ}, {clients} clients: "
        if clients == 1:
            ratio = ours["p50_ms"] / old["p50_ms"]
            yield Aim(f"{where}p50 at most {ZEROMQ_LATENCY:g}x of: {OLD_WAY}", ratio, ZEROMQ_LATENCY, at_most=True)
        else:
            ratio = ours["events_per_s"] / old["events_per_s"]
            text = f"{where}events/s at least {ZEROMQ_RATE:g}x of: {OLD_WAY}"
            yield Aim(text, ratio, ZEROMQ_RATE, at_most=False)


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


def _of_memory(results: Results) -> Iterator[Aim]:
    for row in results.get("memory", []):
        most = max(row["idle_mb"], row["filling_mb"], row["draining_mb"], row["after_mb"])
        yield Aim(f"memory of {row['process']} at most {MEMORY_MB:g} MB", most, MEMORY_MB, at_most=True, unit=" MB")


def at_work(results: Results) -> str:
    """Return the tables of the product at work, one for each value: targets are rows, numbers of clients columns."""
    rows = {(row["target"], row["clients"]): row for row in results["at_work"]}
    targets = dict.fromkeys(target for target, _ in rows)
    counts = dict.fromkeys(clients for _, clients in rows)
    heads = [CLIENTS.format(count) if count else "alone" for count in counts]
    tables = []
    for head, cell in _CELLS.items():
        lines = []
        for target in targets:
            cells = [cell(rows[target, count]) if (target, count) in rows else "" for count in counts]
            if any(cells):
                lines.append([target, *cells])
        tables.append(table([head, *heads], lines))
    return "\n".join(tables)


def failures(results: Results) -> str:
    """Return which requests of the product at work, and of what it is compared with, failed."""
    failed = [
        f"{row['target']} with {row['clients']} clients {row['failures']}"
        for row in results.get("at_work", [])
        if row["failures"]
    ]
    return f"Requests that failed: {', '.join(failed)}." if failed else "No request failed."


def batches(results: Results) -> str:
    """Return the table of batches."""
    bare = _of(results["batches"], target=BARE_BATCH)
    rows = [
        [
            row["target"],
            f"{row['clients']}",
            _count(row["events_per_s"]),
            _ratio(row["events_per_s"], bare["events_per_s"] if bare else math.nan),
            _spread(row["rounds"]),
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
            ]
        )
    return table(["target", "processes", "events/s", "/ one process", "rounds"], rows)


def reads(results: Results) -> str:
    """Return the table of the ways to read."""
    plain = _of(results["reads"], target=CORPUS_READER)
    rows = [
        [
            row["target"],
            _count(row["events_per_s"]),
            _ratio(row["events_per_s"], plain["events_per_s"] if plain else math.nan),
            _spread(row["rounds"]),
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


def _missed(results: Results) -> str:
    """Return how many aims were met, and the table of the others."""
    found = aims(results)
    missed = [aim for aim in found if not aim.hit]
    counted = f"{len(found) - len(missed)} of {len(found)} aims are met.\n"
    rows = [[aim.text, f"{aim.value:.2f}{aim.unit}", f"{abs(aim.margin):.0%}"] for aim in missed]
    return f"{counted}\n{table(['missed', 'measured', 'by'], rows)}" if rows else counted


def all_tables(results: Results) -> list[tuple[str, str]]:
    """Return key and table of each benchmark that was run, in order."""
    makers = {
        "at_work": at_work,
        "batches": batches,
        "drain": drain,
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


def _ratio(value: float, reference: float) -> str:
    if math.isnan(reference) or not reference:
        return ""
    ratio = value / reference
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def _parts(form: str, *values: float | None) -> str:
    """Return *values* in one cell; empty when none was measured."""
    if all(value is None for value in values):
        return ""
    return "/".join("-" if value is None else format(value, f",{form}") for value in values)


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):,.0f}\N{EN DASH}{max(values):,.0f}"


def _count(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.0f}"


#: the head of a column
CLIENTS = "clients: {}"
#: the heads of the tables that are drawn
RATE, LATENCY = "events/s (rounds)", "p50/p99 ms"
#: a table each: its head, and what it has of a row
_CELLS: dict[str, Callable[[AtWork], str]] = {
    RATE: lambda row: f"{_count(row['events_per_s'])} ({_spread(row['rounds'])})",
    LATENCY: lambda row: _parts(".1f", row["p50_ms"], row["p99_ms"]),
    "age at commit p50/p99 ms": lambda row: _parts(".0f", row["age_p50_ms"], row["age_p99_ms"]),
    "lag, events": lambda row: _parts(".0f", row["lag_events"]),
    "nodes/ingest/persisters ms": lambda row: _parts(".2f", row["nodes_ms"], row["ingest_ms"], row["persisters_ms"]),
}
#: clients of the line that the README quotes
README_CLIENTS = 20
#: what comes before this line of an existing page is kept: the summary
MADE_FROM = "<!-- Made by `python -m benchmarks --write` from here on. -->"
#: what comes after this line of an existing page is kept
KEPT_FROM = "<!-- Written by hand from here on: kept when the page is made again. -->"

#: what is measured at work
_TARGETS = {
    AT_WORK: "the product: three nodes, one ingest, two persister processes, 16 partitions",
    ZEROMQ: "*at work* without a broker: a 202 comes after the commit",
    NO_PERSISTER: "*at work* without persisters and `FI_MAX_BACKLOG`",
    PLAIN_SERVICE: "`benchmarks/peers.py`: aiohttp with `js.publish` and a message id; two workers append, flush, "
    "fsync and acknowledge up to 500. No order, no late duplicates found, files that do not survive a crash",
    PUBLISH: "nats-py with as many events in flight as clients",
    EMPTY: "aiohttp that reads the body and answers 202",
    OLD_WAY: "aiohttp that appends, flushes and fsyncs before it answers",
}

_INTRODUCTION = """\
## How it was measured

`{command}`, {date}, {minutes:.1f} minutes. Machine: {machine}.

The stream has three replicas on nodes with `sync_interval: always`. The processor limits most rows. Compared targets
take turns in the same run; the median of {rounds} rounds counts, *rounds* is the range. The events: {data}.
"""

_AT_WORK = """\
## At work

Each client posts one event at a time under a new key, to 200 consultations in turn, for {seconds:g} s after 1 s of
warm-up. Every round starts new nodes and services. A run fails if files, logs or metrics differ from what was accepted.

{targets}
*alone*: one client that pauses 0.2 s. *Age at commit*: from reception to the fsynced commit. *Lag*: accepted events not
committed at the last 202. *nodes/ingest/persisters ms*: processor time per event.
"""

_DRAIN = """\
## A backlog in all partitions

{backlog:,} events wait in 16 partitions; time from the persister's first request to the last commit, median of
{drain_rounds} rounds.
"""

_BATCHES = """\
## Events a second in batches

{clients} clients, {events:,} events a batch as NDJSON under a key each, against nats-py's atomic batches.
"""

_READS = """\
## Events a second read back

Consultations of 50 events, one request after another. *Plain corpus reader* is `open_corpus` in the measuring process;
*GET* goes through ingest. For single events, events/s are requests/s.
"""

_MEMORY = """\
## Resident memory

{backlog:,} events are posted into new nodes, then one persister process drains all 16 partitions: the most seen in each
phase, ten samples a second, MB of 10^6 bytes.
"""

_SECTIONS = {
    "at_work": _AT_WORK,
    "batches": _BATCHES,
    "drain": _DRAIN,
    "reads": _READS,
    "memory": _MEMORY,
}


def render(results: Results) -> str:
    """Return what is made of *results*, without what is written by hand."""
    about = results["about"]
    machine = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    introduction = _INTRODUCTION.format(
        command=about["command"],
        date=about["date"],
        minutes=about["seconds"] / 60,
        machine=machine,
        rounds=about["rounds"],
        data=about["data"],
    )
    numbers = {
        "backlog": about["backlog"],
        "rounds": about["rounds"],
        "drain_rounds": about["drain_rounds"],
        "seconds": about["load_seconds"],
        "clients": BATCH_CLIENTS,
        "events": BATCH_EVENTS,
        "targets": _described({row["target"] for row in results.get("at_work", [])}),
    }
    sections = [f"{_SECTIONS[key].format(**numbers)}\n{table}" for key, table in all_tables(results)]
    first = 1 if "at_work" in results else 0
    return "\n".join(
        [
            *(f"**Failed:** {what.partition(chr(10))[0]}\n" for what in about["failed"]),
            *(f"{section}\n{failures(results)}\n" for section in sections[:first]),
            introduction,
            "## Aims\n\n" + _missed(results),
            *sections[first:],
        ]
    )


def _described(targets: Set[str]) -> str:
    return table(["target", "what it is"], [row for row in _TARGETS.items() if row[0] in targets], text=2)


def sentence(results: Results) -> str:
    """Return what the README says of a run: the line of 20 clients; empty when it was not measured."""
    rows = {row["target"]: row for row in results.get("at_work", []) if row["clients"] == README_CLIENTS}
    if AT_WORK not in rows:
        return ""
    ours = rows[AT_WORK]
    text = (
        f"At work, with {README_CLIENTS} clients: {ours['events_per_s']:,.0f} events/s, "
        f"p50 {ours['p50_ms']:.0f} ms, p99 {ours['p99_ms']:.0f} ms"
    )
    if ours["age_p50_ms"] is not None:
        text += f", in HDF5 after {ours['age_p50_ms']:,.0f} ms (p50)"
    others = [
        f"the {target} {rows[target]['events_per_s']:,.0f} events/s"
        for target in (PLAIN_SERVICE, OLD_WAY)
        if target in rows
    ]
    return f"{text}; in the same run {' and '.join(others)}." if others else f"{text}."


def write(results: Results, path: Path) -> None:
    """Write the page to *path*; what was written by hand, before and after the two marks of an existing page, stays."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    before, made, _ = page.partition(MADE_FROM)
    _, mark, after = page.partition(KEPT_FROM)
    before, after = (before if made else "# Benchmarks\n\n"), (after if mark else "\n")
    path.write_text(f"{before}{MADE_FROM}\n\n{render(results)}\n{KEPT_FROM}{after}", encoding="utf-8")
