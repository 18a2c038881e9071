"""What ``fiq doctor`` checks of the cluster: each node from outside, each node's own state, and the log as a whole.

From outside, without a login: the version, limits and certificate that a node shows when a client connects. Its own
state (health, clock, sync_interval, storage) comes through the log, which the user ``ops`` may ask, or from its
monitoring port. The log: the stream, its replicas, dead letters, and the placement of partitions.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import select
import shutil
import socket
import ssl
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
from cryptography import x509
from rich.filesize import decimal

from fiq.words import count
from services.cli import monitoring
from services.cli.embedded.stack import StackState
from services.cli.status import ClusterSnapshot, take_snapshot
from services.log.errors import ProvisionError
from services.log.findings import (
    Finding,
    check_age,
    check_events_room,
    check_placement,
    check_replicas,
    error,
    no_stream,
    ok,
    unknown,
    warning,
)
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import HEADERS_BYTES, Connection
from services.log.jetstream.monitor import NodeState, ask_nodes, node_state, read_node
from services.log.jetstream.stream import (
    BUCKET_STREAM,
    DEAD_STREAM,
    SETTINGS_FIELDS,
    STREAM,
    bucket_config,
    changes,
    check_version,
    dead_stream_config,
    stream_config,
)
from services.log.settings import LogSettings

#: clocks may differ by so much, seconds
CLOCK_OFF, CLOCK_WRONG = 1.0, 10.0
#: certificates that expire within these times, seconds
SOON, VERY_SOON = 30 * 86400, 7 * 86400
#: one answer of a node may take this long, seconds
TIMEOUT = 3.0
#: what a node keeps in memory for each id of the duplicate window, and besides, bytes; at most 390 were measured
ID_MEMORY, NODE_MEMORY = 500, 256 << 20
#: where a node monitors by default
_MONITORING_PORT = 8222
#: a node that sends nothing for so long waits for a TLS handshake, seconds; its own timeout is three
_SILENCE = 1.0
_INFO = b"INFO "
_RENEW_NODES = "`fiq init FOLDER --rotate certificates` makes new ones; reload the nodes"
_RENEW_AUTHORITY = "move to another authority before it expires: docs/security.md"


# -- A node from outside ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a node sends to a client that connects: its INFO message, and its certificate in DER (empty without TLS)."""

    address: str
    info: dict[str, Any]
    certificate: bytes


