"""Benchmark of commits: the journaled store against plain flush + fsync, same layout.

``python -m benchmarks.corpus_commits`` takes some minutes; the two take turns in every round, so that whatever
else the machine does hits both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import h5py

from fiq.corpus import EventStore, Identity, Record
from fiq.corpus.format import CONSULTATIONS, LIBVER
from fiq.corpus.store import ConsultationGroups, create_partition
from fiq.corpus.wal.storage import StorageIO

#: consultations that a batch touches, and batches that are not measured: they create the groups, and the journal takes
#: its first turn of 32 MiB, in which it grows as any file does; from then on it writes over itself
SPREADS = {10: 180, 100: 110, 500: 60}
#: events of a batch
BATCH_EVENTS = 500
#: bytes of an event, about
BODY_BYTES = 400

JOURNALED = "journaled"
PLAIN = "plain flush + fsync"
_IDENTITY = Identity("bench", "bench", 1, 0, 1, "bench", "bench")

Append = Callable[[str, Sequence[Record]], None]
Commit = Callable[[int], None]


@dataclass(slots=True)
class Run:
    """One file that was written.

    Attributes:
        seconds: of the measured batches, appends included.
        commits_ms: duration of each commit.
        checkpoints: how many ran beside them.
    """

    seconds: float = 0.0
    commits_ms: list[float] = field(default_factory=list)
    checkpoints: int = 0

    @property
    def rate(self) -> float:
        """Events a second."""
        return BATCH_EVENTS * len(self.commits_ms) / self.seconds


class HDF5Dataset:
    """Grows a dataset by HDF5's functions alone: the last chunk, kept in memory, is written again each time."""

    def __init__(self, dataset: Any, *, item: int, chunk: int, empty: bool) -> None:
        assert empty, "the benchmark begins with new datasets"
        self.length = 0
        self._dataset = dataset
        self._item = item
        self._size = chunk * item
        self._tail = b""

    def append(self, data: bytes) -> None:
        """Append whole elements."""
        place = self.length - len(self._tail) // self._item
        pending = self._tail + data
        self.length += len(data) // self._item
        self._dataset.set_extent((self.length,))
        whole = len(pending) - len(pending) % self._size
        for start in range(0, whole, self._size):
            self._dataset.write_direct_chunk((place + start // self._item,), pending[start : start + self._size])
        self._tail = pending[whole:]
        if self._tail:
            self._dataset.write_direct_chunk((place + whole // self._item,), self._tail.ljust(self._size, b"\0"))

    def last(self) -> bytes:
        """Never called for a new dataset."""
        raise NotImplementedError


def journaled(path: Path, batches: int, spread: int, warm_up: int) -> Run:
    """Write with the store."""
    with EventStore.create(path, _IDENTITY) as store:

        def append(consultation: str, records: Sequence[Record]) -> None:
            store.append(consultation, records)

        def commit(sequence: int) -> None:
            store.commit(sequence)

        run = _write(append, commit, store.maybe_checkpoint, batches, spread, warm_up)
        run.checkpoints = store.stats.checkpoints
    return run


def plain(path: Path, batches: int, spread: int, warm_up: int) -> Run:
    """Write the same layout with HDF5's functions alone, flushed and synced in place of a commit."""
    create_partition(path, _IDENTITY, StorageIO())
    descriptor = os.open(path, os.O_RDWR)
    with h5py.File(path, "r+", libver=LIBVER, rdcc_nslots=17) as file:
        consultations = ConsultationGroups(
            file.id, CONSULTATIONS, cast("Any", HDF5Dataset), _IDENTITY, events=0, limit=2000
        )

        def append(consultation: str, records: Sequence[Record]) -> None:
            consultations.append(consultation, records, 0)

        def commit(sequence: int) -> None:
            file.attrs.modify("committed_sequence", sequence)
            file.flush()
            os.fsync(descriptor)

        try:
            return _write(append, commit, lambda: None, batches, spread, warm_up)
        finally:
            os.close(descriptor)
            consultations.clear()


def batch(number: int, spread: int) -> list[tuple[str, list[Record]]]:
    """Make the events of a batch, by consultation."""
    groups: dict[str, list[Record]] = {}
    for sequence in range(number * BATCH_EVENTS + 1, (number + 1) * BATCH_EVENTS + 1):
        body = b'{"event_type":"MESSAGE_RECEIVED","payload":"' + b"%d " % sequence * (BODY_BYTES // 8) + b'"}'
        record = Record(sequence, time.time_ns(), 2, sequence.to_bytes(16, "big"), body[:BODY_BYTES] + b'"}')
        groups.setdefault(f"consultation-{sequence % spread}", []).append(record)
    return list(groups.items())


def percentile(values: list[float], share: float) -> float:
    """Return the value below which *share* of *values* lie."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def main(arguments: list[str]) -> int:
    """Run, and print Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus_commits", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=200, help="measured in each file")
    parser.add_argument("--warm-up", type=int, help="batches not measured; 3: the journal grows (default: by spread)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; its disk is what is measured")
    options = parser.parse_args(arguments)
    print("| consultations | target | events/s | commit p50 ms | p99 ms | p99/p50 | checkpoints | events/s, x plain |")
    print("|---|---|---|---|---|---|---|---|")
    for spread, first_turn in SPREADS.items():
        warm_up = first_turn if options.warm_up is None else options.warm_up
        runs = _rounds(options.rounds, options.batches, spread, warm_up, options.folder)
        for target, own in runs.items():
            ratio = statistics.median(one.rate / other.rate for one, other in zip(own, runs[PLAIN], strict=True))
            print(_row(spread, target, own, f"{ratio:.2f}"), flush=True)
    return 0


def _rounds(rounds: int, batches: int, spread: int, warm_up: int, folder: Path | None) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {target: [] for target in TARGETS}
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="fiq-bench-", dir=folder) as name:
            turns = list(TARGETS.items())
            for place, (target, write) in enumerate(turns if number % 2 else reversed(turns)):
                runs[target].append(write(Path(name) / f"{place}.h5", batches, spread, warm_up))
    return runs


def _write(
    append: Append, commit: Commit, afterwards: Callable[[], object], batches: int, spread: int, warm_up: int
) -> Run:
    run = Run()
    for number in range(warm_up + batches):
        groups = batch(number, spread)
        started = time.perf_counter()
        for consultation, records in groups:
            append(consultation, records)
        appended = time.perf_counter()
        commit((number + 1) * BATCH_EVENTS)
        committed = time.perf_counter()
        afterwards()
        if number >= warm_up:
            run.commits_ms.append((committed - appended) * 1000)
            run.seconds += time.perf_counter() - started
    return run


def _row(spread: int, target: str, runs: list[Run], ratio: str) -> str:
    p50 = statistics.median(percentile(run.commits_ms, 0.5) for run in runs)
    p99 = statistics.median(percentile(run.commits_ms, 0.99) for run in runs)
    rate = statistics.median(run.rate for run in runs)
    checkpoints = sum(run.checkpoints for run in runs)
    return f"| {spread} | {target} | {rate:,.0f} | {p50:.1f} | {p99:.1f} | {p99 / p50:.1f} | {checkpoints} | {ratio} |"


TARGETS = {JOURNALED: journaled, PLAIN: plain}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
