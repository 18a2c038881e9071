"""Every metric of the persister, and how its log and spans show the traces of a batch.

``docs/metrics.md`` explains each metric; the comments here say what to do about a bad value.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

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
from fiq.event import trace_of_message
from services.core.logs import EVENT_TRACED
from services.core.tracing import Spans
from services.log.metrics import LogMetrics
from services.log.partitions import partition_name
from services.log.protocol import EVENT_LOG

if TYPE_CHECKING:
    from services.persister.rounds import PartitionBatch

#: the acknowledgement rate is averaged over this time, seconds
RATE_WINDOW_SECONDS = 10.0
#: most trace lines for one batch; a batch may be thousands of events, each with its own trace
MAX_TRACE_LINES = 64
#: kinds of failures: retried; unexpected and retried; the partition stops
FAILURE_KINDS = ("transient", "unexpected", "permanent")
#: outcomes of a question: answered; the partition was released or is between two commits; the queue is full; it
#: waited longer than its sender does; the connection is congested; it cannot be parsed; a fault of the persister
QUESTION_OUTCOMES = ("answered", "away", "busy", "stale", "dropped", "malformed", "failed")

_PARTITION = ("partition",)
_STATES = ("starting", "following", "retrying", "stopped")


class RateWindow:
    """Counts events over the last *seconds*."""

    def __init__(self, seconds: float = RATE_WINDOW_SECONDS) -> None:
        self._seconds = seconds
        self._counts: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, count: int) -> None:
        """Count *count* events now."""
        self._counts.append((time.monotonic(), count))
        self._total += count
        self._forget()

    def rate(self) -> float:
        """Return the mean number of events a second."""
        self._forget()
        return self._total / self._seconds

    def _forget(self) -> None:
        oldest = time.monotonic() - self._seconds
        while self._counts and self._counts[0][0] < oldest:
            self._total -= self._counts.popleft()[1]


class PersisterMetrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self._partitions: dict[int, PartitionMetrics] = {}
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.log = LogMetrics(registry)
        gauge = partial(Gauge, registry=registry)
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, registry=registry)

        # joins a process's metrics with its store: … * on (instance) group_left (store, volume) fi_persister_info
        self.info = gauge("fi_persister_info", "1; the labels say what the process writes", ("store", "volume", "host"))
        # free below a tenth: commits will fail, partitions retry, events wait in the stream; nothing is lost
        self.volume_free = gauge("fi_volume_free_bytes", "Free space for the data directory", ("volume",))
        # 1: events wait in the stream until there is room, then persisters go on by themselves
        self.volume_held = gauge("fi_volume_held", "1 while the disk has less free than FI_DISK_RESERVE", ("volume",))
        self.volume_size = gauge("fi_volume_size_bytes", "Size of the data directory's file system", ("volume",))
        # older than a day, with one store: what FI_RETENTION has removed from the stream is on this disk only
        self.backup = gauge(
            "fi_backup_timestamp_seconds",
            "When the newest backup of the volume was made, Unix time; 0 for never",
            ("volume",),
        )
        # older than a week: run `fiq verify` on the volume's host, also to find a disk that loses data
        self.verified = gauge(
            "fi_verify_timestamp_seconds",
            "When fiq verify last ended on the volume, Unix time; 0 for never",
            ("volume",),
        )
        # any: events were changed, removed or moved outside of fiq, or the disk is faulty
        self.verify_problems = gauge("fi_verify_problems", "Problems that the last fiq verify found", ("volume",))
        # grows for minutes: persisters are too slow, or a partition is stopped (see fi_persister_partition_state)
        self.queue_length = gauge("fi_queue_length", "Events of the partition that are not committed yet", _PARTITION)
        # stays high while the length is low: acknowledgements do not arrive
        self.queue_pending = gauge(
            "fi_queue_pending", "Events delivered to the persister and not acknowledged", _PARTITION
        )
        # zero while fi_queue_length is not: the partition is stopped
        self.queue_ack_rate = gauge("fi_queue_ack_rate", "Events acknowledged a second, over 10 seconds", _PARTITION)

        self.events = counter("fi_persister_events", "Events written and committed", _PARTITION)
        # a steady share is clients' retries; a jump is a client that repeats itself
        self.duplicates = counter("fi_persister_duplicates", "Events dropped because the corpus holds them", _PARTITION)
        # any: look at `fiq dead list`
        self.dead_letters = counter("fi_persister_dead_letters", "Messages moved to stream fi-dead", _PARTITION)
        # any: a client used a key for two events; fi-dead says where the corpus keeps the second one
        self.reused_keys = counter(
            "fi_persister_reused_keys",
            "Events kept under /conflicts because the corpus holds their id with another body",
            _PARTITION,
        )
        self.bytes = counter("fi_persister_bytes", "Bytes of bodies taken", _PARTITION)
        # transient: the reason is in /readyz and the log; permanent: the partition waits for an operator
        self.failures = counter("fi_persister_failures", "Failures by kind", ("partition", "kind"))
        # some at each failover; a steady stream of them: the network loses messages
        self.repairs = counter("fi_persister_follower_repairs", "Resets of the consumer by reason", ("reason",))

        # one of the states is 1; retrying or stopped for more than a minute needs an operator
        self.partition_state = gauge(
            "fi_persister_partition_state", "1 for the partition's state", ("partition", "state")
        )
        self.committed_sequence = gauge(
            "fi_persister_committed_sequence", "Stream sequence that the file has reached", _PARTITION
        )
        self.journal_bytes = gauge("fi_persister_journal_bytes", "Bytes in the partition's journal", _PARTITION)
        self.checkpoints = gauge("fi_persister_checkpoints", "Checkpoints since the file was opened", _PARTITION)
        # grows: a reader has kept the partition file open for a long time
        self.checkpoints_deferred = gauge(
            "fi_persister_checkpoints_deferred", "Checkpoints put off since the file was opened", _PARTITION
        )
        # above a minute: a program keeps the partition file open, or the disk is full; the log says which
        self.checkpoint_waiting_seconds = gauge(
            "fi_persister_checkpoint_waiting_seconds",
            "Time for which checkpoints of the partition have been put off",
            _PARTITION,
        )
        # any: the journal outgrew its limit while a reader held the partition file
        self.journal_compactions = gauge(
            "fi_persister_journal_compactions",
            "Compactions of the partition's journal since the file was opened",
            _PARTITION,
        )

        self.batch_events = histogram(
            "fi_persister_batch_events",
            "Messages in a round",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 8192),
        )
        # grows: the disk is slow, or rounds touch many consultations
        self.batch_seconds = histogram(
            "fi_persister_batch_seconds",
            "Time from the start of a round to its acknowledgements",
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
        )
        # how long an accepted event was not in HDF5 yet
        self.event_age_seconds = histogram(
            "fi_persister_event_age_seconds",
            "Age of the oldest event of a round at its commit, since ingest received it",
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600, 86400),
        )

        # away, busy, stale, dropped: HTTP readers get 503; failed: the log has a line QUESTION_FAILED
        self.questions = counter(
            "fi_persister_questions", "Questions about the corpus, by outcome", ("kind", "outcome")
        )
        # large: readers take time from the writer
        self.question_seconds = histogram(
            "fi_persister_question_seconds",
            "Time of the HDF5 thread that an answered question took",
            buckets=(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1),
        )
        # above 0.7 and growing: a store does not commit; trim deletes only what every store has
        self.stream_fullness = gauge(
            "fi_stream_fullness_ratio", "Share of the stream's max_bytes in use, as seen by the process that trims"
        )
        self.trimmed = counter("fi_stream_trimmed_events", "Committed events deleted from the stream")

    def of(self, partition: int) -> PartitionMetrics:
        """Return the metrics of one partition; the same object each time, because its rate looks back."""
        if partition not in self._partitions:
            self._partitions[partition] = PartitionMetrics(self, partition)
        return self._partitions[partition]


class PartitionMetrics:
    """The metrics of one partition, with its label applied."""

    def __init__(self, metrics: PersisterMetrics, partition: int) -> None:
        self._metrics = metrics
        self._name = partition_name(partition)
        self._acks = RateWindow()
        # shown as 0 from the start: a counter that appears as 1 has no increase
        for counter in (metrics.events, metrics.duplicates, metrics.dead_letters, metrics.reused_keys, metrics.bytes):
            counter.labels(self._name)
        for kind in FAILURE_KINDS:
            metrics.failures.labels(self._name, kind)

    def committed(self, sequence: int) -> None:
        """Record the sequence that the file has reached."""
        self._metrics.committed_sequence.labels(self._name).set(sequence)

    def batch(self, batch: PartitionBatch) -> None:
        """Record a *batch* that is committed and acknowledged."""
        metrics, name = self._metrics, self._name
        self.committed(batch.deliveries[-1].sequence)
        metrics.events.labels(name).inc(batch.persisted)
        metrics.duplicates.labels(name).inc(batch.duplicates)
        metrics.reused_keys.labels(name).inc(len(batch.conflicts))
        metrics.bytes.labels(name).inc(batch.size)
        self._acks.add(len(batch.deliveries))

    def queue(self, length: Callable[[], float], pending: Callable[[], float]) -> None:
        """Show at each scrape how much waits for the partition, and how much of that was delivered."""
        self._metrics.queue_length.labels(self._name).set_function(length)
        self._metrics.queue_pending.labels(self._name).set_function(pending)

    def store(self, stats: StoreStats) -> None:
        """Record the *stats* of the partition file."""
        metrics, name = self._metrics, self._name
        metrics.journal_bytes.labels(name).set(stats.journal_bytes)
        metrics.checkpoints.labels(name).set(stats.checkpoints)
        metrics.checkpoints_deferred.labels(name).set(stats.checkpoints_deferred)
        metrics.checkpoint_waiting_seconds.labels(name).set(stats.checkpoint_waiting_seconds)
        metrics.journal_compactions.labels(name).set(stats.compactions)

    def dead_letter(self) -> None:
        """Count a message that was set aside."""
        self._metrics.dead_letters.labels(self._name).inc()

    def failed(self, kind: str) -> None:
        """Count a failure: transient, unexpected or permanent."""
        self._metrics.failures.labels(self._name, kind).inc()

    def state(self, current: str) -> None:
        """Record the partition's state."""
        self._metrics.queue_ack_rate.labels(self._name).set_function(self._acks.rate)
        for state in _STATES:
            self._metrics.partition_state.labels(self._name, state).set(state == current)

    def remove(self) -> None:
        """Remove the gauges of a partition that this process does not run any more."""
        metrics = self._metrics
        for gauge in (
            *(metrics.queue_length, metrics.queue_pending, metrics.queue_ack_rate),
            *(metrics.committed_sequence, metrics.partition_state),
            *(metrics.journal_bytes, metrics.checkpoints, metrics.checkpoints_deferred),
            *(metrics.checkpoint_waiting_seconds, metrics.journal_compactions),
        ):
            gauge.remove_by_labels({"partition": self._name})


