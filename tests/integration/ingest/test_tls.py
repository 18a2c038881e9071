"""TLS: what is spoken, and a certificate that is renewed under open connections."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
import warnings
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from aiohttp import ClientSession, TCPConnector
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fiq.errors import ConfigurationError
from services.cli.init.keys import Pair
from services.ingest import server, service
from services.ingest.service import make_app
from services.ingest.settings import Settings
from tests.support.certificates import HOUR, CertificateFiles
from tests.support.ingest import Edge, MemoryLog, running_edge
from tests.support.polling import eventually

BODY = b'{"event_type":"A"}'


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CertificateFiles:
    """A pair, which is looked at more often than each second."""
    monkeypatch.setattr(service, "RELOAD_SECONDS", 0.02)
    return CertificateFiles(tmp_path)


@pytest.fixture
async def edge(files: CertificateFiles) -> AsyncIterator[Edge]:
    async with running_edge(**files.settings) as edge:
        yield edge


async def name_shown(edge: Edge, files: CertificateFiles, context: ssl.SSLContext | None = None) -> str:
    """Return the common name of the certificate that a new connection sees; its signature is checked."""
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=context or files.trust())
    shown = writer.get_extra_info("peercert")
    writer.close()
    await writer.wait_closed()
    return str(dict(pair for group in shown["subject"] for pair in group)["commonName"])


async def test_a_client_that_trusts_the_authority_posts(edge: Edge, files: CertificateFiles) -> None:
    """Over TLS 1.3."""
    async with ClientSession(connector=TCPConnector(ssl=files.trust())) as client:
        url = f"{edge.url}/consultations/c-1/events"
        async with client.post(url, data=BODY, headers={"Content-Type": "application/json"}) as answer:
            assert 202 == answer.status
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=files.trust())
    assert "TLSv1.3" == writer.get_extra_info("ssl_object").version()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(("version", "expected"), [(ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_1, False)])
async def test_nothing_older_than_1_2_is_spoken(
    edge: Edge, files: CertificateFiles, version: ssl.TLSVersion, expected: bool
) -> None:
    """1.1 has been broken for years."""
    context = files.trust()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    if expected:
        assert "first" == await name_shown(edge, files, context)
    else:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await name_shown(edge, files, context)


async def test_plain_http_and_garbage_are_not_answered(edge: Edge, files: CertificateFiles) -> None:
    """No client uses plain text by mistake, and the next client is served."""
    for request in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x00" * 100, b""):
        answer = await edge.raw(request, end=True)
        assert b"HTTP" not in answer
    assert "first" == await name_shown(edge, files)


async def test_there_are_no_more_connections_than_there_may_be(files: CertificateFiles) -> None:
    """One more completes its handshake, is told so and is closed."""
    async with running_edge(max_connections=1, **files.settings) as edge:
        answers, first = await asyncio.open_connection("127.0.0.1", edge.port, ssl=files.trust())
        first.write(b"GET /consultations HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await answers.readuntil(b"}")).startswith(b"HTTP/1.1 200 ")
        reader, second = await asyncio.open_connection("127.0.0.1", edge.port, ssl=files.trust())
        second.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"/problems/too-many-connections" in await reader.read()
        for writer in (first, second):
            writer.close()
        await eventually(lambda: shown_again(edge, files))


async def shown_again(edge: Edge, files: CertificateFiles) -> bool:
    try:
        return await name_shown(edge, files) == "first"
    except (OSError, EOFError):
        return False


async def test_a_handshake_that_fails_makes_room(files: CertificateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it fails: garbage, and silence until its time is up."""
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 0.2)
    async with running_edge(max_connections=1, **files.settings) as edge:
        for _ in range(5):
            await edge.raw(b"garbage" * 100)
            await edge.raw(b"")
        await eventually(lambda: shown_again(edge, files))


