"""Benchmark of adaptive batches: what is offered a second → size of a batch, duration of a commit, age at the commit.

``python -m benchmarks.corpus_curve`` feeds a store as the persister does: whatever has arrived is the next batch,
up to the persister's limits. So idle events are committed at once, and batches grow when they come faster.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.corpus_commits import BODY_BYTES, percentile
from fiq.corpus import EventStore, Identity, Record
from services.persister.settings import PersisterSettings

#: events offered a second
RATES = (10, 100, 1_000, 5_000, 20_000, 50_000)
#: consultations under way at the same time
CONSULTATIONS = 200
_IDENTITY = Identity("bench", "bench", 1, 0, 1, "bench", "bench")


@dataclass(slots=True)
class Curve:
    """What one rate brought.

    Attributes:
        batches: events of each batch.
        commits_ms: appends and commit of each.
        ages_ms: from an event's arrival to its commit, for the oldest event of each batch.
        seconds: how long it took.
    """

    batches: list[int] = field(default_factory=list)
    commits_ms: list[float] = field(default_factory=list)
    ages_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0


def offer(store: EventStore, rate: float, seconds: float) -> Curve:
    """Offer *rate* events a second for *seconds*, whether they are taken in time or not."""
    curve = Curve()
    records = _records(store.committed, int(rate * seconds))
    limit = PersisterSettings().batch_events
    started = time.perf_counter()
    done = 0
    while done < len(records):
        now = time.perf_counter() - started
        arrived = min(len(records), int(now * rate) + 1, done + limit)
        if arrived == done:
            time.sleep(max(0.0, done / rate - now))
            continue
        _commit(store, records[done:arrived])
        committed = time.perf_counter() - started
        curve.batches.append(arrived - done)
        curve.commits_ms.append((committed - now) * 1000)
        curve.ages_ms.append((committed - done / rate) * 1000)
        store.maybe_checkpoint()
        done = arrived
    curve.seconds = time.perf_counter() - started
    return curve


def main(arguments: list[str]) -> int:
    """Run, and print Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus_curve", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each rate")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; its disk is what is measured")
    options = parser.parse_args(arguments)
    print("| offered/s | taken/s | batch p50 | largest | commit p50 ms | p99 ms | age p50 ms | age p99 ms |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="fiq-bench-", dir=options.folder) as name:
        for rate in RATES:
            with EventStore.create(Path(name) / f"{rate}.h5", _IDENTITY) as store:
                _warm_up(store)
                print(_row(rate, offer(store, rate, options.seconds)), flush=True)
    return 0


def _warm_up(store: EventStore) -> None:
    """Create the groups: a consultation begins once, its events come all the time."""
    _commit(store, _records(0, CONSULTATIONS))


def _commit(store: EventStore, records: Sequence[tuple[str, Record]]) -> None:
    groups: dict[str, list[Record]] = {}
    for consultation, record in records:
        groups.setdefault(consultation, []).append(record)
    for consultation, own in groups.items():
        store.append(consultation, own)
    store.commit(records[-1][1].sequence)


def _records(after: int, count: int) -> list[tuple[str, Record]]:
    body = b'{"event_type":"MESSAGE_RECEIVED","payload":"' + b"x" * BODY_BYTES + b'"}'
    return [
        (f"consultation-{sequence % CONSULTATIONS}", Record(sequence, sequence, sequence.to_bytes(16, "big"), body))
        for sequence in range(after + 1, after + 1 + count)
    ]


def _row(rate: int, curve: Curve) -> str:
    taken = sum(curve.batches) / curve.seconds
    batches = [float(size) for size in curve.batches]
    cells = [
        f"{rate:,}",
        f"{taken:,.0f}",
        f"{percentile(batches, 0.5):,.0f}",
        f"{max(batches):,.0f}",
        f"{percentile(curve.commits_ms, 0.5):.1f}",
        f"{percentile(curve.commits_ms, 0.99):.1f}",
        f"{percentile(curve.ages_ms, 0.5):.1f}",
        f"{percentile(curve.ages_ms, 0.99):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
