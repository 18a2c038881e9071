"""What only the nodes know, told through the log or at a monitoring port: sync_interval, limits, health, clock."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import orjson
from rich.filesize import decimal

from services.cli.doctor.finding import Finding, error, ok, unknown, warning
from services.cli.monitoring import ask
from services.eventlog.jetstream.nodes import NodeState, node_state

#: one answer may take this long, seconds
TIMEOUT = 3.0
#: clocks may differ by so much, seconds
CLOCK_OFF, CLOCK_WRONG = 1.0, 10.0
#: where a node monitors when nothing else is known
_MONITORING_PORT = 8222


def monitoring_urls(given: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Return where the nodes monitor: what was given, else the usual port of each host."""
    hosts = dict.fromkeys(address.rpartition(":")[0] for address in expected)
    return list(given) or [f"http://{host}:{_MONITORING_PORT}" for host in hosts]


def get(url: str, path: str) -> tuple[int, bytes]:
    """Ask for *path* below *url*; (0, b"") when there is no answer."""
    return ask(url, path, timeout=TIMEOUT)


def from_ports(urls: Sequence[str]) -> tuple[list[NodeState], list[str]]:
    """Ask the monitoring ports at *urls*; return the nodes that answered, and the URLs where none did."""
    found, out_of_reach = [], []
    for url in urls:
        before = time.time()
        status, body = get(url, "/varz")
        at = time.time()
        try:
            varz = orjson.loads(body) if status == 200 else None
        except orjson.JSONDecodeError:
            varz = None
        if not isinstance(varz, dict) or "server_name" not in varz:
            out_of_reach.append(url)
            continue
        health, reason = get(url, "/healthz")
        trouble = "" if health == 200 else reason.decode("utf-8", "replace").strip()[:200] or "no answer"
        found.append(node_state(varz, trouble, at - before, at))
    return found, out_of_reach


def unreachable(urls: Sequence[str]) -> Iterator[Finding]:
    """Say that nobody could be asked at these monitoring ports."""
    for url in urls:
        action = "run it as the user `ops`, who may ask all nodes, or name ports with --monitoring that can be reached"
        yield unknown("sync_interval", f"the monitoring port {url} is not reachable", action)


def silent(names: Collection[str]) -> Iterator[Finding]:
    """Say that these nodes take clients, and did not answer through the log as others did."""
    for name in sorted(names):
        yield unknown("sync_interval", f"{name} did not say how it is", "run it again; if it stays so look at its log")


def check_nodes(found: Sequence[NodeState], now_offset: float = 0.0) -> Iterator[Finding]:
    """Look at what only the nodes know: health, clock, sync_interval, storage limits.

    Args:
        found: what they said.
        now_offset: seconds that this machine's clock is taken to be ahead.
    """
    for node in found:
        if node.trouble:
            meaning = "it is behind, without a leader, or its JetStream is off, as after a full disk"
            action = "look at its log; after a full disk restart it"
            yield error("nodes", f"{node.name} is not healthy: {node.trouble}", meaning, action)
        else:
            yield ok("nodes", f"{node.name} is healthy")
        yield clock(node.name, node.ahead - now_offset, node.uncertain)
        yield from _storage(node.name, node.varz.get("jetstream") or {})


def clock(name: str, ahead: float, uncertain: float = 0.0) -> Finding:
    """Judge a clock that is *ahead* of ours by so many seconds, give or take *uncertain*."""
    off = max(0.0, abs(ahead) - uncertain)
    if off < CLOCK_OFF:
        return ok("clocks", f"{name} agrees with this machine to {max(abs(ahead), uncertain):.2f} s")
    what = f"the clock of {name} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    meaning = "times of events, FI_RETENTION, ages in metrics and the validity of certificates are off by that"
    action = "run NTP on both (`timedatectl`)"
    return (error if off >= CLOCK_WRONG else warning)("clocks", what, meaning, action)


def _storage(name: str, jetstream: dict[str, Any]) -> Iterator[Finding]:
    config, stats = jetstream.get("config") or {}, jetstream.get("stats") or {}
    if not config:
        yield error(
            "sync_interval", f"{name} has no JetStream", "it holds no events", "check its nats.conf and its log"
        )
        return
    if config.get("sync_always"):
        yield ok("sync_interval", f"{name} syncs every message before it is acknowledged")
    else:
        yield error(
            "sync_interval",
            f"{name} syncs every {config.get('sync_interval', 0) / 1e9:.0f} s only",
            "when all nodes lose power at once, events that clients got a 202 for are lost",
            "set sync_interval: always in nats.conf and restart the node",
        )
    most, used = config.get("max_storage", 0), max(stats.get("storage", 0), stats.get("reserved_storage", 0))
    what = f"streams reserve {decimal(used)} of the {decimal(most)} of {name} (max_file_store)"
    if used > most:
        yield error("limits", what, "the node refuses messages when it is full", "raise max_file_store in nats.conf")
    else:
        yield ok("limits", what)
    yield from _store_disk(name, config.get("store_dir", ""), most)


def _store_disk(name: str, directory: str, most: int) -> Iterator[Finding]:
    if not directory or not os.path.isdir(directory):  # noqa: PTH112 - the name is another machine's
        return
    total = shutil.disk_usage(directory).total
    if most > total:
        yield error(
            "limits",
            f"max_file_store of {name} is {decimal(most)}, its disk has {decimal(total)}",
            "a node whose disk is full turns JetStream off until it is restarted; one at its limit only refuses",
            "set max_file_store in nats.conf below the size of the disk",
        )
