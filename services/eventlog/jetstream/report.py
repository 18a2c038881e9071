"""What an operator wants to know of the log: the stream, its replicas, each partition's consumer and place.

Two requests show everything; nothing is asked of the nodes one by one, and no system account is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nats.aio.client import Client

from services.contract.errors import FiqError
from services.eventlog.jetstream import names
from services.eventlog.jetstream.api import JetStreamApi
from services.eventlog.settings import LogSettings

#: a replica that the leader heard of within this time counts as up, though it may lag, seconds
ALIVE_SECONDS = 5.0
#: a readiness probe must not hang, seconds
PROBE_TIMEOUT_SECONDS = 2.0
#: the broker itself waits this long for the consumers' leaders before it lists what it has, and some more, seconds
LIST_TIMEOUT_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A copy of the stream that does not lead.

    Attributes:
        name: of the node.
        current: has everything that the leader has stored.
        offline: the cluster takes the node for down.
        lag: entries of the raft log that it still misses; no count of events.
        seen_seconds: since the leader heard of it; None when it never did in this term.
    """

    name: str
    current: bool
    offline: bool
    lag: int
    seen_seconds: float | None

    @property
    def alive(self) -> bool:
        """Whether it counts for the quorum just now, as far as the leader knows."""
        heard = self.seen_seconds is not None and self.seen_seconds < ALIVE_SECONDS
        return heard and not self.offline


@dataclass(frozen=True, slots=True)
class StreamReport:
    """The stream of events.

    Attributes:
        created: RFC 3339 in UTC; another value means another stream.
        partitions: from its metadata; 0 when it is no stream of fiq.
        leader: name of the leading node; empty during an election.
        replicas: the other nodes that hold it; empty on a single server.
        messages: events that it holds.
        bytes: what they take, headers and index included.
        max_bytes: its limit.
        first_sequence: of the oldest event; one above the last when it is empty.
        last_sequence: of the youngest event.
        consumers: how many it has, of all stores and of passing viewers.
    """

    created: str
    partitions: int
    leader: str
    replicas: tuple[ReplicaReport, ...]
    messages: int
    bytes: int
    max_bytes: int
    first_sequence: int
    last_sequence: int
    consumers: int

    @property
    def copies(self) -> int:
        """Nodes that hold the stream, up or not."""
        return len(self.replicas) + 1

    @property
    def has_quorum(self) -> bool:
        """Whether a majority of its nodes is up, the leader included."""
        return 2 * (1 + sum(replica.alive for replica in self.replicas)) > self.copies


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """One partition of the settings' store.

    Attributes:
        partition: its number.
        consumer: the consumer's name.
        exists: the consumer exists, so the partition is placed.
        answered: its numbers are known; False during an election of the consumer.
        pending: events that were not delivered yet.
        ack_pending: events delivered and not acknowledged yet.
        acknowledged: stream sequence up to which everything is acknowledged.
        delivered: stream sequence of the last delivery.
        volume: UUID of the volume that holds the partition; empty when unplaced.
        epoch: of the placement; 0 when unplaced.
        leader: name of the node that leads the consumer.
    """

    partition: int
    consumer: str
    exists: bool
    answered: bool
    pending: int = 0
    ack_pending: int = 0
    acknowledged: int = 0
    delivered: int = 0
    volume: str = ""
    epoch: int = 0
    leader: str = ""


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """Stream and partitions as the broker knows them; *stream* is None when there is none."""

    server: str
    stream: StreamReport | None
    partitions: tuple[PartitionReport, ...]


async def cluster_report(nc: Client, settings: LogSettings) -> ClusterReport:
    """Ask the broker for everything that an operator wants to see of the settings' store.

    Raises:
        LogUnavailableError: no answer.
        LogRefusedError: the broker refuses to tell.
    """
    api = JetStreamApi(nc)
    info = await api.stream_info(names.STREAM)
    server = nc.connected_url.netloc if nc.connected_url is not None else ""
    if info is None:
        return ClusterReport(server, None, _partitions(settings.store, settings.partitions, {}, frozenset()))
    stream = read_stream(info)
    found, missing = await api.survey_consumers(names.STREAM)
    by_name = {consumer["name"]: consumer for consumer in found}
    count = stream.partitions or settings.partitions
    return ClusterReport(server, stream, _partitions(settings.store, count, by_name, frozenset(missing)))