def server_info(address: str) -> ServerInfo | None:
    """Connect to host:port *address*; return None when it does not answer as a nats-server does."""
    host, port = _host(address), address.rpartition(":")[2]
    try:
        with socket.create_connection((host, int(port)), TIMEOUT) as plain:
            # with handshake_first a node sends nothing before the TLS handshake
            if not select.select([plain], [], [], _SILENCE)[0]:
                with _secured(plain, host) as secured:
                    return _parsed(address, _line(secured), secured.getpeercert(binary_form=True) or b"")
            found = _parsed(address, _line(plain), b"")
            if found is None or not (found.info.get("tls_required") or found.info.get("tls_available")):
                return found
            with _secured(plain, host) as secured:
                return ServerInfo(address, found.info, secured.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return None


def _parsed(address: str, line: bytes, certificate: bytes) -> ServerInfo | None:
    return ServerInfo(address, json.loads(line.removeprefix(_INFO)), certificate) if line.startswith(_INFO) else None


def _line(connection: socket.socket) -> bytes:
    """Read up to the end of the line, and no further: the next byte belongs to the TLS handshake."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < 1 << 16:
        if not (byte := connection.recv(1)):
            break
        line += byte
    return bytes(line)


def _secured(plain: socket.socket, host: str) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only to read the certificate; the login checks whether it is trusted
    return context.wrap_socket(plain, server_hostname=host)


def find_servers(servers: Sequence[str]) -> tuple[list[str], list[ServerInfo]]:
    """Return the addresses of all nodes, from the settings and from the nodes themselves, and what they sent.

    Nodes tell the addresses of their own network. One whose name is unknown here, such as that of a container on the
    host, is left out when its node answered at another address.
    """
    listed = _addresses(servers, [])
    found = [info for address in listed if (info := server_info(address)) is not None]
    known = {str(one.info.get("server_name")) for one in found}
    told = [address for address in _addresses(servers, found) if address not in listed]
    others = [address for address in told if _host(address) not in known or _resolves(_host(address))]
    sent = (server_info(address) for address in others)
    return sorted([*listed, *others]), [*found, *(info for info in sent if info is not None)]


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _addresses(servers: Sequence[str], found: Sequence[ServerInfo]) -> list[str]:
    urls = [urlsplit(url) for url in servers]
    known = {f"{url.hostname}:{url.port or 4222}" for url in urls}
    return sorted(known | {address for one in found for address in one.info.get("connect_urls") or []})


def check_servers(expected: Sequence[str], found: Sequence[ServerInfo], event_bytes: int) -> Iterator[Finding]:
    """Check that each node answers, its version, and that events of *event_bytes* fit."""
    answered = {one.address for one in found}
    for address in expected:
        if address not in answered:
            meaning = "when one of three nodes is down, the loss of another one stops everything"
            action = "start it, or correct FI_LOG_URL; look at its log"
            yield error("nodes", f"{address} does not answer as a NATS node", meaning, action)
    versions = sorted({str(one.info.get("version", "")) for one in found})
    for version in versions:
        try:
            check_version(version)
        except ProvisionError as problem:
            yield error("versions", f"nats-server {version}", str(problem), "upgrade the node")
    if len(versions) > 1:
        what = f"nodes run nats-server {' and '.join(versions)}"
        meaning = "fine during an upgrade, not tested for longer"
        yield warning("versions", what, meaning, "finish the upgrade: `rolling-restart`")
    elif versions:
        yield ok("versions", f"nats-server {versions[0]} on {count(len(found), 'node')}")
    needed = event_bytes + HEADERS_BYTES
    small = [one for one in found if one.info.get("max_payload", 0) < needed]
    for one in small:
        what = f"max_payload of {one.address} is {one.info.get('max_payload')} bytes, events take up to {needed}"
        action = "raise max_payload in nats.conf, or lower FI_MAX_EVENT_BYTES"
        yield error("limits", what, "ingest refuses to start", action)
    if found and not small:
        yield ok("limits", f"max_payload leaves room for events of {event_bytes} bytes")


def check_certificates(found: Sequence[ServerInfo], ca_file: str, now: float) -> Iterator[Finding]:
    """Check when the certificates of the nodes and of their authority expire."""
    for one in found:
        if one.certificate:
            shown = x509.load_der_x509_certificate(one.certificate)
            yield _validity(f"certificate of {one.address}", shown, now, _RENEW_NODES)
        elif not _is_loopback(one.address):
            meaning = "anyone on the network path can read medical data and post events"
            action = "turn TLS on: `fiq init`, docs/security.md"
            yield warning("certificates", f"{one.address} speaks plain text", meaning, action)
    if found and all(not one.certificate and _is_loopback(one.address) for one in found):
        yield ok("certificates", "no TLS, and all nodes are on loopback")
    if not ca_file:
        return
    try:
        authorities = x509.load_pem_x509_certificates(Path(ca_file).read_bytes())
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "it contains no certificate"
        yield error("certificates", f"FI_NATS_CA_FILE={ca_file}: {reason}", "no node is trusted", "put ca.pem there")
        return
    for authority in authorities:
        yield _validity(f"authority in {ca_file}", authority, now, _RENEW_AUTHORITY)


def _validity(what: str, certificate: x509.Certificate, now: float, action: str) -> Finding:
    end, begin = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    left = end.timestamp() - now
    if left < 0:
        return error("certificates", f"the {what} expired on {end:%Y-%m-%d}", "clients cannot connect", action)
    if begin.timestamp() > now:
        what = f"the {what} is valid only from {begin:%Y-%m-%d %H:%M} UTC"
        return error("certificates", what, "clients cannot connect yet, or a clock is wrong", "check the clocks")
    if left < SOON:
        made = error if left < VERY_SOON else warning
        meaning = "clients cannot connect after that"
        return made("certificates", f"the {what} expires on {end:%Y-%m-%d}", meaning, action)
    return ok("certificates", f"the {what} is good until {end:%Y-%m-%d}")


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


# -- A node's own state ----------------------------------------------------------------------------------------------


def monitoring_urls(given: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Return the *given* URLs of monitoring ports, else the default port of each *expected* node's host."""
    hosts = dict.fromkeys(address.rpartition(":")[0] for address in expected)
    return list(given) or [f"http://{host}:{_MONITORING_PORT}" for host in hosts]


def from_ports(urls: Sequence[str]) -> tuple[list[NodeState], list[str]]:
    """Ask the monitoring ports at *urls*; return the nodes that answered, and the URLs that did not."""
    found, unreachable = [], []
    for url in urls:
        before = time.time()
        status, body = monitoring.get(url, "/varz", timeout=TIMEOUT)
        at = time.time()
        try:
            varz = orjson.loads(body) if status == 200 else None
        except orjson.JSONDecodeError:
            varz = None
        if not isinstance(varz, dict) or "server_name" not in varz:
            unreachable.append(url)
            continue
        health, reason = monitoring.get(url, "/healthz", timeout=TIMEOUT)
        trouble = "" if health == 200 else reason.decode("utf-8", "replace").strip()[:200] or "no answer"
        found.append(node_state(varz, trouble, at - before, at))
    return found, unreachable


def unreachable_ports(urls: Sequence[str], *, users: bool) -> Iterator[Finding]:
    """Report monitoring ports that did not answer; only a deployment with *users* has one who may ask the nodes."""
    for url in urls:
        asked = "run it as the user `ops`, who may ask all nodes" if users else "look at its node"
        action = f"{asked}, or name reachable ports with --monitoring"
        yield unknown("sync_interval", f"the monitoring port {url} is not reachable", action)


def silent_nodes(names: Collection[str]) -> Iterator[Finding]:
    """Report nodes that accept clients but did not answer through the log as others did."""
    for name in sorted(names):
        yield unknown("sync_interval", f"{name} did not report its state", "run it again, then look at its log")


def check_nodes(found: Sequence[NodeState], clock_offset: float = 0.0) -> Iterator[Finding]:
    """Check health, clock, sync_interval and storage limits.

    Args:
        found: what the nodes reported.
        clock_offset: seconds by which this machine's clock is assumed to be ahead.
    """
    for node in found:
        if node.trouble:
            meaning = "it is behind, without a leader, or its JetStream is off, as after a full disk"
            action = "look at its log; after a full disk restart it"
            yield error("nodes", f"{node.name} is not healthy: {node.trouble}", meaning, action)
        else:
            yield ok("nodes", f"{node.name} is healthy")
        yield _clock(node.name, node.ahead - clock_offset, node.uncertain)
        yield from _storage(node.name, node.varz.get("jetstream") or {})


def check_node_memory(found: Sequence[NodeState], most: int, window: float) -> Iterator[Finding]:
    """Compare what the ids of *most* events in a *window* of so many seconds take with the nodes' memory limits."""
    limits = {node.name: read_node(node.varz).memory_limit for node in found}
    tightest = min((limit, name) for name, limit in limits.items() if limit) if any(limits.values()) else None
    action = "set FI_MAX_WINDOW_EVENTS, NATS_MEMORY and NATS_GOMEMLIMIT as docs/deploy.md, `Memory of the nodes`, says"
    if not most:
        what = f"FI_MAX_WINDOW_EVENTS=0: nothing limits the ids that the nodes keep in memory for {window:g} s"
        yield warning("limits", what, "at a high rate all nodes run out of memory at the same time", action)
    elif tightest is not None:
        needed = NODE_MEMORY + most * ID_MEMORY
        what = (
            f"{most:,} ids in {window:g} s ({most / window:,.0f} events/s) bring a node to {decimal(needed)}; "
            f"GOMEMLIMIT of {tightest[1]} is {decimal(tightest[0])}"
        )
        if needed > tightest[0]:
            yield warning("limits", what, "at that rate all nodes run out of memory at the same time", action)
        else:
            yield ok("limits", what)


def _clock(name: str, ahead: float, uncertain: float = 0.0) -> Finding:
    """Judge a clock that is *ahead* of this machine's by so many seconds, give or take *uncertain*."""
    off = max(0.0, abs(ahead) - uncertain)
    if off < CLOCK_OFF:
        return ok("clocks", f"{name} agrees with this machine to {max(abs(ahead), uncertain):.2f} s")
    what = f"the clock of {name} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    meaning = "times of events, FI_RETENTION, ages in metrics and the validity of certificates are off by that"
    return (error if off >= CLOCK_WRONG else warning)("clocks", what, meaning, "run NTP on both (`timedatectl`)")


def _storage(name: str, jetstream: dict[str, Any]) -> Iterator[Finding]:
    config, stats = jetstream.get("config") or {}, jetstream.get("stats") or {}
    if not config:
        action = "check its nats.conf and its log"
        yield error("sync_interval", f"{name} has no JetStream", "it holds no events", action)
        return
    if config.get("sync_always"):
        yield ok("sync_interval", f"{name} syncs every message before it is acknowledged")
    else:
        what = f"{name} syncs every {config.get('sync_interval', 0) / 1e9:.0f} s only"
        meaning = "if all nodes lose power at once, events that clients got a 202 for are lost"
        yield error("sync_interval", what, meaning, "set sync_interval: always in nats.conf and restart the node")
    most, used = config.get("max_storage", 0), max(stats.get("storage", 0), stats.get("reserved_storage", 0))
    what = f"streams reserve {decimal(used)} of the {decimal(most)} of {name} (max_file_store)"
    if used > most:
        yield error("limits", what, "the node refuses messages when it is full", "raise max_file_store in nats.conf")
    else:
        yield ok("limits", what)
    directory = config.get("store_dir", "")
    # on this machine, if at all
    if directory and os.path.isdir(directory) and most > (total := shutil.disk_usage(directory).total):  # noqa: PTH112
        what = f"max_file_store of {name} is {decimal(most)}, its disk has {decimal(total)}"
        meaning = "a node whose disk is full turns JetStream off until it is restarted; one at its limit only refuses"
        yield error("limits", what, meaning, "set max_file_store in nats.conf below the size of the disk")


# -- The log ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """What the broker answered.

    Attributes:
        snapshot: the log as services see it.
        infos: STREAM.INFO of each of our streams that exists, by name.
        nodes: the nodes' own states; empty where this user may not ask.
        clocks: without *nodes*, how far the clock of the stream's leader is ahead of ours, and how uncertain that is,
            both in seconds.
    """

    snapshot: ClusterSnapshot
    infos: dict[str, dict[str, Any]]
    nodes: tuple[NodeState, ...]
    clocks: dict[str, tuple[float, float]]


async def ask_cluster(nc: Connection, settings: LogSettings, state: StackState | None) -> ClusterReport:
    """Ask the broker everything. Raises LogUnavailableError: no answer; LogRefusedError: this user may not ask."""
    api = JetStreamApi(nc)
    asked = time.perf_counter()
    answers = {STREAM: await api.stream_info(STREAM)}
    uncertain = (time.perf_counter() - asked) / 2
    answers |= {name: await api.stream_info(name) for name in (DEAD_STREAM, BUCKET_STREAM)}
    infos = {name: info for name, info in answers.items() if info is not None}
    snapshot = await take_snapshot(nc, settings, state)
    nodes = await ask_nodes(nc)
    stream = snapshot.stream
    leader = stream.leader if stream is not None and not nodes else ""
    clocks = {leader: (-snapshot.log.clock_offset, uncertain)} if leader else {}
    return ClusterReport(snapshot, infos, tuple(nodes), clocks)


def check_clocks(seen: ClusterReport, offset: float, known: Collection[str]) -> Iterator[Finding]:
    """Check the clocks of nodes that are not *known* yet; ours is assumed to be *offset* seconds ahead."""
    for name, (ahead, uncertain) in seen.clocks.items():
        if name not in known:
            yield _clock(name, ahead - offset, uncertain)
    if not seen.clocks and not known:
        yield unknown("clocks", "no node reported its time", "the leader of the stream reports it: start the nodes")


def check_stream(seen: ClusterReport, settings: LogSettings) -> Iterator[Finding]:
    """Check that our streams match the settings, and the replicas and the room of the stream of events."""
    stream = seen.snapshot.stream
    if stream is None or STREAM not in seen.infos:
        yield no_stream()
        return
    for config in (stream_config(settings), dead_stream_config(settings), bucket_config(settings)):
        if config["name"] in seen.infos:
            yield from _drift(config, seen.infos[config["name"]])
    yield from check_replicas(stream)
    yield check_events_room(stream)


def _drift(wanted: dict[str, Any], info: dict[str, Any]) -> Iterator[Finding]:
    """Compare a stream with its definition: a field that follows no setting was changed by hand."""
    name = wanted["name"]
    try:
        different = changes(wanted, info["config"], info["state"]["bytes"])
    except ProvisionError as problem:
        yield error("stream", str(problem), "services with these settings refuse to start", "see the message")
        return
    if by_hand := sorted(different.keys() - SETTINGS_FIELDS):
        values = ", ".join(f"{key} is {orjson.dumps(info['config'].get(key)).decode()[:200]}" for key in by_hand)
        meaning = "someone with the provisioner's seed can copy each event elsewhere, or have events deleted"
        action = "`fiq provision` undoes it; find out who did it, and renew the seeds: `fiq init --rotate users`"
        yield error("stream", f"stream {name} was changed by hand: {values}", meaning, action)
    if by_settings := sorted(different.keys() & SETTINGS_FIELDS):
        what = f"stream {name} differs from the settings: {', '.join(by_settings)}"
        action = "set the same FI_ variables everywhere; `fiq provision` changes the stream now"
        yield warning("stream", what, "the next service that provisions changes it", action)
    if not different:
        yield ok("stream", f"stream {name} matches the settings")


def check_partitions(snapshot: ClusterSnapshot, volumes: int) -> Iterator[Finding]:
    """Check the placement of the partitions, which *volumes* volumes are meant to have, and the age of what waits."""
    if snapshot.stream is not None:
        yield from check_placement(snapshot.log, snapshot.store, volumes)
        yield from check_age(snapshot.log, snapshot.store, time.time() - snapshot.log.clock_offset)
