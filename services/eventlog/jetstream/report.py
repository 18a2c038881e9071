"""A stream as an operator wants to see it: its replicas, its room, how far it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.eventlog.jetstream.names import PARTITIONS_KEY

#: a replica that the leader heard of within this time counts as up, though it may lag, seconds
ALIVE_SECONDS = 5.0


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
    """One stream.

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

    @property
    def copies(self) -> int:
        """Nodes that hold the stream, up or not."""
        return len(self.replicas) + 1

    @property
    def has_quorum(self) -> bool:
        """Whether a majority of its nodes is up, the leader included."""
        return 2 * (1 + sum(replica.alive for replica in self.replicas)) > self.copies


def read_stream(info: Mapping[str, Any]) -> StreamReport:
    """Build the report from an answer to STREAM.INFO."""
    config, state, cluster = info["config"], info["state"], info.get("cluster")
    partitions = (config.get("metadata") or {}).get(PARTITIONS_KEY, "")
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
