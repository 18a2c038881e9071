"""Does the cost of an append grow with the partition file? ``python -m benchmarks.corpus_growth [--quick]``."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import orjson

from benchmarks import corpus_filling, machine, tables
from benchmarks.corpus_filling import Filled, Measured, Series, Verified

_T = TypeVar("_T")

#: a file with ever more short consultations, and one whose consultations get ever longer
CONSULTATIONS = Series("consultations", sizes=(1_000, 10_000, 100_000), events=10, consultations=0)
EVENTS = Series("events", sizes=(10_000, 100_000, 1_000_000), events=0, consultations=1_000)
#: sizes of a smoke run
_QUICK = 2


def main(arguments: list[str]) -> int:
    """Measure, print Markdown and JSON."""
    options = _parser().parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fiq-growth-", dir=options.folder) as name:
        folder = Path(name)
        about = machine.describe(folder)
        rows = [
            row
            for series in (CONSULTATIONS, EVENTS)
            for row in measure(series, folder / f"{series.name}.h5", _QUICK if options.quick else None, started)
        ]
    results = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "benchmarks.corpus_growth", *arguments]),
        "seconds": round(time.monotonic() - started, 1),
        "machine": about,
        "rows": [
            {"series": series, **asdict(filled), **asdict(now), **asdict(seen)} for series, filled, now, seen in rows
        ],
    }
    encoded = orjson.dumps(results, option=orjson.OPT_INDENT_2) + b"\n"
    print(table(rows))
    if options.json is not None:
        options.json.write_bytes(encoded)
    else:
        print(f"```json\n{encoded.decode()}```")
    return 0


def measure(
    series: Series, path: Path, sizes: int | None, started: float
) -> Iterator[tuple[str, Filled, Measured, Verified]]:
    """Let one file grow from size to size and yield what each costs; each step is a process of its own."""
    for size in series.sizes[:sizes]:
        print(f"{time.monotonic() - started:6.1f} s  {size:,} {series.name}", file=sys.stderr, flush=True)
        filled = _alone(corpus_filling.fill, series, path, size)
        measured = _alone(corpus_filling.append_batches, path)
        yield series.name, filled, measured, _alone(corpus_filling.verify, path)


def table(rows: Sequence[tuple[str, Filled, Measured, Verified]]) -> str:
    """Return the Markdown table."""
    heads = (
        "growing|consultations|events|filling, events/s (CPU µs each)|500 events to 50 known, ms (CPU)|"
        "to 50 new, ms (CPU)|bytes an event|writer's open, ms|reader's open, ms|writer MB|"
        "fiq verify, events/s|fiq verify MB"
    )
    return tables.table(
        heads.split("|"),
        [
            [
                series,
                f"{filled.consultations:,}",
                f"{filled.events:,}",
                f"{filled.events_per_s:,.0f} ({filled.cpu_us:.0f})",
                f"{measured.known_ms:.1f} ({measured.known_cpu_ms:.1f})",
                f"{measured.new_ms:.1f} ({measured.new_cpu_ms:.1f})",
                f"{filled.bytes_per_event:,.0f}",
                f"{measured.open_ms:.1f}",
                f"{measured.reader_open_ms:.1f}",
                f"{measured.memory_mb:.0f}",
                f"{verified.verified_per_s:,.0f}",
                f"{verified.verify_mb:.0f}",
            ]
            for series, filled, measured, verified in rows
        ],
    )


def _alone(work: Callable[..., _T], *arguments: object) -> _T:
    """Run *work* in a fresh process: memory and caches are its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus_growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: without the largest sizes, half a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of printing them")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; its disk is what is measured")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
