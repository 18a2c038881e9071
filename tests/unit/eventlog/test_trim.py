"""What every store has committed, from the consumers' own figures."""

from __future__ import annotations

from typing import Any

from services.eventlog.jetstream.processes import LiveProcess, read_committed, show_committed
from services.eventlog.jetstream.trim import committed_everywhere


def consumer(store: str, partition: int, floor: int) -> dict[str, Any]:
    return {"name": f"fi-workers-{store}-{partition:02d}", "ack_floor": {"stream_seq": floor}}


def process(store: str, committed: dict[int, int]) -> LiveProcess:
    return LiveProcess(store, "volume", frozenset(committed), committed)


def test_the_slowest_partition_counts() -> None:
    """Everything below its floor is in HDF5."""
    consumers = [consumer("main", 0, 90), consumer("main", 1, 40)]
    assert 40 == committed_everywhere(consumers, 2)


def test_the_slowest_store_counts() -> None:
    """The second copy must get every event too."""
    consumers = [consumer("main", 0, 90), consumer("second", 0, 20)]
    assert 20 == committed_everywhere(consumers, 1)


def test_a_store_that_is_not_complete_holds_everything_back() -> None:
    """Its missing partitions have committed nothing yet; a consumer that the broker left out may be behind."""
    assert 0 == committed_everywhere([consumer("main", 0, 90), consumer("main", 1, 90), consumer("b", 0, 90)], 2)


def test_without_stores_nothing_is_committed() -> None:
    """Foreign consumers do not count."""
    assert 0 == committed_everywhere([{"name": "somebody", "ack_floor": {"stream_seq": 9}}], 16)


def test_a_floor_that_ran_ahead_of_the_file_does_not_count() -> None:
    """A purge moves the floors of consumers that have caught up."""
    consumers = [consumer("main", 0, 90), consumer("main", 1, 90)]
    assert 38 == committed_everywhere(consumers, 2, [process("main", {0: 90}), process("main", {1: 38})])


def test_a_file_ahead_of_its_floor_does_not_count_either() -> None:
    """The acknowledgement follows in a moment."""
    assert 40 == committed_everywhere([consumer("main", 0, 40)], 1, [process("main", {0: 90})])


def test_a_partition_that_nobody_runs_holds_everything_back() -> None:
    """What its file holds is not known; another store's process does not count."""
    consumers = [consumer("main", 0, 90), consumer("main", 1, 90)]
    assert 0 == committed_everywhere(consumers, 2, [process("main", {0: 90}), process("second", {1: 90})])


def test_in_a_handover_the_greater_of_two_answers_counts() -> None:
    """A file never goes back."""
    assert 70 == committed_everywhere(
        [consumer("main", 0, 90)], 1, [process("main", {0: 50}), process("main", {0: 70})]
    )


def test_what_a_process_tells_is_read_as_it_was_shown() -> None:
    """And what another version may tell does no harm."""
    assert show_committed({3: 41, 0: 38}) == "00:38,03:41"
    assert read_committed("00:38,03:41") == {0: 38, 3: 41}
    assert read_committed("") == read_committed("x:1,2:y,3,:") == {}
