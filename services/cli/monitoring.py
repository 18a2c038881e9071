"""What a node says of itself on its monitoring port: health, leaderships, replicas; and whether a service is ready."""

from __future__ import annotations

import http.client
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from services.cli.embedded.processes import LOOPBACK

#: a node on loopback that takes longer than this is not well, seconds
TIMEOUT = 1.0


@dataclass(frozen=True, slots=True)
class StreamView:
    """A stream as one node sees it.

    Attributes:
        leader: name of the node that leads it, empty during an election.
        current: every other replica is online and up to date; only the leader's view says so.
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
        meta_current: members of that group which are online and up to date, itself included; only on its leader.
        streams: by name; on the nodes that hold a replica.
    """

    name: str
    healthy: bool = False
    leads_meta: bool = False
    meta_current: int = 0
    streams: dict[str, StreamView] = field(default_factory=dict)


def get(port: int, path: str) -> tuple[int, bytes]:
    """Ask for *path* on loopback and return status and body, or (0, b"") when there is no answer."""
    return ask(f"http://{LOOPBACK}:{port}", path)


def ask(url: str, path: str, *, timeout: float = TIMEOUT) -> tuple[int, bytes]:
    """Ask for *path* below *url* and return status and body, or (0, b"") when there is no answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or LOOPBACK, parts.port or 80, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def ready_pid(port: int) -> int | None:
    """Return the id of the process that says on *port* that it is ready, or None when none does."""
    status, body = get(port, "/readyz")
    if status != 200:
        return None
    try:
        pid = orjson.loads(body)["pid"]
    except (orjson.JSONDecodeError, TypeError, KeyError):  # whoever listens there is no service of ours
        return None
    return pid if isinstance(pid, int) else None


def view(name: str, port: int, store: Path) -> NodeView:
    """Ask the node that monitors on *port*; one with another *store* is a stranger that took the port."""
    health, _ = get(port, "/healthz")
    status, body = get(port, "/jsz?streams=true") if health else (0, b"")
    if status != 200:
        return NodeView(name)
    jsz: dict[str, Any] = orjson.loads(body)
    if not Path(jsz.get("config", {}).get("store_dir", "")).is_relative_to(store):
        return NodeView(name)
    return _read(name, health, jsz)


def whole(views: Sequence[NodeView]) -> list[str]:
    """Return what keeps the nodes from being a whole cluster; nothing when all of them may serve, and one may go.

    Whole means: each node is healthy, a meta leader sees them all, and every replica of every stream is current.
    """
    ill = [f"{seen.name} is not healthy" for seen in views if not seen.healthy]
    if ill or len(views) <= 1:
        return ill
    if not any(seen.leads_meta and seen.meta_current == len(views) for seen in views):
        return ["no meta leader sees all nodes"]
    reasons = []
    for name in sorted({name for seen in views for name in seen.streams}):
        leaders = [
            seen.streams[name] for seen in views if name in seen.streams and seen.streams[name].leader == seen.name
        ]
        if not leaders:
            reasons.append(f"stream {name} has no leader")
        elif not all(stream.current for stream in leaders):
            reasons.append(f"not every replica of stream {name} is current")
    return reasons


def view_at(url: str) -> NodeView:
    """Ask the node whose monitoring port is at *url*; one that does not answer is called by its URL."""
    status, body = ask(url, "/varz")
    name = orjson.loads(body).get("server_name", url) if status == 200 else url
    health, _ = ask(url, "/healthz")
    status, body = ask(url, "/jsz?streams=true") if health else (0, b"")
    return _read(name, health, orjson.loads(body)) if status == 200 else NodeView(name)


def _read(name: str, health: int, jsz: dict[str, Any]) -> NodeView:
    meta = jsz.get("meta_cluster") or {}
    members = [_is_current(peer) for peer in meta.get("replicas") or []]
    accounts = jsz.get("account_details") or []
    streams = {one["name"]: _stream(one) for account in accounts for one in account.get("stream_detail") or []}
    return NodeView(name, health == 200, meta.get("leader") == name, sum(members) + 1, streams)


def _stream(detail: dict[str, Any]) -> StreamView:
    group = detail.get("cluster") or {}
    state = detail.get("state") or {}
    current = all(_is_current(peer) for peer in group.get("replicas") or [])
    return StreamView(group.get("leader", ""), current, state.get("messages", 0), state.get("last_seq", 0))


def _is_current(peer: dict[str, Any]) -> bool:
    return bool(peer.get("current")) and not peer.get("offline")
