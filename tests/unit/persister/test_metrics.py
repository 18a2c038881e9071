"""The persister's metrics where they are more than a counter."""

from __future__ import annotations

from typing import Any

import pytest

from fiq.corpus import StoreStats
from services.persister.metrics import PersisterMetrics, RateWindow
from services.persister.rounds import PartitionBatch
from tests.support.persister import delivery


def batch(count: int, **became: int) -> PartitionBatch:
    """Return a batch of *count* events, and what became of them."""
    one: Any = None
    return PartitionBatch(one, [delivery(n + 1) for n in range(count)], **became)  # type: ignore[arg-type]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("services.persister.metrics.time", clock)
    return clock


def value(metrics: PersisterMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_rate_is_the_mean_over_the_window(clock: Clock) -> None:
    """What is older counts no more."""
    window = RateWindow(10.0)
    window.add(50)
    clock.now += 6
    window.add(20)
    assert 7.0 == window.rate()
    clock.now += 5
    assert 2.0 == window.rate()
    clock.now += 10
    assert 0.0 == window.rate()


def test_the_ack_rate_outlasts_observations(clock: Clock) -> None:
    """Other numbers are updated every two seconds; that must not restart the window."""
    metrics = PersisterMetrics()
    metrics.of(3).state("following")
    metrics.of(3).batch(batch(40, persisted=40))
    metrics.of(3).queue(lambda: 7, lambda: 5)
    assert 4.0 == value(metrics, "fi_queue_ack_rate", partition="03")
    assert 7.0 == value(metrics, "fi_queue_length", partition="03")
    assert 5.0 == value(metrics, "fi_queue_pending", partition="03")


def test_a_batch_is_counted(clock: Clock) -> None:
    """Events, retries, bytes, and what is reached."""
    metrics = PersisterMetrics()
    made = batch(5, persisted=3, duplicates=2)
    metrics.of(3).batch(made)
    assert 3.0 == value(metrics, "fi_persister_events_total", partition="03")
    assert 2.0 == value(metrics, "fi_persister_duplicates_total", partition="03")
    assert made.size == value(metrics, "fi_persister_bytes_total", partition="03")
    assert 5.0 == value(metrics, "fi_persister_committed_sequence", partition="03")


def test_one_state_is_set_at_a_time() -> None:
    """An alert looks for retrying or stopped."""
    metrics = PersisterMetrics()
    metrics.of(0).state("following")
    metrics.of(0).state("stopped")
    states = ("starting", "following", "retrying", "stopped")
    found = {state: value(metrics, "fi_persister_partition_state", partition="00", state=state) for state in states}
    assert {"starting": 0, "following": 0, "retrying": 0, "stopped": 1} == found


def test_a_partition_that_left_shows_no_gauges_but_keeps_its_counters(clock: Clock) -> None:
    """Or a partition would have two lengths in Prometheus; a counter that vanishes would break rates."""
    metrics = PersisterMetrics()
    for partition in (3, 4):
        metrics.of(partition).state("following")
        metrics.of(partition).committed(9)
        metrics.of(partition).queue(lambda: 1, lambda: 1)
        metrics.of(partition).store(StoreStats(1, 1, 1, False, 0, "", 0.0, 0, 1, 1, 0, 0, 1, 0, 1, 0.1, 0.1))
        metrics.of(partition).batch(batch(1, persisted=1))
    metrics.of(3).remove()
    samples = [s for metric in metrics.registry.collect() for s in metric.samples if s.labels.get("partition") == "03"]
    assert {sample.name.rpartition("_")[2] for sample in samples} == {"total", "created"}
    assert 1.0 == value(metrics, "fi_queue_length", partition="04")
    metrics.of(3).state("following")
    assert 0.1 == value(metrics, "fi_queue_ack_rate", partition="03")
