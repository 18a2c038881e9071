"""Does the cost of an append grow with the partition file? ``python -m benchmarks.corpus_growth [--quick]``."""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TypeVar

import orjson
import psutil

from benchmarks import page, processes
from fiq.corpus import EventStore, Identity, Record, open_corpus, verify_corpus

_IDENTITY = Identity("main", "0b9f6a52-7d83-4c1e-9d6a-52f0c7a9b101", 1, 0, 16, "fi-events", "2026-11-23T10:00:00Z")
#: some 220 bytes, as an utterance with its envelope has
_BODY = b'{"event_type":"MESSAGE_RECEIVED","payload":{"speaker":"Doctor","text":"' + b"word " * 29 + b'"}}'
#: consultations that one batch touches, and events that each of them gets
_SPREAD, _SHARE = 50, 10
_BATCHES = 11


@dataclass(frozen=True, slots=True)
class Series:
    """How a file grows.

    Attributes:
        name: what grows.
        sizes: how many of them there are at each step.
        events: events a consultation, where consultations grow.
        consultations: how many there are, where events grow.
    """

    name: str
    sizes: tuple[int, ...]
    events: int
    consultations: int

    def batches(self, start: int, size: int) -> Iterable[list[tuple[str, int]]]:
        """Yield the batches that let a file grow from size *start* to *size*: consultations with numbers of events."""
        if self.consultations == 0:
            for first in range(start, size, _SPREAD):
                yield [(_name(number), self.events) for number in range(first, min(first + _SPREAD, size))]
            return
        for first in range(start, size, _SPREAD * _SHARE):
            base = first // _SHARE
            yield [(_name((base + number) % self.consultations), _SHARE) for number in range(_SPREAD)]


@dataclass(frozen=True, slots=True)
class Filled:
    """A file of one size.

    Attributes:
        consultations: that it holds.
        events: that it holds.
        events_per_s: speed of the filling since the size before, checkpoints included.
        cpu_us: what the processor worked for each of these events.
        bytes_per_event: size of the file by its events.
    """

    consultations: int
    events: int
    events_per_s: float
    cpu_us: float
    bytes_per_event: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What it costs to write to a file.

    Attributes:
        open_ms: opening it for writing.
        reader_open_ms: opening it for reading, up to the first consultation's rows.
        known_ms: median time of a batch for consultations that are in the file and not open, commit included.
        known_cpu_ms: the part of it that the processor works; less than the above depends on what else runs.
        new_ms: median time of a batch for new ones.
        new_cpu_ms: the processor's part.
        memory_mb: what the writer holds afterwards.
    """

    open_ms: float
    reader_open_ms: float
    known_ms: float
    known_cpu_ms: float
    new_ms: float
    new_cpu_ms: float
    memory_mb: float


@dataclass(frozen=True, slots=True)
class Verified:
    """What it costs to verify a file.

    Attributes:
        verified_per_s: events a second.
        verify_mb: memory afterwards.
    """

    verified_per_s: float
    verify_mb: float


def fill(series: Series, path: Path, size: int) -> Filled:
    """Let the file grow to *size*."""
    if not path.exists():
        EventStore.create(path, _IDENTITY).close()
    before, start = _counts(path), series.sizes.index(size)
    reached = series.sizes[start - 1] if start else 0
    started, worked = time.perf_counter(), time.process_time()
    with EventStore.open(path, expected=_IDENTITY) as store:
        for batch in series.batches(reached, size):
            _write(store, batch)
            store.maybe_checkpoint()
    seconds, work = time.perf_counter() - started, time.process_time() - worked
    consultations, events = _counts(path)
    added = events - before[1]
    return Filled(consultations, events, added / seconds, work / added * 1e6, path.stat().st_size / events)


def append_batches(path: Path) -> Measured:
    """Open the file and append batches to known consultations and to new ones, in turn."""
    chance = random.Random(5)
    started = time.perf_counter()
    with open_corpus(path) as corpus:
        name = _name(0)
        corpus[name].table()
        reader_open = time.perf_counter() - started
        names = list(corpus)
    known_names = chance.sample(names, _SPREAD * _BATCHES)
    started = time.perf_counter()
    known, new = [], []
    with EventStore.open(path, expected=_IDENTITY) as store:
        opened = time.perf_counter() - started
        for number in range(_BATCHES):
            known.append(_timed(store, known_names[_SPREAD * number : _SPREAD * (number + 1)]))
            new.append(_timed(store, [f"n-{store.committed}-{number}-{one}" for one in range(_SPREAD)]))
        memory = _memory_mb()
    # the first batch of each loads what the others find loaded
    return Measured(opened * 1e3, reader_open * 1e3, *_middle(known[1:]), *_middle(new[1:]), memory)


def verify(path: Path) -> Verified:
    """Verify the file.

    Raises:
        RuntimeError: something is wrong with it.
    """
    report = verify_corpus(path)
    if not report.clean:
        raise RuntimeError(str(report.problems[0]))
    return Verified(report.events_per_second, _memory_mb())


def _timed(store: EventStore, consultations: Iterable[str]) -> tuple[float, float]:
    batch = [(name, _SHARE) for name in consultations]
    started, worked = time.perf_counter(), time.process_time()
    _write(store, batch)
    return (time.perf_counter() - started) * 1e3, (time.process_time() - worked) * 1e3


def _middle(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return median(elapsed for elapsed, _ in times), median(worked for _, worked in times)


def _write(store: EventStore, batch: Iterable[tuple[str, int]]) -> None:
    sequence = store.committed
    for consultation, events in batch:
        numbers = range(sequence + 1, sequence + 1 + events)
        store.append(consultation, [Record(number, number, 2, number.to_bytes(16, "big"), _BODY) for number in numbers])
        sequence += events
    store.commit(sequence)


def _counts(path: Path) -> tuple[int, int]:
    with open_corpus(path) as corpus:
        (info,) = corpus.partitions
        return info.consultations, info.events


def _memory_mb() -> float:
    return float(psutil.Process().memory_info().rss / 1e6)


def _name(number: int) -> str:
    return f"c-{number:07d}"


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
        about = processes.describe(folder)
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
        filled = _alone(fill, series, path, size)
        measured = _alone(append_batches, path)
        yield series.name, filled, measured, _alone(verify, path)


def table(rows: Sequence[tuple[str, Filled, Measured, Verified]]) -> str:
    """Return the Markdown table."""
    heads = (
        "growing|consultations|events|filling, events/s (CPU µs each)|500 events to 50 known, ms (CPU)|"
        "to 50 new, ms (CPU)|bytes an event|writer's open, ms|reader's open, ms|writer MB|"
        "fiq verify, events/s|fiq verify MB"
    )
    return page.table(
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