async def test_a_stop_does_not_wait_for_handshakes(files: CertificateFiles) -> None:
    """It does not wait for a silent client; one that completes its handshake afterwards is disconnected."""
    async with running_edge(**files.settings) as edge:
        _, silent = await asyncio.open_connection("127.0.0.1", edge.port)
        reader, late = await asyncio.open_connection("127.0.0.1", edge.port)
        await name_shown(edge, files)  # those before it have been accepted
        async with asyncio.timeout(5):
            await edge.server.stop()
            with contextlib.suppress(OSError):
                await late.start_tls(files.trust(), server_hostname="127.0.0.1")
                late.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b"" == await reader.read()
        silent.close()
        late.close()


async def test_a_renewed_certificate_is_shown_and_open_connections_go_on(edge: Edge, files: CertificateFiles) -> None:
    """Nothing is restarted; the metric has the new end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=files.trust())

    async def answer() -> bytes:
        writer.write(b"GET /problems/not-found HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return await reader.readuntil(b"}")

    assert (await answer()).startswith(b"HTTP/1.1 200 ")
    await asyncio.to_thread(files.renew, "second")

    async def renewed() -> bool:
        return await name_shown(edge, files) == "second"

    await eventually(renewed)
    assert (await answer()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()
    assert edge.metric("fi_ingest_certificate_expiry_timestamp_seconds", name="second") > 0
    assert 0.0 == edge.metric("fi_ingest_certificate_expiry_timestamp_seconds", name="first")


async def test_a_certificate_with_another_kind_of_key_takes_the_place_of_the_old_one(
    edge: Edge, files: CertificateFiles
) -> None:
    """One context keeps one for each kind, and would go on showing the old one to who prefers it."""
    pair = await asyncio.to_thread(_rsa_pair, "third")
    await asyncio.to_thread(files.renew, "third", pair)
    await asyncio.to_thread(files.ca.write_bytes, pair.certificate)

    async def renewed() -> bool:
        try:
            return await name_shown(edge, files) == "third"
        except ssl.SSLError:
            return False

    await eventually(renewed)


@pytest.mark.parametrize("damage", ["garbage", "foreign key", "gone"])
async def test_a_broken_pair_leaves_the_old_one(files: CertificateFiles, damage: str) -> None:
    """Told by a metric, until it is mended."""
    async with running_edge(**files.settings) as edge:
        key = await asyncio.to_thread(files.key.read_bytes)
        if damage == "gone":
            await asyncio.to_thread(files.key.unlink)
        else:
            foreign = _rsa_pair("other").key if damage == "foreign key" else b"garbage"
            await asyncio.to_thread(files.key.write_bytes, foreign)
        await eventually(lambda: edge.metric("fi_ingest_certificate_broken") == 1.0)
        assert "first" == await name_shown(edge, files)
        await asyncio.to_thread(files.key.write_bytes, key)
        await eventually(lambda: edge.metric("fi_ingest_certificate_broken") == 0.0)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("no key", "FI_TLS_CERT and FI_TLS_KEY: set both"),
        ("missing", "FI_TLS_CERT=.*No such file"),
        ("garbage", "expected a certificate"),
        ("foreign", "expected a certificate and its key"),
        ("password", "expected a certificate.*without a password"),
    ],
)
def test_a_bad_pair_at_the_start_is_a_configuration_error(files: CertificateFiles, wrong: str, expected: str) -> None:
    """With what is wrong; nothing asks on the terminal."""
    settings = files.settings
    if wrong == "no key":
        settings["tls_key"] = ""
    elif wrong == "missing":
        files.certificate.unlink()
    elif wrong == "garbage":
        files.certificate.write_text("garbage")
    elif wrong == "foreign":
        files.key.write_bytes(_rsa_pair("other").key)
    else:
        key = serialization.load_pem_private_key(files.key.read_bytes(), None)
        encryption = serialization.BestAvailableEncryption(b"secret")
        formats = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        files.key.write_bytes(key.private_bytes(*formats, encryption))
    with pytest.raises(ConfigurationError, match=expected):
        make_app(Settings(**settings), MemoryLog().open)


def _rsa_pair(name: str) -> Pair:
    """Make a certificate that signs itself, with a key of another kind."""
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - HOUR)
        .not_valid_after(now + HOUR)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), private)
