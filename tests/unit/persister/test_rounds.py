"""Rounds: several partitions of one process commit together, and none of them holds up the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from fiq.corpus import EventStore, open_corpus
from services.persister import rounds as module
from services.persister.dead_letters import DeadLetters
from services.persister.metrics import PersisterMetrics
from services.persister.partition import PartitionRunner, RunnerState
from services.persister.rounds import Hdf5Thread, Rounds
from tests.support.persister import IDENTITY, LOG, DeadStream, Stream, contents, delivery, poison, reusing
from tests.support.polling import eventually

PARTITIONS = 3


class Process:
    """Some partitions that share their rounds, as in one persister process."""

    def __init__(self, folder: Path, hdf5: ThreadPoolExecutor) -> None:
        self.folder = folder
        self.metrics = PersisterMetrics()
        self.rounds = Rounds(Hdf5Thread(hdf5), self.metrics, max_events=100, max_bytes=2**20)
        self.turning = asyncio.create_task(self.rounds.run())
        self.streams = [Stream() for _ in range(PARTITIONS)]
        self.dead = [DeadStream() for _ in range(PARTITIONS)]
        self.stores: dict[int, EventStore] = {}
        self.wrap: Callable[[int, EventStore], None] = lambda _number, _store: None
        self.runners = [self._runner(number) for number in range(PARTITIONS)]

    def path(self, number: int) -> Path:
        return self.folder / f"{number:02}.h5"

    def _runner(self, number: int) -> PartitionRunner:
        def opened() -> EventStore:
            path = self.path(number)
            store = EventStore.open(path, expected=IDENTITY) if path.exists() else EventStore.create(path, IDENTITY)
            self.stores[number] = store
            self.wrap(number, store)
            return store

        return PartitionRunner(
            number,
            open_store=opened,
            follower=self.streams[number].follower,
            dead_letters=DeadLetters(self.dead[number], number, LOG),
            rounds=self.rounds,
            metrics=self.metrics,
        )

    async def start(self) -> None:
        for runner in self.runners:
            runner.start()
        await eventually(lambda: all(runner.state is RunnerState.FOLLOWING for runner in self.runners))

    async def reach(self, number: int, sequence: int) -> None:
        await eventually(lambda: sequence in self.streams[number].acknowledged)


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[Process]:
    with ThreadPoolExecutor(1) as hdf5:
        made = Process(tmp_path, hdf5)
        yield made
        for runner in made.runners:
            await runner.stop()
        made.turning.cancel()
        await asyncio.wait({made.turning})


def written_after(path: Path, first: int) -> list[int]:
    """Return when the events from sequence *first* on were written, conflicts included."""
    with open_corpus(path) as corpus:
        found = [*corpus.values(), *corpus.conflicts()]
        assert 3 == len(found)
        return [event.written_ns for one in found for event in one if event.sequence >= first]


def lines(entries: list[Any]) -> list[Any]:
    return [entry for entry in entries if entry["event"] == "EVENT_PERSISTED"]


async def test_what_came_for_all_partitions_is_one_round_with_one_line(process: Process) -> None:
    """One job, one line; each partition acknowledges its last event once."""
    await process.start()
    with capture_logs() as entries:
        for number, stream in enumerate(process.streams):
            stream.add(*(delivery(sequence) for sequence in range(1, 5 + number)))
        for number in range(PARTITIONS):
            await process.reach(number, 4 + number)
        await eventually(lambda: lines(entries))
    (line,) = lines(entries)
    assert ("00,01,02", 15, 6) == (line["partitions"], line["persisted"], line["last_sequence"])
    assert [[4], [5], [6]] == [stream.acknowledged for stream in process.streams]


async def test_all_rows_of_a_round_have_the_time_of_the_round(process: Process) -> None:
    """The clock is read once, when the round begins; conflicts have it, too."""
    await process.start()
    times: list[int] = []
    for first in (1, 11):
        began = time.time_ns()
        for stream in process.streams:
            stream.add(delivery(first), delivery(first + 1, consultation="c2"), reusing(first + 2, of=first))
        for number in range(PARTITIONS):
            await process.reach(number, first + 2)
        written = {row for number in range(PARTITIONS) for row in written_after(process.path(number), first)}
        assert 1 == len(written)
        assert began <= min(written) <= time.time_ns()
        times += written
    assert times[0] < times[1]


async def test_a_busy_partition_leaves_the_others_their_part_of_a_round(process: Process) -> None:
    """The limit is of all together; what one does not need is another one's."""
    await process.start()
    with capture_logs() as entries:
        process.streams[0].add(*(delivery(sequence) for sequence in range(1, 301)))
        process.streams[1].add(*(delivery(sequence) for sequence in range(1, 11)))
        await process.reach(0, 300)
        await process.reach(1, 10)
    first = lines(entries)[0]
    assert ("01,00", 100) == (first["partitions"], first["persisted"])
    assert [90, 190, 290, 300] == process.streams[0].acknowledged


