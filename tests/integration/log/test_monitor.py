"""The one snapshot of the log, and what metrics, readiness and back-pressure make of it, on a real cluster."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import nats.micro
import pytest
from nats.micro.service import Service
from prometheus_client import CollectorRegistry

from services.cli.embedded.processes import Cluster
from services.ingest.service import open_log
from services.ingest.settings import Settings
from services.log.jetstream import monitor as module
from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.monitor import LogMonitor, look_once, monitoring, show_progress
from services.log.jetstream.placement import BucketPlacements
from services.log.jetstream.stream import PERSISTER_SERVICE, STREAM
from services.log.metrics import LogMetrics
from services.log.settings import LogSettings
from services.log.status import LogState, PartitionProgress, Waiting
from tests.support.broker import plain_server
from tests.support.persisters import Log, provisioned
from tests.support.polling import eventually

#: clocks of one machine differ by nothing; the answer's way takes its time on a busy one, seconds
SAME_CLOCK = 1.0


class Watched:
    """A monitor and what it shows."""

    def __init__(self, nc: Connection, settings: LogSettings) -> None:
        self.registry = CollectorRegistry()
        self.metrics = LogMetrics(self.registry)
        self.monitor = LogMonitor(nc, settings, self.metrics)

    @property
    def state(self) -> LogState:
        return self.monitor.state

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
            await self.monitor.look()
            return check()

        await eventually(looked)

    def waiting(self, store: str = "main") -> list[int]:
        """Return how many events wait in each partition."""
        return [one.waiting.events for one in self.state.partitions(store)]


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    async with provisioned(fresh_log, partitions=2) as made:
        yield made


@pytest.fixture
async def seen(log: Log) -> AsyncIterator[Watched]:
    watched = Watched(log.nc, log.settings)
    yield watched
    await watched.monitor.close()


async def _place(log: Log, *partitions: int, store: str = "main", committed: int = 0) -> None:
    settings = LogSettings(servers=log.settings.servers, partitions=2, store=store)
    placements = BucketPlacements(log.nc, settings)
    for partition in partitions:
        placed = await placements.claim(partition, "v1", 1, begins=1)
        if committed != placed.committed:
            await placements.progress(placed, committed)


class Persister:
    """The part of a persister that others see."""

    def __init__(self, metadata: dict[str, str], service: Service) -> None:
        self.metadata = metadata
        self.service = service

    def says(self, progress: Mapping[int, PartitionProgress], sequence: int) -> None:
        """Let it say how far it is."""
        self.metadata["progress"] = show_progress(progress)
        self.metadata["stream_sequence"] = str(sequence)


@asynccontextmanager
async def _running(log: Log, partitions: Iterable[int], *, store: str = "main") -> AsyncIterator[Persister]:
    names = ",".join(f"{partition:02d}" for partition in partitions)
    metadata = {"store": store, "volume": "v1", "partitions": names, "progress": "", "stream_sequence": ""}
    async with _connected(log.settings) as nc:
        service = await nats.micro.add_service(nc, name=PERSISTER_SERVICE, version="0.0.0", metadata=metadata)
        yield Persister(metadata, service)


@asynccontextmanager
async def _connected(settings: LogSettings) -> AsyncIterator[Connection]:
    nc = await connect(settings, name="monitor", on_closed=pytest.fail)
    try:
        yield nc
    finally:
        await close(nc)


# -- streams ----------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(module, "time", ahead)
    await seen.monitor.look()
    assert abs((seen("fi_clock_offset_seconds") or 0) - 100) < SAME_CLOCK


async def test_a_node_that_is_down_is_shown_and_so_is_the_loss_of_the_quorum(
    log: Log, seen: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values without further answers disappear after a while."""
    leader = await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)
    first, second = (index for index in range(3) if index != leader)
    gone = log.cluster.names[first]
    log.cluster.kill(first)
    await seen.until(lambda: seen("fi_stream_replica_up", stream=STREAM, node=gone) == 0)
    assert 1 == seen("fi_log_available")

    # a leader without followers goes on answering for a while; that must not count
    log.cluster.kill(second)
    await seen.until(lambda: seen("fi_log_available") == 0)
    assert [] != await seen.monitor.ready()

    monkeypatch.setattr(module, "KEPT_SECONDS", 0.0)
    log.cluster.kill(leader)
    await seen.until(lambda: seen("fi_log_connected") == 0)
    for name in ("fi_stream_replica_up", "fi_stream_leader", "fi_stream_messages", "fi_partition_owners"):
        assert {} == seen.series(name)
    assert ["no connection to the log"] == await seen.monitor.ready()
    assert None is seen.monitor.backlog()

    for index in range(3):
        log.cluster.start_node(index)
    await asyncio.to_thread(log.cluster.wait_ready)
    await seen.until(lambda: seen("fi_log_available") == 1)


