"""A stream as an operator wants to see it: its replicas, its room, how far it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nats.aio.client import Client

from services.log.jetstream.names import NODES_HEALTH, NODES_STATE, PARTITIONS_KEY
from services.log.jetstream.processes import everybody
from services.log.status import ReplicaReport, StreamReport


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


# -- What each node says of itself: its state, its configuration, its clock, whether it is healthy -------------------
#
# The same as on its monitoring port, which is on loopback: the system account exports these two questions, and no
# others, to the account of the streams (``accounts.conf``). Who is connected to one node hears all of them.


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node.

    Attributes:
        name: in the cluster.
        varz: what its monitoring port says at ``/varz``.
        trouble: why it is not healthy; empty when it is.
        ahead: how far its clock is ahead of ours, seconds.
        uncertain: how far off that may be, seconds.
    """

    name: str
    varz: Mapping[str, Any]
    trouble: str
    ahead: float
    uncertain: float


async def ask_nodes(nc: Client) -> list[NodeState]:
    """Return every node that answers, by name; none where nobody lets this user ask.

    Raises LogUnavailableError: the connection is gone.
    """
    found = []
    if states := await everybody(nc, NODES_STATE):
        health = {answer.document["server"]["name"]: answer.document for answer in await everybody(nc, NODES_HEALTH)}
        for answer in states:
            varz = answer.document["data"]
            found.append(node_state(varz, _trouble(health.get(varz["server_name"], {})), answer.after, answer.at))
    return sorted(found, key=lambda node: node.name)


def node_state(varz: Mapping[str, Any], trouble: str, after: float, at: float) -> NodeState:
    """Judge the clock of a node by its ``/varz``, which came at *at* (s since 1970), *after* so many seconds."""
    said = datetime.fromisoformat(varz["now"]).timestamp()
    return NodeState(str(varz["server_name"]), varz, trouble, said - (at - after / 2), after / 2)


def _trouble(answer: Mapping[str, Any]) -> str:
    data = answer.get("data") or {}
    return "" if data.get("status") == "ok" else str(data.get("error") or "no answer")
