"""What the metrics show of the log: on a real cluster, when it is well and when it is not."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from nats.aio.client import Client
from prometheus_client import CollectorRegistry
from services.eventlog.jetstream.watch import LogWatch, watching

from services.cli.cluster import Cluster
from services.eventlog.jetstream import watch as watch_module
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.jetstream.connection import close, connect
from services.eventlog.jetstream.definitions import consumer_config
from services.eventlog.jetstream.names import STREAM
from services.eventlog.jetstream.report import PartitionReport
from services.eventlog.metrics import LogMetrics
from services.eventlog.settings import LogSettings
from tests.support.broker import plain_server
from tests.support.persisters import Log, Persister, provisioned
from tests.support.polling import eventually

#: clocks of one machine differ by nothing; the answer's way takes its time on a busy one, seconds
SAME_CLOCK = 1.0


class Watched:
    """A watch and what it shows."""

    def __init__(self, nc: Client, settings: LogSettings) -> None:
        self.registry = CollectorRegistry()
        self.metrics = LogMetrics(self.registry)
        self.watch = LogWatch(nc, settings, self.metrics)

    def __call__(self, name: str, **labels: str) -> float | None:
        """Return the value of a sample, None when it is not shown."""
        return self.registry.get_sample_value(name, labels)

    def series(self, name: str) -> dict[tuple[str, ...], float]:
        """Return the samples of one metric by the values of their labels, sorted by the labels' names."""
        found = (metric for metric in self.registry.collect() if metric.name == name)
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for metric in found
            for sample in metric.samples
        }

    async def until(self, check: Callable[[], bool]) -> None:
        """Look again and again until *check* is true."""

        async def looked() -> bool:
            await self.watch.look()
            return check()

        await eventually(looked)


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    async with provisioned(fresh_log, partitions=2) as made:
        yield made


@pytest.fixture
def seen(log: Log) -> Watched:
    return Watched(log.nc, log.settings)


async def _place(log: Log, partition: int, *, store: str = "main", volume: str = "v1") -> None:
    settings = LogSettings(servers=log.settings.servers, partitions=2, store=store)
    config = consumer_config(settings, partition, {"fi_volume": volume, "fi_epoch": "1"})
    await log.api.create_consumer(STREAM, config)


async def test_a_healthy_log_is_shown_with_its_three_nodes(log: Log, seen: Watched) -> None:
    """Both streams; the leader counts as a node that is up and has everything."""
    await log.publish(5)
    await seen.until(lambda: set(seen.series("fi_stream_replica_current").values()) == {1.0})

    nodes = {(node, stream): 1.0 for node in ("n1", "n2", "n3") for stream in ("fi-events", "fi-dead")}
    assert nodes == seen.series("fi_stream_replica_up")
    assert {"fi-events", "fi-dead"} == {stream for _, stream in seen.series("fi_stream_leader")}
    assert (1, 1) == (seen("fi_log_connected"), seen("fi_log_available"))
    assert {("fi-events",): 5, ("fi-dead",): 0} == seen.series("fi_stream_messages")
    assert 5 == seen("fi_stream_last_sequence", stream="fi-events")
    assert 64 * 2**20 == seen("fi_stream_max_bytes", stream="fi-events")
    assert (seen("fi_stream_bytes", stream="fi-events") or 0) > 0
    assert abs(seen("fi_clock_offset_seconds") or 0) < SAME_CLOCK
    assert 0 < (seen("fi_log_round_trip_seconds") or 0)
    assert {} == seen.series("fi_certificate_expiry_timestamp_seconds")