# -- traces -----------------------------------------------------------------------------------------------------------


def show_traces(batch: PartitionBatch, seconds: float, spans: Spans | None) -> None:
    """Log one line for each sampled trace of a committed *batch*, up to a limit, and make the batch's span.

    Args:
        batch: is committed.
        seconds: that its round took.
        spans: makes the span; None when tracing is off.
    """
    sampled = [
        (sequence, event, event.trace)
        for sequence, event in batch.events
        if event.trace is not None and event.trace.sampled
    ]
    conflicts = {conflict.sequence for conflict in batch.conflicts}
    lines: dict[str, dict[str, Any]] = {}
    for sequence, event, trace in sampled:
        if sequence not in conflicts:
            first = {
                "trace_id": trace.trace_id,
                "consultation_id": event.consultation,
                "message_id": str(event.event_id),
                "sequence": sequence,
                "events": 0,
            }
            lines.setdefault(trace.trace_id, first)["events"] += 1
    for line in list(lines.values())[:MAX_TRACE_LINES]:
        batch.of.log.info(EVENT_TRACED, **line)
    if len(lines) > MAX_TRACE_LINES:
        batch.of.log.info("TRACES_LEFT_OUT", traces=len(lines) - MAX_TRACE_LINES)
    if spans is not None:
        traces = [trace for _, _, trace in sampled]
        spans.persisted(EVENT_LOG, batch.of.name, traces, events=len(batch.events), seconds=seconds)


def trace_id_in(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the ``trace_id`` of a log line about the message with these *headers*; empty when it has none."""
    trace = trace_of_message(headers or {})
    return {} if trace is None else {"trace_id": trace.trace_id}
