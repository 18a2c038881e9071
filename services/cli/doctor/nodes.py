"""The nodes one by one, as everybody who reaches their ports sees them: their greetings and their certificates."""

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

from services.cli import monitoring
from services.cli.doctor.finding import Finding, error, ok, unknown, warning
from services.log.errors import ProvisionError
from services.log.jetstream.connection import HEADERS_BYTES
from services.log.jetstream.monitor import NodeState, node_state
from services.log.jetstream.stream import check_version

#: clocks may differ by so much, seconds
CLOCK_OFF, CLOCK_WRONG = 1.0, 10.0
#: where a node monitors when nothing else is known
_MONITORING_PORT = 8222
#: one answer of a node may take this long, seconds
TIMEOUT = 3.0
#: certificates that end within these times, seconds
SOON, VERY_SOON = 30 * 86400, 7 * 86400
#: a node that has said nothing for so long waits for a TLS handshake, seconds; its own patience is three
_SILENCE = 1.0
_INFO = b"INFO "
_RENEW_NODES = "`fiq init FOLDER --rotate certificates` makes new ones; reload the nodes"
_RENEW_AUTHORITY = "move to another authority while this one is good: docs/security.md"


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a node says before anybody has logged in (the INFO of the protocol), and the certificate it then shows.

    Attributes:
        address: host:port.
        info: what it said.
        certificate: in DER; empty without TLS.
    """

    address: str
    info: dict[str, Any]
    certificate: bytes


def greet(address: str) -> Greeting | None:
    """Ask a node for its greeting and its certificate; None when it does not answer as a nats-server does."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), TIMEOUT) as plain:
            # with handshake_first a node says nothing before it is spoken to in TLS
            if not select.select([plain], [], [], _SILENCE)[0]:
                with _secured(plain, host) as secured:
                    return _greeting(address, _line(secured), secured.getpeercert(binary_form=True) or b"")
            greeting = _greeting(address, _line(plain), b"")
            if greeting is None or not (greeting.info.get("tls_required") or greeting.info.get("tls_available")):
                return greeting
            with _secured(plain, host) as secured:
                return Greeting(address, greeting.info, secured.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return None


def _greeting(address: str, line: bytes, certificate: bytes) -> Greeting | None:
    return Greeting(address, json.loads(line.removeprefix(_INFO)), certificate) if line.startswith(_INFO) else None


def _line(connection: socket.socket) -> bytes:
    """Read up to the end of the line, and nothing behind it: the next byte is of the TLS handshake."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < 1 << 16:
        if not (byte := connection.recv(1)):
            break
        line += byte
    return bytes(line)


def _secured(plain: socket.socket, host: str) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it is only looked at: whether it is trusted is found out by logging in
    return context.wrap_socket(plain, server_hostname=host)


def addresses(servers: Sequence[str], greetings: Sequence[Greeting]) -> list[str]:
    """Return the nodes' addresses: those of the settings, and those that nodes told of."""
    named = [urlsplit(url) for url in servers]
    known = {f"{url.hostname}:{url.port or 4222}" for url in named}
    told = {address for greeting in greetings for address in greeting.info.get("connect_urls") or []}
    return sorted(known | told)


def check_greetings(expected: Sequence[str], found: Sequence[Greeting], event_bytes: int) -> Iterator[Finding]:
    """Compare the nodes' versions and limits with what is needed."""
    answered = {greeting.address for greeting in found}
    for address in expected:
        if address not in answered:
            yield error(
                "nodes",
                f"{address} does not answer as a NATS node",
                "with one of three nodes away the loss of another one stops everything",
                "start it, or correct FI_LOG_URL; look at its log",
            )
    kinds = sorted({str(greeting.info.get("version", "")) for greeting in found})
    for version in kinds:
        try:
            check_version(version)
        except ProvisionError as problem:
            yield error("versions", f"nats-server {version}", str(problem), "upgrade the node")
    if len(kinds) > 1:
        yield warning(
            "versions",
            f"nodes run nats-server {' and '.join(kinds)}",
            "fine during an upgrade, untested for long",
            "finish the upgrade: `rolling-restart`",
        )
    elif kinds:
        yield ok("versions", f"nats-server {kinds[0]} on {len(found)} node{'' if len(found) == 1 else 's'}")
    needed = event_bytes + HEADERS_BYTES
    small = [greeting for greeting in found if greeting.info.get("max_payload", 0) < needed]
    for greeting in small:
        limit = greeting.info.get("max_payload")
        yield error(
            "limits",
            f"max_payload of {greeting.address} is {limit} bytes, events take up to {needed}",
            "ingest refuses to start there",
            "raise max_payload in nats.conf, or lower FI_MAX_EVENT_BYTES",
        )
    if found and not small:
        yield ok("limits", f"max_payload leaves room for events of {event_bytes} bytes")


def check_certificates(found: Sequence[Greeting], ca_file: str, now: float) -> Iterator[Finding]:
    """Look at when the nodes' certificates, and that of their authority, end."""
    for greeting in found:
        if greeting.certificate:
            shown = x509.load_der_x509_certificate(greeting.certificate)
            yield _ends(f"certificate of {greeting.address}", shown, now, _RENEW_NODES)
        elif not _is_loopback(greeting.address):
            yield warning(
                "certificates",
                f"{greeting.address} speaks plain text",
                "whoever can listen on the network reads medical data and can post events",
                "turn TLS on: `fiq init`, docs/security.md",
            )
    if found and all(not greeting.certificate and _is_loopback(greeting.address) for greeting in found):
        yield ok("certificates", "no TLS, and all nodes are on loopback")
    if ca_file:
        try:
            authorities = x509.load_pem_x509_certificates(Path(ca_file).read_bytes())
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or "it holds no certificate"
            yield error(
                "certificates", f"FI_NATS_CA_FILE={ca_file}: {reason}", "no node is trusted", "put ca.pem there"
            )
            return
        for authority in authorities:
            yield _ends(f"authority in {ca_file}", authority, now, _RENEW_AUTHORITY)


def _ends(what: str, certificate: x509.Certificate, now: float, action: str) -> Finding:
    end, begin = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    left = end.timestamp() - now
    if left < 0:
        return error("certificates", f"the {what} ended on {end:%Y-%m-%d}", "nobody can connect any more", action)
    if begin.timestamp() > now:
        meaning = "nobody can connect yet, or a clock is wrong"
        return error("certificates", f"the {what} begins on {begin:%Y-%m-%d %H:%M} UTC", meaning, "check the clocks")
    if left < SOON:
        made = error if left < VERY_SOON else warning
        return made("certificates", f"the {what} ends on {end:%Y-%m-%d}", "nobody can connect from then on", action)
    return ok("certificates", f"the {what} is good until {end:%Y-%m-%d}")


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


# -- What only the nodes know, told through the log or at a monitoring port: sync_interval, limits, health, clock ----


def monitoring_urls(given: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Return where the nodes monitor: what was given, else the usual port of each host."""
    hosts = dict.fromkeys(address.rpartition(":")[0] for address in expected)
    return list(given) or [f"http://{host}:{_MONITORING_PORT}" for host in hosts]


def get(url: str, path: str) -> tuple[int, bytes]:
    """Ask for *path* below *url*; (0, b"") when there is no answer."""
    return monitoring.get(url, path, timeout=TIMEOUT)


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