async def test_a_clock_that_is_ahead_of_the_brokers_is_shown(seen: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive: ours is ahead."""
    ahead = SimpleNamespace(time=lambda: time.time() + 100, perf_counter=time.perf_counter, monotonic=time.monotonic)
    monkeypatch.setattr(watch_module, "time", ahead)
    await seen.watch.look()
    assert abs((seen("fi_clock_offset_seconds") or 0) - 100) < SAME_CLOCK


async def test_partitions_that_nobody_has_claimed_are_shown_without_an_owner(seen: Watched) -> None:
    """Of the settings' store, while no store has any."""
    await seen.watch.look()
    assert {("00", "main", ""): 0, ("01", "main", ""): 0} == seen.series("fi_partition_owners")
    assert {} == seen.series("fi_volume_processes")
    assert {} == seen.series("fi_partition_backlog_events")


async def test_each_partitions_backlog_has_a_length_and_an_age(log: Log, seen: Watched) -> None:
    """Of every store; the age is that of the oldest event that is not acknowledged, and grows while it stays so."""
    for store in ("main", "second"):
        for partition in (0, 1):
            await _place(log, partition, store=store)
    await log.publish(3, consultations=1)  # c0 lives in one of the two
    await seen.until(lambda: sorted(seen.series("fi_partition_backlog_events").values()) == [0, 0, 3, 3])

    ages = seen.series("fi_partition_backlog_age_seconds")
    waiting = {key for key, age in ages.items() if age > 0}
    assert 2 == len(waiting)
    assert {("main",), ("second",)} == {key[1:] for key in waiting}
    await seen.until(lambda: all(seen.series("fi_partition_backlog_age_seconds")[key] > ages[key] for key in waiting))

    # when one store has committed everything
    for name in ("fi-workers-main-00", "fi-workers-main-01"):
        await log.api.reset_consumer(STREAM, name, 4)
    await seen.until(lambda: sorted(seen.series("fi_partition_backlog_events").values()) == [0, 0, 0, 3])
    (left,) = (key for key, age in seen.series("fi_partition_backlog_age_seconds").items() if age > 0)
    assert ("second",) == left[1:]


async def test_the_age_is_that_of_the_oldest_event_that_is_left(log: Log, seen: Watched) -> None:
    """Not of the oldest one in the stream, nor of another partition's."""
    await _place(log, 0)
    await _place(log, 1)
    await log.publish(1, consultations=1)
    await seen.until(lambda: sorted(seen.series("fi_partition_backlog_events").values()) == [0, 1])
    ((partition, _),) = (key for key, age in seen.series("fi_partition_backlog_age_seconds").items() if age > 0)
    first_at = time.time()
    await seen.until(lambda: (seen("fi_partition_backlog_age_seconds", store="main", partition=partition) or 0) > 1)

    await log.publish(1, consultations=1)
    await log.api.reset_consumer(STREAM, f"fi-workers-main-{partition}", 2)
    await seen.until(lambda: seen("fi_partition_backlog_events", store="main", partition=partition) == 1)
    assert (seen("fi_partition_backlog_age_seconds", store="main", partition=partition) or 0) < time.time() - first_at


async def test_a_volume_whose_processes_are_gone_is_seen_by_the_others(log: Log, seen: Watched, tmp_path: Path) -> None:
    """The placement names it; the service API has no answer from it, however it ended."""
    with Persister(tmp_path / "p", log.cluster, tmp_path / "data", FI_PARTITIONS="2") as persister:
        await persister.ready()
        await seen.until(lambda: set(seen.series("fi_partition_owners").values()) == {1.0})
        ((store, volume),) = seen.series("fi_volume_processes")
        assert "main" == store
        assert {("00", "main", volume), ("01", "main", volume)} == set(seen.series("fi_partition_owners"))
        assert 1 == seen("fi_volume_processes", store="main", volume=volume)

        persister.process.send_signal(signal.SIGKILL)
        await seen.until(lambda: seen("fi_volume_processes", store="main", volume=volume) == 0)
        assert {("00", "main", volume): 0, ("01", "main", volume): 0} == seen.series("fi_partition_owners")


async def test_a_node_that_is_down_is_shown_and_so_is_the_loss_of_the_quorum(
    log: Log, seen: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody answers any more is not shown after a while."""
    leader = await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)
    first, second = (index for index in range(3) if index != leader)
    gone = log.cluster.names[first]
    log.cluster.kill(first)
    await seen.until(lambda: seen("fi_stream_replica_up", stream=STREAM, node=gone) == 0)
    assert 1 == seen("fi_log_available")

    # a leader without followers goes on answering for a while; that must not count
    log.cluster.kill(second)
    await seen.until(lambda: seen("fi_log_available") == 0)

    monkeypatch.setattr(watch_module, "KEPT_SECONDS", 0.0)
    log.cluster.kill(leader)
    await seen.until(lambda: seen("fi_log_connected") == 0)
    for name in ("fi_stream_replica_up", "fi_stream_leader", "fi_stream_messages", "fi_partition_owners"):
        assert {} == seen.series(name)

    for index in range(3):
        log.cluster.start_node(index)
    await asyncio.to_thread(log.cluster.wait_ready)
    await seen.until(lambda: seen("fi_log_available") == 1)


async def test_one_lost_answer_is_bridged(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alert must not begin anew because a consumer elects its leader, or because an answer was lost."""
    numbers = {"pending": 7, "ack_pending": 1, "acknowledged": 0, "volume": "v1"}
    answered = PartitionReport(0, "fi-workers-main-00", exists=True, answered=True, **numbers)  # type: ignore[arg-type]
    silent = PartitionReport(0, "fi-workers-main-00", exists=True, answered=False)
    answers = iter([answered, silent])

    async def reports(*_: object) -> dict[str, tuple[PartitionReport, ...]]:
        return {"main": (next(answers),)}  # and from the third look on a fault

    monkeypatch.setattr(watch_module, "store_reports", reports)
    seen = Watched(log.nc, log.settings)
    for failures in (0, 0, 1):
        await seen.watch.look()
        assert 8 == seen("fi_partition_backlog_events", store="main", partition="00")
        assert 0 == seen("fi_partition_owners", store="main", partition="00", volume="v1")
        assert failures == seen("fi_log_observation_failures_total", part="partitions")


@pytest.mark.parametrize(
    ("denied", "owners", "failures"), [('"x"', {("00", "main", "v1"): 0.0}, 0), ('"$SRV.>"', {}, 1)]
)
async def test_a_watch_that_may_not_ask_takes_nobody_for_dead(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    denied: str,
    owners: dict[tuple[str, ...], float],
    failures: int,
) -> None:
    """Nobody there is one thing; silence after a refusal means nothing, it is counted and nobody is shown as dead."""
    placed = PartitionReport(0, "fi-workers-main-00", exists=True, answered=True, volume="v1")

    async def reports(*_: object) -> dict[str, tuple[PartitionReport, ...]]:
        return {"main": (placed,)}

    monkeypatch.setattr(watch_module, "store_reports", reports)
    user = f"{{ user: watcher, password: none, permissions: {{ publish: {{ deny: [{denied}] }} }} }}"
    with plain_server(tmp_path, f"authorization {{ users: [ {user} ] }}") as url:
        settings = LogSettings(servers=(url.replace("//", "//watcher:none@"),), replicas=1, partitions=1)
        async with _connected(settings) as nc:
            seen = Watched(nc, settings)
            await seen.watch.look()
            assert (1, 0) == (seen("fi_log_connected"), seen("fi_log_available"))
            assert owners == seen.series("fi_partition_owners")
            assert failures == seen("fi_log_observation_failures_total", part="processes")


async def test_it_looks_beside_the_work_and_ends_with_it(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, and shows a connection that is gone."""
    monkeypatch.setattr(watch_module, "LOOK_SECONDS", 0.05)
    registry = CollectorRegistry()
    async with _connected(log.settings) as nc:
        async with watching(nc, log.settings, LogMetrics(registry)):
            await eventually(lambda: registry.get_sample_value("fi_log_available") == 1)
            await close(nc)
            await eventually(lambda: registry.get_sample_value("fi_log_connected") == 0)
            assert 0 == registry.get_sample_value("fi_log_available")
        assert [] == [task for task in asyncio.all_tasks() if task.get_name() == "log watch"]


@asynccontextmanager
async def _connected(settings: LogSettings) -> AsyncIterator[Client]:
    nc = await connect(settings, name="watch", on_closed=pytest.fail)
    try:
        yield nc
    finally:
        await close(nc)


async def test_a_message_can_be_found_by_its_subject(log: Log) -> None:
    """The next one of a partition, wherever it stands; none is no error."""
    api = JetStreamApi(log.nc)
    await log.publish(1, consultations=1)
    found = await eventually(lambda: api.get_message(STREAM, 1, next_of="fi.events.*.c0"))
    assert found is not None
    assert 1 == found["seq"]
    assert await api.get_message(STREAM, 1, next_of="fi.events.*.other") is None
