"""Benchmark of the persister: how fast real processes drain a backlog that lies in the stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks import dialogues, processes, streams
from benchmarks.bench import PARTITIONS, TYPICAL_SPREAD, Bench
from benchmarks.commits import CommitLog
from benchmarks.processes import HERE, Persister, Product
from benchmarks.results import PERSISTER, Drain, middle
from fiq.event import Event

_stores = (f"bench{number}" for number in itertools.count(1))


def drain(bench: Bench) -> list[Drain]:
    """Let one and two processes of each product drain all partitions, in rounds that take turns."""
    total, rates = bench.plan.backlog, dict[tuple[str, int], list[float]]()
    with ExitStack() as stack:
        urls = {}
        for product in bench.products:
            folder = bench.folder / f"drain-{product.label}"
            urls[product] = stack.enter_context(processes.nodes(folder, product)).urls[0]
            with processes.ingest(urls[product], folder, partitions=PARTITIONS, product=product):
                bench.tell(f"drain: publishing {total:,} events")  # ingest has made the stream
                streams.fill(urls[product], _backlog(bench, TYPICAL_SPREAD))
        for number in range(bench.plan.drain_rounds):
            for product, url in urls.items():
                for workers in (1, 2):
                    rate = drained(bench, url, total, partitions=PARTITIONS, workers=workers, product=product)
                    target = f"{PERSISTER}, {product.label}" if product.label else PERSISTER
                    rates.setdefault((target, workers), []).append(rate)
                    bench.tell(f"drain: round {number + 1}, {target}, {workers} processes: {rate:,.0f}/s")
    return [
        _row(target, found, spread=TYPICAL_SPREAD, partitions=PARTITIONS, workers=workers, events=total)
        for (target, workers), found in rates.items()
    ]


def drained(bench: Bench, url: str, events: int, *, partitions: int, workers: int, product: Product = HERE) -> float:
    """Let a persister with *workers* processes drain the stream into an empty volume; return the events a second."""
    store = next(_stores)
    data = bench.folder / store / "corpus"
    with processes.persisters(url, data, workers=workers, partitions=partitions, store=store, product=product) as found:
        logs = wait_committed(found, events, bench.plan.drain_timeout)
    streams.delete_consumers(url)
    commits = [commit for log in logs for commit in log.commits]
    begin = min(log.started_ns or log.commits[0].at_ns for log in logs if log.commits)
    return sum(commit.events for commit in commits) / (max(commit.at_ns for commit in commits) - begin) * 1e9


def wait_committed(found: list[Persister], events: int, timeout: float) -> list[CommitLog]:
    """Wait until persisters have committed *events*, and return what their logs say."""
    logs = [CommitLog(one.process.log) for one in found]
    # seldom: it costs time on the same cores
    processes.wait(lambda: sum(log.read() for log in logs) >= events, found[0].process, timeout, poll=0.2)
    return logs


def _backlog(bench: Bench, spread: int) -> Iterator[Event]:
    return dialogues.backlog(dialogues.load(bench.dialogues), bench.plan.backlog, spread)


def _row(target: str, rates: list[float], *, spread: int, partitions: int, workers: int, events: int) -> Drain:
    return Drain(
        target=target,
        partitions=partitions,
        workers=workers,
        spread=spread,
        events=events,
        events_per_s=middle(rates),
        rounds=rates,
    )
