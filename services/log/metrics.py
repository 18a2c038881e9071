"""Every metric of the log, as one process sees it; both services have them.

They come from the log's own answers, so no exporter is needed, and any process that runs shows what is wrong with the
rest. `docs/metrics.md` explains each.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.log.partitions import partition_name
from services.log.status import CertificateExpiry, LogState, NodeReport, StreamReport

#: the parts of a look at the log
PARTS = STREAMS, DEAD_LETTERS, PARTITIONS, PROCESSES = ("streams", "dead_letters", "partitions", "processes")

_STREAM = ("stream",)
_NODE = ("stream", "node")


class LogMetrics:
    """Gauges that :class:`~services.log.protocol.Status` keeps up to date.

    Args:
        registry: the process's own.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        # 0 in one process: its network, or its credentials; in all: no node runs
        self.connected = Gauge("fi_log_connected", "1 while the process has a connection to a node", registry=registry)
        # 0: events cannot be stored; clients get 503
        self.available = Gauge(
            "fi_log_available", "1 when stream fi-events has a leader and a quorum", registry=registry
        )
        # grows: the node is overloaded, or the network between here and there
        self.round_trip = Gauge(
            "fi_log_round_trip_seconds", "How long the stream's leader took to answer", registry=registry
        )
        # above a second on one host: its clock; on all hosts alike: the clock of the leader's host
        self.clock_offset = Gauge(
            "fi_clock_offset_seconds", "Own clock minus the clock of the stream's leader", registry=registry
        )
        # grows: missing permissions, or a broker that does not answer; the log has OBSERVATION_FAILED with the reason
        self.failures = Counter(
            "fi_log_observation_failures", "Looks at the log that failed, by part", ("part",), registry=registry
        )
        # run `fiq init FOLDER --rotate certificates` in time
        self.certificate_expiry = Gauge(
            "fi_certificate_expiry_timestamp_seconds",
            "End of the connection's certificates, Unix time",
            ("certificate", "name"),
            registry=registry,
        )
        # fi-dead: an operator must look at each message
        self.messages = Gauge("fi_stream_messages", "Messages that the stream holds", _STREAM, registry=registry)
        self.bytes = Gauge("fi_stream_bytes", "Bytes that the stream holds", _STREAM, registry=registry)
        self.max_bytes = Gauge("fi_stream_max_bytes", "The stream's limit in bytes", _STREAM, registry=registry)
        self.last_sequence = Gauge(
            "fi_stream_last_sequence", "Sequence of the stream's youngest message", _STREAM, registry=registry
        )
        self.leader = Gauge("fi_stream_leader", "1 for the node that leads the stream", _NODE, registry=registry)
        # 0: the node is down, or cut off; one more and the stream takes nothing
        self.replica_up = Gauge(
            "fi_stream_replica_up", "1 when the leader heard of the node recently", _NODE, registry=registry
        )
        # 0 for minutes: the node's disk or network is slower than the stream grows
        self.replica_current = Gauge(
            "fi_stream_replica_current", "1 when the node has everything that is stored", _NODE, registry=registry
        )
        self.replica_lag = Gauge(
            "fi_stream_replica_lag", "Entries of the raft log that the node still misses", _NODE, registry=registry
        )
        self.backlog_events = Gauge(
            "fi_partition_backlog_events",
            "Events of the partition that are not committed",
            ("store", "partition"),
            registry=registry,
        )
        # above a minute: check which process owns the partition, and its state
        self.backlog_age = Gauge(
            "fi_partition_backlog_age_seconds",
            "Age of the partition's oldest event that is not committed",
            ("store", "partition"),
            registry=registry,
        )
        # 0: no process writes the partition; its events wait in the log
        self.owners = Gauge(
            "fi_partition_owners",
            "Live processes that run the partition, with its volume",
            ("store", "partition", "volume"),
            registry=registry,
        )
        # 0: the host of that volume is down
        self.volume_processes = Gauge(
            "fi_volume_processes",
            "Live processes of a volume that has partitions",
            ("store", "volume"),
            registry=registry,
        )
        # near the limit: the node collects garbage all the time, then the kernel ends it; see FI_MAX_WINDOW_EVENTS
        self.node_memory = Gauge("fi_node_memory_bytes", "Resident memory of the node", ("node",), registry=registry)
        self.node_memory_limit = Gauge(
            "fi_node_memory_limit_bytes", "GOMEMLIMIT of the node; none without one", ("node",), registry=registry
        )
        # near the limit: the node refuses messages; a full disk is worse, see fi_node_jetstream
        self.node_storage = Gauge("fi_node_storage_bytes", "What the node's streams take", ("node",), registry=registry)
        self.node_storage_limit = Gauge(
            "fi_node_storage_limit_bytes", "What they may take (max_file_store)", ("node",), registry=registry
        )
        # 0: the node's disk was full, or could not be written; it stays off until the node is restarted
        self.node_jetstream = Gauge(
            "fi_node_jetstream", "1 while the node stores messages at all", ("node",), registry=registry
        )
        for part in PARTS:
            self.failures.labels(part)  # shown as 0 from the start: a counter that appears as 1 has no increase

    def stream(self, name: str, report: StreamReport) -> None:
        """Show one stream; call :meth:`forget` first, or a node that no longer holds it stays."""
        self.messages.labels(name).set(report.messages)
        self.bytes.labels(name).set(report.bytes)
        self.max_bytes.labels(name).set(report.max_bytes)
        self.last_sequence.labels(name).set(report.last_sequence)
        if report.leader:
            self.leader.labels(name, report.leader).set(1)
            self._replica(name, report.leader, up=True, current=True, lag=0)
        for replica in report.replicas:
            self._replica(name, replica.name, up=replica.alive, current=replica.current, lag=replica.lag)

    def _replica(self, stream: str, node: str, *, up: bool, current: bool, lag: int) -> None:
        self.replica_up.labels(stream, node).set(up)
        self.replica_current.labels(stream, node).set(current)
        self.replica_lag.labels(stream, node).set(lag)

    def stores(self, state: LogState) -> None:
        """Show the partitions and the processes of every store, in place of those shown before."""
        self.forget(PARTITIONS)
        self.forget(PROCESSES)
        now = time.time() - state.clock_offset
        for store, partitions in (state.stores or {}).items():
            for one in partitions:
                name = partition_name(one.partition)
                self.backlog_events.labels(store, name).set(one.waiting.events)
                self.backlog_age.labels(store, name).set(0.0 if one.oldest is None else max(0.0, now - one.oldest))
                if state.processes is not None:
                    volume = "" if one.placement is None else one.placement.volume
                    self.owners.labels(store, name, volume).set(one.owners)
            if state.processes is not None:
                for volume in {one.placement.volume for one in partitions if one.placement is not None}:
                    alive = sum(process.volume == volume for process in state.processes)
                    self.volume_processes.labels(store, volume).set(alive)

    def nodes(self, reports: Iterable[NodeReport]) -> None:
        """Show the nodes, in place of those shown before."""
        for gauge in (self.node_memory, self.node_memory_limit, self.node_storage, self.node_storage_limit):
            gauge.clear()
        self.node_jetstream.clear()
        for one in reports:
            self.node_memory.labels(one.name).set(one.memory)
            if one.memory_limit:
                self.node_memory_limit.labels(one.name).set(one.memory_limit)
            self.node_jetstream.labels(one.name).set(one.jetstream)
            if one.jetstream:
                self.node_storage.labels(one.name).set(one.storage)
                self.node_storage_limit.labels(one.name).set(one.storage_limit)

    def certificates(self, found: Iterable[CertificateExpiry]) -> None:
        """Show the certificates of the connection, in place of those shown before."""
        self.certificate_expiry.clear()
        for one in found:
            self.certificate_expiry.labels(one.kind, one.name).set(one.expires)

    def forget(self, part: str) -> None:
        """Show nothing of *part*, one of :data:`PARTS`: it is about to be renewed, or no longer known."""
        for gauge in self._gauges(part):
            gauge.clear()

    def _gauges(self, part: str) -> tuple[Gauge, ...]:
        if part == STREAMS:
            stream = (self.messages, self.bytes, self.max_bytes, self.last_sequence)
            return (*stream, self.leader, self.replica_up, self.replica_current, self.replica_lag)
        if part == PARTITIONS:
            return self.backlog_events, self.backlog_age
        return (self.owners, self.volume_processes) if part == PROCESSES else ()