async def store_reports(
    api: JetStreamApi, partitions: int, default_store: str
) -> dict[str, tuple[PartitionReport, ...]]:
    """Return the partitions of every store that has a consumer; of *default_store* alone while there is none.

    Raises:
        LogUnavailableError: no answer.
        LogRefusedError: the broker refuses to tell.
    """
    found, missing = await api.survey_consumers(names.STREAM)
    by_name = {consumer["name"]: consumer for consumer in found}
    parsed = (names.parse_consumer_name(name) for name in [*by_name, *missing])
    stores = sorted({store for store, _ in filter(None, parsed)}) or [default_store]
    return {store: _partitions(store, partitions, by_name, frozenset(missing)) for store in stores}


def completed(
    found: Mapping[str, tuple[PartitionReport, ...]], before: Mapping[str, tuple[PartitionReport, ...]]
) -> dict[str, tuple[PartitionReport, ...]]:
    """Return *found*, with the numbers of *before* for each consumer that exists and does not answer just now."""
    known = {report.consumer: report for reports in before.values() for report in reports}
    return {
        store: tuple(
            known.get(report.consumer, report) if report.exists and not report.answered else report
            for report in reports
        )
        for store, reports in found.items()
    }


async def stream_ready(nc: Client, settings: LogSettings) -> list[str]:
    """Return why events cannot be stored and persisted just now; nothing when they can. One request at most."""
    if not nc.is_connected:
        return ["no connection to the log"]
    try:
        info = await JetStreamApi(nc, timeout=PROBE_TIMEOUT_SECONDS).stream_info(names.STREAM)
    except FiqError as error:
        return [f"the log does not answer: {error}"]
    if info is None:
        return [f"stream {names.STREAM} does not exist"]
    stream = read_stream(info)
    reasons = []
    if not stream.leader:
        reasons.append(f"stream {names.STREAM} has no leader")
    elif not stream.has_quorum:
        reasons.append(f"stream {names.STREAM} has no quorum: most of its {stream.copies} nodes are down")
    if stream.consumers < settings.partitions:
        reasons.append(
            f"{settings.partitions - stream.consumers} partitions have no consumer yet: start the persisters"
        )
    return reasons


def read_stream(info: Mapping[str, Any]) -> StreamReport:
    """Build the report from an answer to STREAM.INFO."""
    config, state, cluster = info["config"], info["state"], info.get("cluster")
    partitions = (config.get("metadata") or {}).get(names.PARTITIONS_KEY, "")
    return StreamReport(
        created=info["created"],
        partitions=int(partitions) if partitions.isdigit() else 0,
        # a server without a cluster has nobody else to lead
        leader=cluster.get("leader", "") if cluster is not None else "(single server)",
        replicas=tuple(_replica(peer) for peer in (cluster or {}).get("replicas") or ()),
        messages=state["messages"],
        bytes=state["bytes"],
        max_bytes=config["max_bytes"],
        first_sequence=state["first_seq"],
        last_sequence=state["last_seq"],
        consumers=state["consumer_count"],
    )


def _replica(peer: Mapping[str, Any]) -> ReplicaReport:
    active = peer.get("active", 0)
    return ReplicaReport(
        name=peer["name"],
        current=bool(peer.get("current", False)),
        offline=bool(peer.get("offline", False)),
        lag=peer.get("lag", 0),
        seen_seconds=active / 1e9 if active else None,
    )


def _partitions(
    store: str, count: int, found: Mapping[str, Mapping[str, Any]], missing: frozenset[str]
) -> tuple[PartitionReport, ...]:
    consumers = [names.consumer_name(store, partition) for partition in range(count)]
    return tuple(
        _partition(partition, name, found[name])
        if name in found
        else PartitionReport(partition, name, exists=name in missing, answered=False)
        for partition, name in enumerate(consumers)
    )


def _partition(partition: int, name: str, info: Mapping[str, Any]) -> PartitionReport:
    metadata = info["config"].get("metadata") or {}
    epoch = metadata.get(names.EPOCH_KEY, "")
    return PartitionReport(
        partition,
        name,
        exists=True,
        answered=True,
        pending=info["num_pending"],
        ack_pending=info["num_ack_pending"],
        acknowledged=info["ack_floor"]["stream_seq"],
        delivered=info["delivered"]["stream_seq"],
        volume=metadata.get(names.VOLUME_KEY, ""),
        epoch=int(epoch) if epoch.isdigit() else 0,
        leader=(info.get("cluster") or {}).get("leader", ""),
    )
