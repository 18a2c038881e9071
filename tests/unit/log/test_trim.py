"""What every store has committed, from the keys of the bucket, and which process trims."""

from __future__ import annotations

import asyncio

import pytest

from services.log.jetstream import log as module
from services.log.jetstream.connection import Connection
from services.log.jetstream.log import Trimmer, committed_everywhere, is_turn
from services.log.jetstream.monitor import read_process, read_progress, show_progress
from services.log.protocol import Trimmed
from services.log.settings import LogSettings
from services.log.status import LiveProcess, LogState, PartitionProgress, Placement, StorePlacement
from tests.support.polling import eventually


def store(name: str, committed: dict[int, int], *, formed: bool = True) -> StorePlacement:
    placed = {p: Placement(p, "volume", 1, at, 1, 1) for p, at in committed.items()}
    return StorePlacement(name, formed, ("volume",), placed, frozenset(), "2026-01-01T00:00:00Z", 1)


def process(name: str, *partitions: int) -> LiveProcess:
    return LiveProcess(name, "volume", frozenset(partitions), {})


def test_each_partition_has_committed_what_every_store_has() -> None:
    """The second copy must get every event too; another partition does not matter."""
    stores = {"main": store("main", {0: 90, 1: 20}), "second": store("second", {0: 40, 1: 80})}
    assert [40, 20] == [committed_everywhere(stores, partition, 100) for partition in (0, 1)]


def test_a_partition_without_a_key_has_committed_nothing() -> None:
    """Of a store that is being formed, or that has lost the key: its volume may lack everything."""
    stores = {"main": store("main", {0: 90, 1: 90}), "second": store("second", {0: 90}, formed=False)}
    assert [90, 0] == [committed_everywhere(stores, partition, 100) for partition in (0, 1)]


def test_without_stores_nothing_is_committed() -> None:
    """No persister has ever been there."""
    assert 0 == committed_everywhere({}, 0, 100)


def test_a_key_that_is_ahead_of_the_stream_counts_for_nothing() -> None:
    """The stream was set back: what is in the file is not what is in the stream."""
    assert 0 == committed_everywhere({"main": store("main", {0: 101})}, 0, 100)


def test_a_key_that_means_another_event_counts_for_nothing() -> None:
    """The stream was set back and has grown since."""
    stores = {"main": store("main", {0: 50, 1: 60}), "second": store("second", {0: 70, 1: 80})}
    assert [0, 60] == [committed_everywhere(stores, partition, 100, {("second", 0)}) for partition in (0, 1)]


def test_the_process_with_the_lowest_partition_that_is_run_trims() -> None:
    """When partition 00 is stopped or away, another one does."""
    state = LogState(processes=(process("main", 3, 4), process("main", 2, 5), process("second", 2)))
    assert not is_turn(state, "main", [3, 4])
    assert is_turn(state, "main", [2, 5])
    assert not is_turn(state, "second", [2])
    assert not is_turn(state, "main", [])


def test_a_process_that_hears_no_other_trims() -> None:
    """Several do no harm, none at all would."""
    assert is_turn(LogState(), "main", [7])


async def test_trim_goes_on_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message that it stumbled over may be gone at the next look, and persisting must not end with it."""
    monkeypatch.setattr(module, "TRIM_SECONDS", 0.001)
    trims = iter([ValueError("4x")])

    async def trim(_: Trimmer) -> Trimmed:
        if (error := next(trims, None)) is not None:
            raise error
        return Trimmed(7, 0, 0.5)

    monkeypatch.setattr(Trimmer, "trim", trim)
    told: list[Trimmed] = []
    task = asyncio.create_task(
        Trimmer(Connection(LogSettings(), pytest.fail), retention=0, on_round=told.append).run(lambda: True)
    )
    await eventually(lambda: told or task.done())
    task.cancel()
    assert told


def test_what_a_process_tells_is_read_as_it_was_shown() -> None:
    """And what another version may tell does no harm."""
    progress = {3: PartitionProgress(41, 0), 0: PartitionProgress(38, 2)}
    assert show_progress(progress) == "00:38:2,03:41:0"
    assert read_progress("00:38:2,03:41:0") == progress
    assert read_progress("") == read_progress("x:1:1,2:y:1,3,:,::,4:5") == {}
    said = {"store": "main", "volume": "v", "partitions": "00,03", "progress": "00:1:2", "stream_sequence": "9"}
    assert LiveProcess("main", "v", frozenset({0, 3}), {0: PartitionProgress(1, 2)}, 9, said) == read_process(said)
