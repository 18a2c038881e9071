"""Every metric of the persister. `docs/metrics.md` tells what each means; the comments tell what to do about it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from fiq.corpus import StoreStats
from services.log.metrics import LogMetrics
from services.log.partitions import partition_name

if TYPE_CHECKING:
    from services.persister.rounds import Batch

#: the acknowledgement rate is taken over this time, seconds
RATE_WINDOW_SECONDS = 10.0

_PARTITION = ("partition",)
#: what a failure may be: it is tried again, it should not exist and is tried again, it stops the partition
FAILURE_KINDS = ("transient", "unexpected", "permanent")
#: what may come of a question: answered with HDF5, answered from memory, the partition was let go or is between two
#: commits, too many wait, its asker stopped waiting, the connection is congested, it is no question, a fault
QUESTION_OUTCOMES = ("answered", "away", "busy", "stale", "dropped", "malformed", "failed")
_STATES = ("starting", "following", "retrying", "stopped")


class RateWindow:
    """Counts over the last seconds."""

    def __init__(self, seconds: float = RATE_WINDOW_SECONDS) -> None:
        self._seconds = seconds
        self._counts: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, count: int) -> None:
        """Count *count* now."""
        self._counts.append((time.monotonic(), count))
        self._total += count
        self._forget()

    def rate(self) -> float:
        """Return the mean number a second."""
        self._forget()
        return self._total / self._seconds

    def _forget(self) -> None:
        oldest = time.monotonic() - self._seconds
        while self._counts and self._counts[0][0] < oldest:
            self._total -= self._counts.popleft()[1]


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self._partitions: dict[int, PartitionMetrics] = {}
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.log = LogMetrics(registry)
        # joins a process's metrics with its store: … * on (instance) group_left (store, volume) fi_persister_info
        self.info = Gauge(
            "fi_persister_info",
            "1; the labels say what the process writes",
            ("store", "volume", "host"),
            registry=registry,
        )
        # free below a tenth: commits will fail, partitions retry, events wait in the stream; nothing is lost
        self.volume_free = Gauge(
            "fi_volume_free_bytes", "Room left for the data directory", ("volume",), registry=registry
        )
        self.volume_size = Gauge(
            "fi_volume_size_bytes", "Size of the data directory's file system", ("volume",), registry=registry
        )
        # older than a day, with one store: what FI_RETENTION has taken from the stream is on this disk only
        self.backup = Gauge(
            "fi_backup_timestamp_seconds",
            "When the newest backup of the volume was made, Unix time; 0 for never",
            ("volume",),
            registry=registry,
        )
        # grows for minutes: persisters are too slow, or a partition stands still (see fi_persister_partition_state)
        self.queue_length = Gauge(
            "fi_queue_length", "Events of the partition that are not committed yet", _PARTITION, registry=registry
        )
        # stays high while the length is low: acknowledgements do not arrive
        self.queue_pending = Gauge(
            "fi_queue_pending", "Events delivered to the persister and not acknowledged", _PARTITION, registry=registry
        )
        # zero while fi_queue_length is not: the partition stands still
        self.queue_ack_rate = Gauge(
            "fi_queue_ack_rate", "Events acknowledged a second, over 10 seconds", _PARTITION, registry=registry
        )
        self.events = Counter("fi_persister_events", "Events written and committed", _PARTITION, registry=registry)
        # a steady share is clients' retries; a jump is a client that repeats itself
        self.duplicates = Counter(
            "fi_persister_duplicates", "Events dropped as the corpus held them", _PARTITION, registry=registry
        )
        # any: look at `nats stream view fi-dead`
        self.dead_letters = Counter(
            "fi_persister_dead_letters", "Messages moved to stream fi-dead", _PARTITION, registry=registry
        )
        # any: a client used a key for two events; fi-dead says where the corpus keeps the second one
        self.reused_keys = Counter(
            "fi_persister_reused_keys",
            "Events kept under /conflicts as the corpus held their id with another body",
            _PARTITION,
            registry=registry,
        )
        # away, busy, stale, dropped: readers of HTTP get 503; failed: the log has a line QUESTION_FAILED
        self.questions = Counter(
            "fi_persister_questions",
            "Questions about the corpus, by what came of them",
            ("kind", "outcome"),
            registry=registry,
        )
        # large: readers take time from the writer
        self.question_seconds = Histogram(
            "fi_persister_question_seconds",
            "Time of the HDF5 thread that an answered question took",
            buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1),
            registry=registry,
        )
        self.bytes = Counter("fi_persister_bytes", "Bytes of bodies taken", _PARTITION, registry=registry)
        self.batch_events = Histogram(
            "fi_persister_batch_events",
            "Messages in a round",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 8192),
            registry=registry,
        )
        # grows: the disk is slow, or rounds touch many consultations
        self.batch_seconds = Histogram(
            "fi_persister_batch_seconds",
            "Time from the begin of a round to its acknowledgements",
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            registry=registry,
        )
        # the time for which an accepted event was not in HDF5 yet
        self.event_age_seconds = Histogram(
            "fi_persister_event_age_seconds",
            "Age of the oldest event of a round at its commit, since ingest took it",
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600, 86400),
            registry=registry,
        )
        # transient: the reason stands in /readyz and the log; permanent: the partition waits for an operator
        self.failures = Counter("fi_persister_failures", "Failures by kind", ("partition", "kind"), registry=registry)
        # one of the states is 1; retrying or stopped for more than a minute needs an operator
        self.partition_state = Gauge(
            "fi_persister_partition_state", "1 for the partition's state", ("partition", "state"), registry=registry
        )
        self.committed_sequence = Gauge(
            "fi_persister_committed_sequence",
            "Stream sequence that the file has reached",
            _PARTITION,
            registry=registry,
        )
        # some at each failover; a steady stream of them: the network loses messages
        self.repairs = Counter(
            "fi_persister_follower_repairs", "Resets of the consumer by reason", ("reason",), registry=registry
        )
        self.journal_bytes = Gauge(
            "fi_persister_journal_bytes", "Bytes in the partition's journal", _PARTITION, registry=registry
        )
        self.checkpoints = Gauge(
            "fi_persister_checkpoints", "Checkpoints since the file was opened", _PARTITION, registry=registry
        )
        # grows: a reader has kept the partition file open for long
        self.checkpoints_deferred = Gauge(
            "fi_persister_checkpoints_deferred",
            "Checkpoints put off since the file was opened",
            _PARTITION,
            registry=registry,
        )
        # above a minute: a program has kept the partition file open, or the disk is full; the log says which
        self.checkpoint_waiting_seconds = Gauge(
            "fi_persister_checkpoint_waiting_seconds",
            "Time for which checkpoints of the partition have been put off",
            _PARTITION,
            registry=registry,
        )
        # any: the journal outgrew its limit while a reader held the partition file
        self.journal_compactions = Gauge(
            "fi_persister_journal_compactions",
            "Compactions of the partition's journal since the file was opened",
            _PARTITION,
            registry=registry,
        )
        # above 0.7 and growing: some store does not commit; trim deletes only what every store has
        self.stream_fullness = Gauge(
            "fi_stream_fullness_ratio",
            "Share of the stream's max_bytes in use, as seen by the process that trims",
            registry=registry,
        )
        self.trimmed = Counter(
            "fi_stream_trimmed_events", "Committed events deleted from the stream", registry=registry
        )

    def of(self, partition: int) -> PartitionMetrics:
        """Return the view of one partition, always the same one: its rate looks back."""
        if partition not in self._partitions:
            self._partitions[partition] = PartitionMetrics(self, partition)
        return self._partitions[partition]


class PartitionMetrics:
    """The metrics of one partition, label applied."""

    def __init__(self, metrics: Metrics, partition: int) -> None:
        self._metrics = metrics
        self._name = partition_name(partition)
        self._acks = RateWindow()
        for counter in (
            metrics.events,
            metrics.duplicates,
            metrics.dead_letters,
            metrics.reused_keys,
            metrics.bytes,
        ):
            counter.labels(self._name)  # shown as 0 from the start: a counter that appears as 1 has no increase
        for kind in FAILURE_KINDS:
            metrics.failures.labels(self._name, kind)

    def committed(self, sequence: int) -> None:
        """Note the sequence that the file has reached."""
        self._metrics.committed_sequence.labels(self._name).set(sequence)

    def batch(self, batch: Batch) -> None:
        """Note a *batch* that is committed and acknowledged."""
        metrics, name = self._metrics, self._name
        self.committed(batch.deliveries[-1].sequence)
        metrics.events.labels(name).inc(batch.persisted)
        metrics.duplicates.labels(name).inc(batch.duplicates)
        metrics.reused_keys.labels(name).inc(len(batch.conflicts))
        metrics.bytes.labels(name).inc(batch.size)
        self._acks.add(len(batch.deliveries))

    def queue(self, length: Callable[[], float], pending: Callable[[], float]) -> None:
        """Show what waits for the partition, and what of it was delivered, as it is at each scrape."""
        self._metrics.queue_length.labels(self._name).set_function(length)
        self._metrics.queue_pending.labels(self._name).set_function(pending)

    def store(self, stats: StoreStats) -> None:
        """Note what the partition file says of itself."""
        self._metrics.journal_bytes.labels(self._name).set(stats.journal_bytes)
        self._metrics.checkpoints.labels(self._name).set(stats.checkpoints)
        self._metrics.checkpoints_deferred.labels(self._name).set(stats.checkpoints_deferred)
        self._metrics.checkpoint_waiting_seconds.labels(self._name).set(stats.checkpoint_waiting_seconds)
        self._metrics.journal_compactions.labels(self._name).set(stats.compactions)

    def dead_letter(self) -> None:
        """Note a message that was set aside."""
        self._metrics.dead_letters.labels(self._name).inc()

    def failed(self, kind: str) -> None:
        """Note a failure: transient, unexpected or permanent."""
        self._metrics.failures.labels(self._name, kind).inc()

    def state(self, current: str) -> None:
        """Note the partition's state."""
        self._metrics.queue_ack_rate.labels(self._name).set_function(self._acks.rate)
        for state in _STATES:
            self._metrics.partition_state.labels(self._name, state).set(state == current)

    def remove(self) -> None:
        """Forget the gauges of a partition that another process runs now."""
        metrics, name = self._metrics, self._name
        for gauge in (
            metrics.queue_length,
            metrics.queue_pending,
            metrics.queue_ack_rate,
            metrics.committed_sequence,
            metrics.journal_bytes,
            metrics.checkpoints,
            metrics.checkpoints_deferred,
            metrics.checkpoint_waiting_seconds,
            metrics.journal_compactions,
        ):
            gauge.remove_by_labels({"partition": name})
        metrics.partition_state.remove_by_labels({"partition": name})