# -- partitions -------------------------------------------------------------------------------------------------------


async def test_before_any_persister_came_every_event_waits(log: Log, seen: Watched) -> None:
    """Of the settings' store, in partitions that are not placed; the broker counts them."""
    await log.publish(3, consultations=1)
    await seen.until(lambda: sorted(seen.waiting()) == [0, 3])
    unowned = {("00", "main", ""): 0, ("01", "main", ""): 0}
    await seen.until(lambda: unowned == seen.series("fi_partition_owners"))  # once silence means something
    assert {} == seen.series("fi_volume_processes")
    backlog = seen.monitor.backlog()
    assert backlog is not None
    assert (3, 3, [True, True]) == (backlog.events, backlog.sequence, [one.stalled for one in backlog.partitions])


async def test_what_waits_in_a_partition_without_an_owner_is_counted_after_its_key(log: Log, seen: Watched) -> None:
    """By the broker, and exactly; the oldest one's age grows. The store that has most of it counts for ingest."""
    await _place(log, 0, 1, committed=2)
    await _place(log, 0, 1, store="second")
    await log.publish(5, consultations=1)
    await seen.until(lambda: (sorted(seen.waiting()), sorted(seen.waiting("second"))) == ([0, 3], [0, 5]))
    ages = seen.series("fi_partition_backlog_age_seconds")
    old = {key for key, age in ages.items() if age > 0}
    assert 2 == len(old)
    await seen.until(lambda: all(seen.series("fi_partition_backlog_age_seconds")[key] > ages[key] for key in old))
    backlog = seen.monitor.backlog()
    assert backlog is not None
    assert 5 == backlog.events


async def test_a_partition_with_an_owner_waits_as_its_owner_says(log: Log, seen: Watched) -> None:
    """It knows first; what the stream has got since is for the reader to add."""
    await _place(log, 0, 1)
    await log.publish(6, consultations=1)
    async with _running(log, [0, 1]) as persister:
        persister.says({0: PartitionProgress(4, 1), 1: PartitionProgress(4, 0)}, 5)
        await seen.until(lambda: seen.waiting() == [1, 0])
        states = seen.state.partitions("main")
        assert [Waiting(1, 5, stalled=False), Waiting(0, 5, stalled=False)] == [one.waiting for one in states]
        assert ([4, 4], [1, 1]) == ([one.committed for one in states], [one.owners for one in states])
        assert {("main", "v1"): 1} == seen.series("fi_volume_processes")
        persister.says({0: PartitionProgress(6, 0), 1: PartitionProgress(6, 0)}, 6)
        await seen.until(lambda: seen.waiting() == [0, 0])
        assert {("00", "main"): 0.0, ("01", "main"): 0.0} == seen.series("fi_partition_backlog_age_seconds")


