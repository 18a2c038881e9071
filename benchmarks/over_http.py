"""Batches that are posted and events that are read back over HTTP, against the same without HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson
from aiohttp import ClientSession

from benchmarks import dialogues, drains, processes, streams
from benchmarks.bench import BATCH_CLIENTS, PARTITIONS, TYPICAL_SPREAD, Bench, of_rounds
from benchmarks.load import Report
from benchmarks.results import (
    BARE_BATCH,
    BATCH,
    CORPUS_READER,
    READ_FOLLOW,
    READ_JSON,
    READ_NDJSON,
    READ_ONE,
    Read,
    Throughput,
    middle,
)
from fiq.corpus import open_corpus
from services.cli.embedded.processes import LOOPBACK

#: events of a page, as many as can be asked for
_PAGE = 1000
#: single events that are asked for, one after another
_SINGLY = 500
_STORE = "reads"

#: reads something, and returns how many events that were
Way = Callable[[], Awaitable[int]]


def batches(bench: Bench) -> list[Throughput]:
    """Measure batches over HTTP, and bare ones."""
    streams.fresh_stream(bench.cluster, PARTITIONS)
    url = bench.cluster.urls[0]
    reports: dict[str, list[Report]] = {BATCH: [], BARE_BATCH: []}
    settings = {"FI_MAX_WINDOW_EVENTS": "0"}  # the rounds of all targets fill the window
    with processes.ingest(url, bench.folder, partitions=PARTITIONS, settings=settings) as (_, port):
        for number in range(bench.plan.rounds):
            bench.tell(f"batches: round {number + 1}")
            reports[BATCH].append(bench.load(port, BATCH_CLIENTS, "batch"))
            reports[BARE_BATCH].append(bench.load(url, BATCH_CLIENTS, "bare_batch"))
    return [of_rounds(target, BATCH_CLIENTS, of) for target, of in reports.items()]


def reads(bench: Bench) -> list[Read]:
    """Measure each way over the same events, all persisted, in rounds that take turns."""
    total = min(bench.plan.backlog, 20_000)
    bench.tell(f"reads: {total:,} events")
    streams.fresh_stream(bench.cluster, PARTITIONS)
    streams.fill(bench.cluster.urls[0], dialogues.backlog(dialogues.load(bench.dialogues), total, TYPICAL_SPREAD))
    url, data = bench.cluster.urls[0], bench.folder / _STORE / "corpus"
    with processes.persisters(url, data, partitions=PARTITIONS, store=_STORE) as found:
        drains.wait_committed(found, total, bench.plan.drain_timeout)
        settings = {"FI_STORE": _STORE, "FI_MAX_FOLLOWERS": "1000"}
        with processes.ingest(url, bench.folder, partitions=PARTITIONS, settings=settings) as (_, port):
            return asyncio.run(_compare(bench, port, data))


async def _compare(bench: Bench, port: int, data: Path) -> list[Read]:
    rates: dict[str, list[float]] = {}
    events = 0
    async with ClientSession(f"http://{LOOPBACK}:{port}") as session:
        ways = _ways(data, session)
        for number in range(bench.plan.rounds):
            bench.tell(f"reads: round {number + 1}")
            for target, way in ways.items():
                started = time.perf_counter()
                count = await way()
                rates.setdefault(target, []).append(count / (time.perf_counter() - started))
                events = max(events, count)
    return [
        Read(target=target, events=events, events_per_s=middle(found), rounds=found) for target, found in rates.items()
    ]


def _ways(data: Path, session: ClientSession) -> dict[str, Way]:
    with open_corpus(data) as corpus:
        ids = {name: [record.event_id for record in corpus[name]] for name in corpus}
    pairs = [(name, event_id) for name, events in ids.items() for event_id in events]

    async def plain() -> int:
        with open_corpus(data) as corpus:
            return sum(len([record.raw for record in corpus[name]]) for name in corpus)

    async def ndjson() -> int:
        bodies = [await _get(session, f"{_path(name)}?limit={_PAGE}", "application/x-ndjson") for name in ids]
        return sum(body.count(b"\n") for body in bodies)

    async def json() -> int:
        bodies = [await _get(session, f"{_path(name)}?limit={_PAGE}", "application/json") for name in ids]
        return sum(len(orjson.loads(body)["events"]) for body in bodies)

    async def one() -> int:
        step = max(1, len(pairs) // _SINGLY)
        return len([await _get(session, f"{_path(name)}/{event_id}", "*/*") for name, event_id in pairs[::step]])

    async def follow() -> int:
        return sum([await _followed(session, name, len(events)) for name, events in ids.items()])

    return {
        CORPUS_READER: plain,
        READ_NDJSON: ndjson,
        READ_JSON: json,
        READ_FOLLOW: follow,
        READ_ONE: one,
    }


def _path(consultation: str) -> str:
    return f"/consultations/{consultation}/events"


async def _get(session: ClientSession, path: str, accept: str) -> bytes:
    async with session.get(path, headers={"Accept": accept}) as answer:
        body = await answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {body!r}")
        return body


async def _followed(session: ClientSession, consultation: str, events: int) -> int:
    """Follow a consultation until all of its *events* have come."""
    count = 0
    async with session.get(f"{_path(consultation)}?follow=1") as answer:
        while count < events:
            line = await answer.content.readline()
            if not line:
                raise RuntimeError(f"following ended with {answer.status} after {count} events")
            count += line.startswith(b"id: ")
    return count