async def test_a_partition_that_fails_leaves_the_round_and_comes_back(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are committed in the same round; it opens its file again and loses nothing."""
    monkeypatch.setattr("services.persister.partition.BACKOFF_SECONDS", (0.01,))
    failures = [OSError(5, "no"), None]

    def wrap(number: int, store: EventStore) -> None:
        error = failures.pop(0) if number == 1 and failures else None
        if error is not None:

            def failing(*_: object) -> bool:
                raise error

            store.append = failing  # type: ignore[method-assign,assignment]

    process.wrap = wrap
    await process.start()
    for stream in process.streams:
        stream.add(delivery(1))
    for number in range(PARTITIONS):
        await process.reach(number, 1)
    assert [1, 2, 1] == [stream.followers for stream in process.streams]
    assert all({"c1": [1]} == contents(process.path(number)) for number in range(PARTITIONS))


async def test_poison_holds_up_its_own_partition_only(process: Process) -> None:
    """While `fi-dead` does not answer the others go on, round after round."""
    process.dead[1].gate = asyncio.Event()
    await process.start()
    process.streams[1].add(delivery(1), poison(2), delivery(3))
    await eventually(lambda: process.dead[1].attempts == 1)
    for sequence in range(1, 4):
        process.streams[0].add(delivery(sequence))
        await process.reach(0, sequence)
    assert [] == process.streams[1].acknowledged
    process.streams[1].add(delivery(4))
    process.dead[1].gate.set()
    await process.reach(1, 4)
    assert [3, 4] == process.streams[1].acknowledged
    assert {"c1": [1, 3, 4]} == contents(process.path(1))


async def test_rounds_are_paced_by_their_cost(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone event is written at once; what comes soon after it waits, and is written together."""
    monkeypatch.setattr(module, "SHARE", 1e-9)
    monkeypatch.setattr(module, "LONGEST_SECONDS", 0.3)
    await process.start()
    process.streams[0].add(delivery(1))
    await process.reach(0, 1)
    began = time.monotonic()
    for sequence in range(2, 6):
        process.streams[0].add(delivery(sequence))
        await asyncio.sleep(0.01)
    await process.reach(0, 5)
    assert [1, 5] == process.streams[0].acknowledged
    assert time.monotonic() - began >= 0.2


async def test_a_full_round_is_followed_by_the_next_at_once(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog is drained without pauses."""
    monkeypatch.setattr(module, "SHARE", 1e-9)
    monkeypatch.setattr(module, "LONGEST_SECONDS", 30.0)
    await process.start()
    process.streams[0].add(*(delivery(sequence) for sequence in range(1, 1001)))
    async with asyncio.timeout(10):
        await process.reach(0, 1000)
        process.streams[1].add(*(delivery(sequence) for sequence in range(1, 101)))  # as much as a round can take
        await process.reach(1, 100)


async def test_a_job_that_cannot_be_started_stops_no_partition_for_good(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches count as failed: the partitions open their files again, and a stop ends."""
    monkeypatch.setattr("services.persister.partition.BACKOFF_SECONDS", (0.01,))
    await process.start()
    run, failures = process.rounds.hdf5.run, [MemoryError()]

    async def failing(call: Callable[[], Any]) -> Any:
        if failures:
            raise failures.pop()
        return await run(call)

    monkeypatch.setattr(process.rounds.hdf5, "run", failing)
    for stream in process.streams:
        stream.add(delivery(1))
    for number in range(PARTITIONS):
        await process.reach(number, 1)
    assert all({"c1": [1]} == contents(process.path(number)) for number in range(PARTITIONS))