async def test_a_partition_whose_file_does_not_move_stands_still_and_is_counted(
    log: Log, seen: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped partition's owner lives, and goes on saying what it once knew."""
    await _place(log, 0, 1)
    events = await log.publish(6, consultations=1)
    assert 1 == len(events)
    async with _running(log, [0, 1]) as persister:
        persister.says({0: PartitionProgress(0, 1), 1: PartitionProgress(0, 1)}, 1)
        await seen.until(lambda: seen.waiting() == [1, 1])
        assert [False, False] == [one.waiting.stalled for one in seen.state.partitions("main")]
        monkeypatch.setattr(module, "STALLED_SECONDS", 0.2)
        await seen.until(lambda: sorted(seen.waiting()) == [0, 6])
        assert [True, True] == [one.waiting.stalled for one in seen.state.partitions("main")]


#: a process that says of itself that it is a persister
_OWNER = """
import asyncio, sys, nats, nats.micro
async def main():
    nc = await nats.connect(sys.argv[1])
    said = {"store": "main", "volume": "v1", "partitions": "00,01", "progress": "", "stream_sequence": ""}
    await nats.micro.add_service(nc, name="fi-persister", version="0.0.0", metadata=said)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_owner_that_is_gone_is_seen_within_seconds(log: Log, seen: Watched, ended_by: signal.Signals) -> None:
    """However it ended: killed, or frozen with its connection open."""
    await _place(log, 0, 1)
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", _OWNER, log.cluster.url.split(",")[0])
    try:
        await seen.until(lambda: set(seen.series("fi_partition_owners").values()) == {1.0})
        assert {("00", "main", "v1"), ("01", "main", "v1")} == set(seen.series("fi_partition_owners"))
        owner.send_signal(ended_by)
        gone = time.monotonic()
        await seen.until(lambda: set(seen.series("fi_partition_owners").values()) == {0.0})
        assert time.monotonic() - gone < module.LIVE_SECONDS + 3
        assert 0 == seen("fi_volume_processes", store="main", volume="v1")
    finally:
        with contextlib.suppress(ProcessLookupError):
            owner.kill()
        await owner.wait()


async def test_anybodys_consumer_that_does_not_answer_hides_nothing(log: Log, seen: Watched) -> None:
    """A viewer's ephemeral on a dead node, say: no look asks for consumers."""
    await _place(log, 0, 1)
    for number in range(30):  # wherever they land: one of them on the node that freezes
        config = {"name": f"viewer{number}", "ack_policy": "none", "num_replicas": 1, "mem_storage": True}
        await log.api.create_consumer(STREAM, {**config, "filter_subject": "fi.events.>"})
    assert log.nc.connected_url is not None
    ours = log.cluster.urls.index(log.nc.connected_url.geturl().rstrip("/"))
    log.cluster.pause((ours + 1) % 3)
    await log.publish(3, consultations=1)
    await seen.until(lambda: sorted(seen.waiting()) == [0, 3] and not seen.state.troubles)


async def test_one_lost_answer_is_bridged_and_old_news_is_forgotten(
    log: Log, seen: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An alert must not begin anew because the bucket elects its leader, nor rest on what was true long ago."""
    await _place(log, 0, 1)
    await log.publish(3, consultations=1)
    await seen.until(lambda: sorted(seen.waiting()) == [0, 3])

    async def broken(_: Connection) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(module, "read_stores", broken)
    await seen.monitor.look()
    assert [0, 3] == sorted(seen.waiting())
    assert 1 == seen("fi_log_observation_failures_total", part="partitions")
    assert [] == await seen.monitor.ready()
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.0)
    await seen.monitor.look()
    assert ([], {}, None) == (seen.waiting(), seen.series("fi_partition_owners"), seen.monitor.backlog())


@pytest.mark.parametrize(("denied", "live", "failures"), [('"x"', (), 0), ('"$SRV.>"', None, 1)])
async def test_a_monitor_that_may_not_ask_takes_no_process_for_dead(
    tmp_path: Path, denied: str, live: tuple[()] | None, failures: int
) -> None:
    """No persister is one thing; silence after a refusal means nothing, and is counted."""
    user = f"{{ user: watcher, password: none, permissions: {{ publish: {{ deny: [{denied}] }} }} }}"
    with plain_server(tmp_path, f"authorization {{ users: [ {user} ] }}") as url:
        settings = LogSettings(servers=(url.replace("//", "//watcher:none@"),), replicas=1, partitions=1)
        async with _connected(settings) as nc:
            seen = Watched(nc, settings)
            await seen.monitor.look()
            await asyncio.sleep(module._ANSWER_SECONDS)
            await seen.monitor.look()
            assert live == seen.state.processes
            assert (1, 0) == (seen("fi_log_connected"), seen("fi_log_available"))
            assert failures == seen("fi_log_observation_failures_total", part="processes")


# -- readiness --------------------------------------------------------------------------------------------------------


async def test_a_cluster_without_a_log_is_not_ready(fresh_log: Cluster) -> None:
    """Before the first start of a service."""
    async with _connected(LogSettings(servers=tuple(fresh_log.urls), partitions=2)) as nc:
        seen = Watched(nc, LogSettings(servers=tuple(fresh_log.urls), partitions=2))
        assert ["the log has not been seen yet"] == await seen.monitor.ready()
        await seen.monitor.look()
        assert ["stream fi-events does not exist"] == await seen.monitor.ready()


async def test_the_log_is_ready_when_every_partition_of_a_store_is_placed(log: Log, seen: Watched) -> None:
    """Until then no process would persist what is accepted; a second store may still be starting."""
    await _place(log, 0)
    await seen.monitor.look()
    assert ["1 partition without an owner yet: start the persisters"] == await seen.monitor.ready()
    await _place(log, 1)
    await _place(log, 0, store="second")
    await seen.monitor.look()
    assert [] == await seen.monitor.ready()


async def test_the_log_stays_ready_without_one_node_and_not_without_two(
    log: Log, seen: Watched, fresh_log: Cluster
) -> None:
    """A leader that lost its followers goes on answering for a while; that must not count."""
    await _place(log, 0, 1)
    leader = await asyncio.to_thread(fresh_log.wait_stream_leader, STREAM)
    first, second = (index for index in range(3) if index != leader)

    async def is_ready() -> bool:
        await seen.monitor.look()
        return await seen.monitor.ready() == []

    async def is_not_ready() -> bool:
        return not await is_ready()

    fresh_log.kill(first)
    await eventually(is_ready)
    fresh_log.kill(second)
    await eventually(is_not_ready)


# -- its life ---------------------------------------------------------------------------------------------------------


async def test_it_looks_while_the_work_goes_on_and_ends_with_it(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, and shows a connection that is gone."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    registry = CollectorRegistry()
    async with _connected(log.settings) as nc:
        async with monitoring(nc, log.settings, LogMetrics(registry), pytest.fail):
            await eventually(lambda: registry.get_sample_value("fi_log_available") == 1)
            await close(nc)
            await eventually(lambda: registry.get_sample_value("fi_log_connected") == 0)
            assert 0 == registry.get_sample_value("fi_log_available")
        assert [] == [task for task in asyncio.all_tasks() if task.get_name() == "log monitor"]


async def test_a_store_that_forms_is_seen_at_the_next_look(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who starts a stack waits for it; a whole look would come much later."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(module, "WHOLE_EVERY", 10_000)
    async with (
        _connected(log.settings) as nc,
        monitoring(nc, log.settings, LogMetrics(CollectorRegistry()), pytest.fail) as monitor,
    ):
        await eventually(lambda: monitor.state.placements is not None)
        assert ["2 partitions without an owner yet: start the persisters"] == await monitor.ready()
        await _place(log, 0, 1)

        async def ready() -> bool:
            return await monitor.ready() == []

        await eventually(ready)


async def test_ingest_reads_backlog_and_readiness_from_it(log: Log) -> None:
    """What was posted by others, and what is placed, is known within seconds."""
    async with open_log(Settings(log=log.settings), pytest.fail, LogMetrics(CollectorRegistry())) as opened:
        await log.publish(3, consultations=1)
        await eventually(lambda: (found := opened.status.backlog()) is not None and found.events == 3)
        await _place(log, 0, 1)
        async with AsyncExitStack() as running:
            persister = await running.enter_async_context(_running(log, [0, 1]))
            persister.says({0: PartitionProgress(3, 0), 1: PartitionProgress(3, 0)}, 3)
            await eventually(lambda: (found := opened.status.backlog()) is not None and found.events == 0)

            async def ready() -> bool:
                return await opened.status.ready() == []

            await eventually(ready)


async def test_one_look_by_itself_answers_within_three_seconds_while_a_node_is_frozen(log: Log) -> None:
    """`fiq status` and `fiq doctor`: whichever node it is, but the leader of the stream, which an election replaces."""
    await _place(log, 0, 1)
    await log.publish(3, consultations=1)
    leader = await asyncio.to_thread(log.cluster.wait_stream_leader, STREAM)
    assert log.nc.connected_url is not None
    ours = log.cluster.urls.index(log.nc.connected_url.geturl().rstrip("/"))
    frozen = next(index for index in range(3) if index not in (leader, ours))
    log.cluster.pause(frozen)
    began = time.monotonic()
    state = await look_once(log.nc, log.settings)
    took = time.monotonic() - began
    assert (3, ()) == ((state.stream.last_sequence if state.stream else None), state.processes)
    assert took < 3.0, took
