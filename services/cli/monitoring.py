"""What nodes and services say over HTTP: a node's health, leaderships and replicas, and whether a service is ready."""

from __future__ import annotations

import http.client
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

#: how long an answer on loopback may take, seconds
TIMEOUT = 1.0


@dataclass(frozen=True, slots=True)
class StreamView:
    """A stream as one node sees it.

    Attributes:
        leader: name of the node that leads it, empty during an election.
        current: every other replica is online and up to date; only the leader knows.
        messages: how many it holds.
        last: sequence of the last one.
    """

    leader: str
    current: bool
    messages: int
    last: int


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as it sees itself.

    Attributes:
        name: of the node.
        healthy: plain ``/healthz`` says 200: connected to a meta leader, and caught up.
        leads_meta: it leads the metadata group.
        meta_current: members of that group that are online and up to date, itself included; only on its leader.
        streams: by name, those of which the node holds a replica.
    """

    name: str
    healthy: bool = False
    leads_meta: bool = False
    meta_current: int = 0
    streams: dict[str, StreamView] = field(default_factory=dict)


def get(where: str | int, path: str, *, timeout: float = TIMEOUT) -> tuple[int, bytes]:
    """Return status and body of *path* at the URL or loopback port *where*, or (0, b"") when there is no answer."""
    parts = urlsplit(f"http://127.0.0.1:{where}" if isinstance(where, int) else where)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port or 80, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def ready_pid(port: int) -> int | None:
    """Return the process id of the service on *port* if its ``/readyz`` says that it is ready, else None."""
    status, body = get(port, "/readyz")
    if status != 200:
        return None
    try:
        pid = orjson.loads(body)["pid"]
    except (orjson.JSONDecodeError, TypeError, KeyError):  # another program listens there
        return None
    return pid if isinstance(pid, int) else None


def reasons(body: bytes) -> str:
    """Return why a service is not ready, from the *body* of its ``/readyz``; empty when that gives no reason."""
    try:
        found = orjson.loads(body)["reasons"]
    except (orjson.JSONDecodeError, TypeError, KeyError):  # another program listens there, or nothing
        return ""
    return "; ".join(map(str, found)) if isinstance(found, list) else ""


def view(where: str | int, *, name: str = "", store: Path | None = None) -> NodeView:
    """Ask the node that monitors at the URL or loopback port *where*.

    Args:
        where: of the monitoring port.
        name: of the node; by default what it says, or *where* when it does not answer.
        store: its store; a node with another store has taken the port of the one that is meant.
    """
    if not name:
        status, body = get(where, "/varz")
        name = orjson.loads(body).get("server_name", str(where)) if status == 200 else str(where)
    health, _ = get(where, "/healthz")
    status, body = get(where, "/jsz?streams=true") if health else (0, b"")
    if status != 200:
        return NodeView(name)
    jsz: dict[str, Any] = orjson.loads(body)
    if store is not None and not Path(jsz.get("config", {}).get("store_dir", "")).is_relative_to(store):
        return NodeView(name)
    meta = jsz.get("meta_cluster") or {}
    current = 1 + sum(_is_current(peer) for peer in meta.get("replicas") or [])
    accounts = jsz.get("account_details") or []
    streams = {one["name"]: _stream(one) for account in accounts for one in account.get("stream_detail") or []}
    return NodeView(name, health == 200, meta.get("leader") == name, current, streams)


def _stream(detail: dict[str, Any]) -> StreamView:
    group, state = detail.get("cluster") or {}, detail.get("state") or {}
    current = all(_is_current(peer) for peer in group.get("replicas") or [])
    return StreamView(group.get("leader", ""), current, state.get("messages", 0), state.get("last_seq", 0))


def _is_current(peer: dict[str, Any]) -> bool:
    return bool(peer.get("current")) and not peer.get("offline")


def problems(views: Sequence[NodeView]) -> list[str]:
    """Return why the cluster would not survive the loss of one node just now; nothing when it would.

    It does when each node is healthy, a meta leader sees them all, and every replica of every stream is current.
    """
    reasons = [f"{seen.name} is not healthy" for seen in views if not seen.healthy]
    if reasons or len(views) <= 1:
        return reasons
    if not any(seen.leads_meta and seen.meta_current == len(views) for seen in views):
        return ["no meta leader sees all nodes"]
    for name in sorted({name for seen in views for name in seen.streams}):
        leaders = [
            seen.streams[name] for seen in views if name in seen.streams and seen.streams[name].leader == seen.name
        ]
        if not leaders:
            reasons.append(f"stream {name} has no leader")
        elif not all(stream.current for stream in leaders):
            reasons.append(f"not every replica of stream {name} is current")
    return reasons
