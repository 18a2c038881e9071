"""What every store has committed, from the consumers' own figures."""

from __future__ import annotations

from typing import Any

from services.eventlog.jetstream.trim import committed_everywhere


def consumer(store: str, partition: int, floor: int) -> dict[str, Any]:
    return {"name": f"fi-workers-{store}-{partition:02d}", "ack_floor": {"stream_seq": floor}}


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
