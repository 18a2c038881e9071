"""The nodes one by one, as everybody who reaches their ports sees them: their greetings and their certificates."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import select
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509

from services.cli.doctor.finding import Finding, error, ok, warning
from services.eventlog.errors import ProvisionError
from services.eventlog.jetstream.connection import HEADERS_BYTES
from services.eventlog.jetstream.provision import check_version

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
                "start it, or correct FI_NATS_URL; look at its log",
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
