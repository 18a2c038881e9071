"""Until when certificates are valid, as a real encrypted connection shows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from prometheus_client import CollectorRegistry

from services.log.jetstream.connection import Connection, close, connect
from services.log.jetstream.monitor import LogMonitor
from services.log.metrics import LogMetrics
from services.log.settings import LogSettings
from services.log.status import CertificateExpiry
from tests.support.broker import connected, plain_server

#: whole seconds, as certificates have them
NOW = datetime.now(UTC).replace(microsecond=0)
NODE_END = NOW + timedelta(days=3)
CA_END = NOW + timedelta(days=30)


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, end: datetime, issuer: str, by: ec.EllipticCurvePrivateKey
) -> bytes:
    def named(value: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, value)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
    )
    return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _authority(folder: Path, name: str) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / f"{name}.pem").write_bytes(_certificate(name, key, CA_END, name, key))
    return key


@asynccontextmanager
async def _encrypted(folder: Path) -> AsyncIterator[Connection]:
    """Connect to a node with TLS; the file of authorities holds a second one that signed nothing here."""
    ca, _ = _authority(folder, "our-ca"), _authority(folder, "other-ca")
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "node.pem").write_bytes(_certificate("n1", key, NODE_END, "our-ca", ca))
    (folder / "node.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    files = f'cert_file: "{folder / "node.pem"}", key_file: "{folder / "node.key"}"'
    tls = f'tls {{ {files}, min_version: "1.3", handshake_first: true }}'
    authorities = [(folder / f"{name}.pem").read_text() for name in ("other-ca", "our-ca")]
    (folder / "authorities.pem").write_text("".join(authorities))
    with plain_server(folder, tls) as url:
        settings = LogSettings(servers=(url,), ca_file=str(folder / "authorities.pem"))
        nc = await connect(settings, name="test", on_closed=lambda _: None)
        try:
            yield nc
        finally:
            await close(nc)


async def test_the_nodes_certificate_and_the_one_that_signed_it_are_found(tmp_path: Path) -> None:
    """And no other authority, however many the file holds."""
    async with _encrypted(tmp_path) as nc:
        assert [
            CertificateExpiry("node", "n1", NODE_END.timestamp()),
            CertificateExpiry("ca", "our-ca", CA_END.timestamp()),
        ] == nc.certificates()


async def test_the_metrics_show_them_though_nothing_else_answers(tmp_path: Path) -> None:
    """A broker in trouble is no reason to be silent about its certificate."""
    registry = CollectorRegistry()
    async with _encrypted(tmp_path) as nc:
        monitor = LogMonitor(nc, LogSettings(replicas=1), LogMetrics(registry))
        await monitor.look()
        await monitor.close()
    for kind, name, end in (("node", "n1", NODE_END), ("ca", "our-ca", CA_END)):
        labels = {"certificate": kind, "name": name}
        assert end.timestamp() == registry.get_sample_value("fi_certificate_expiry_timestamp_seconds", labels)


async def test_a_plain_connection_has_none(tmp_path: Path) -> None:
    """As in `fiq up`, on loopback."""
    with plain_server(tmp_path) as url:
        nc = await connected(url)
        assert [] == nc.certificates()
        await nc.close()
