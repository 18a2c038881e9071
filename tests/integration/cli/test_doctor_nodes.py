"""`fiq doctor` on single nodes: each thing is broken for real where that is possible, and found."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from services.cli import monitoring
from services.cli.doctor import cluster
from services.cli.embedded.processes import LOOPBACK, free_ports
from services.log.findings import Finding, Level
from tests.support.broker import plain_server
from tests.support.findings import fine, only
from tests.support.polling import eventually_sync

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


# -- greetings and certificates ---------------------------------------------------------------------------------------


def greeted(url: str) -> cluster.ServerInfo:
    greeting = cluster.server_info(url.removeprefix("nats://"))
    assert greeting is not None
    return greeting


def test_a_node_that_does_not_answer_is_an_error() -> None:
    """No process listens there, or one that is not a nats-server."""
    address = f"{LOOPBACK}:{free_ports(1)[0]}"
    assert cluster.server_info(address) is None
    assert address in only(cluster.check_servers([address], [], 100), Level.ERROR).what
    with _speaker(b"220 mail.example ESMTP\r\n") as other:
        assert cluster.server_info(other) is None


def test_a_node_that_answered_is_not_missed_under_a_name_of_its_own_network() -> None:
    """On the host of a compose project nodes answer at their published ports and tell names of containers."""
    told = {"server_name": "n1.invalid", "connect_urls": ["n1.invalid:4222", "n2.invalid:4222"]}
    with _speaker(b"INFO " + orjson.dumps(told) + b"\r\n") as address:
        expected, found = cluster.find_servers([f"nats://{address}"])
    assert [address, "n2.invalid:4222"] == expected
    assert [address] == [one.address for one in found]


def test_an_old_server_is_an_error_and_two_versions_are_a_warning() -> None:
    """An old server cannot be installed here, so one is played: it greets as 2.10 does."""
    info = {"version": "2.10.4", "max_payload": 1 << 21}
    with _speaker(b"INFO " + orjson.dumps(info) + b"\r\n") as address:
        old = cluster.server_info(address)
    assert old is not None
    assert "2.14" in only(cluster.check_servers([address], [old], 100), Level.ERROR).meaning
    newer = [cluster.ServerInfo("a", {**info, "version": v}, b"") for v in ("2.14.1", "2.15.1")]
    assert "finish the upgrade" in only(cluster.check_servers([], newer, 100), Level.WARNING).action


def test_a_max_payload_below_the_largest_event_is_an_error(tmp_path: Path) -> None:
    """Ingest would refuse to start; the node shows its limit before a login."""
    with plain_server(tmp_path, "max_payload: 64KB") as url:
        greeting = greeted(url)
    fine(cluster.check_servers([greeting.address], [greeting], 1000))
    assert (
        "FI_MAX_EVENT_BYTES" in only(cluster.check_servers([greeting.address], [greeting], 1 << 20), Level.ERROR).action
    )


@pytest.mark.parametrize(
    ("days", "level", "text"),
    [
        ((-400, -1), Level.ERROR, "expired on"),
        ((-400, 3), Level.ERROR, "expires on"),
        ((-400, 20), Level.WARNING, "expires on"),
        ((1, 400), Level.ERROR, "is valid only from"),
        ((-1, 400), Level.OK, "is good until"),
    ],
)
def test_a_nodes_certificate_is_judged_by_its_end(
    tmp_path: Path, days: tuple[int, int], level: Level, text: str
) -> None:
    """The one that the running node shows, whatever is in its folder; this needs no login."""
    _make_certificate(tmp_path, *days)
    tls = f'tls {{ cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem", min_version: "1.3" }}'
    with plain_server(tmp_path, tls) as url:
        greeting = greeted(url)
    assert greeting.certificate
    (finding,) = cluster.check_certificates([greeting], "", time.time())
    assert (level, "certificates") == (finding.level, finding.check)
    assert text in finding.what
    (_, authority) = cluster.check_certificates([greeting], str(tmp_path / "cert.pem"), time.time())
    assert level is authority.level


def test_a_certificate_that_ends_is_renewed_by_a_command_and_an_authority_by_hand(tmp_path: Path) -> None:
    """`fiq init` makes the nodes' certificates anew, and never another authority."""
    _make_certificate(tmp_path, -400, 3)
    shown = ssl.PEM_cert_to_DER_cert((tmp_path / "cert.pem").read_text())
    greeting = cluster.ServerInfo("a:4222", {}, shown)
    node, authority = cluster.check_certificates([greeting], str(tmp_path / "cert.pem"), time.time())
    assert "fiq init FOLDER --rotate certificates" in node.action
    assert "another authority" in authority.action


def test_a_node_that_wants_tls_before_anything_is_greeted_too(tmp_path: Path) -> None:
    """With handshake_first it sends nothing before the handshake."""
    _make_certificate(tmp_path, -1, 400)
    pair = f'cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem"'
    with plain_server(tmp_path, f"tls {{ {pair}, handshake_first: true, timeout: 5 }}") as url:
        greeting = greeted(url)
    assert greeting.certificate
    assert greeting.info["tls_required"]


def test_a_missing_or_broken_authority_is_an_error(tmp_path: Path) -> None:
    """FI_NATS_CA_FILE names a file that is not there, or something else."""
    assert "No such file" in only(cluster.check_certificates([], str(tmp_path / "ca.pem"), 0.0), Level.ERROR).what
    (tmp_path / "ca.pem").write_text("hello")
    assert "no certificate" in only(cluster.check_certificates([], str(tmp_path / "ca.pem"), 0.0), Level.ERROR).what


def test_plain_text_is_fine_on_loopback_only(tmp_path: Path) -> None:
    """Beyond it anyone on the network path can read along."""
    with plain_server(tmp_path) as url:
        greeting = greeted(url)
    fine(cluster.check_certificates([greeting], "", time.time()))
    elsewhere = cluster.ServerInfo("192.0.2.1:4222", greeting.info, b"")
    assert "plain text" in only(cluster.check_certificates([elsewhere], "", time.time()), Level.WARNING).what


# -- the monitoring port ----------------------------------------------------------------------------------------------


@contextmanager
def monitored_server(folder: Path, jetstream: str) -> Iterator[str]:
    """Run a node with a JetStream configuration and yield the URL of its monitoring port."""
    port = free_ports(1)[0]
    block = f'jetstream {{ store_dir: "{folder}/js", {jetstream} }}' if jetstream else ""
    with plain_server(folder, f'server_name: n1\nhttp: "{LOOPBACK}:{port}"\n{block}'):
        url = f"http://{LOOPBACK}:{port}"
        eventually_sync(lambda: monitoring.get(url, "/healthz")[0] == 200)
        yield url


def examined(url: str, offset: float = 0.0) -> Iterator[Finding]:
    """Look at the node that monitors at *url*."""
    found, silent = cluster.from_ports([url])
    yield from cluster.unreachable_ports(silent, users=True)
    yield from cluster.check_nodes(found, offset)


@pytest.mark.parametrize(("users", "expected"), [(True, "as the user `ops`"), (False, "look at its node")])
def test_a_port_that_does_not_answer_is_unknown(users: bool, expected: str) -> None:
    """A `fiq up` has no users, so its operator is not sent to one."""
    _, silent = cluster.from_ports([f"http://{LOOPBACK}:{free_ports(1)[0]}"])
    assert expected in only(cluster.unreachable_ports(silent, users=users), Level.UNKNOWN).action


def test_ids_that_the_nodes_have_no_memory_for_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes hold the same ids, so they are killed together; a node without a limit says nothing."""
    monkeypatch.setenv("GOMEMLIMIT", "920MiB")
    with monitored_server(tmp_path, "max_file_store: 1GB") as url:
        found, _ = cluster.from_ports([url])
    fine(cluster.check_node_memory(found, 1_000_000, 120))
    finding = only(cluster.check_node_memory(found, 2_000_000, 120), Level.WARNING)
    assert (
        "2,000,000 ids in 120 s (16,667 events/s) bring a node to 1.3 GB; GOMEMLIMIT of n1 is 964.7 MB" == finding.what
    )
    assert "nothing limits" in only(cluster.check_node_memory(found, 0, 600), Level.WARNING).what
    monkeypatch.delenv("GOMEMLIMIT")
    with monitored_server(tmp_path, "max_file_store: 1GB") as url:
        found, _ = cluster.from_ports([url])
    assert [] == list(cluster.check_node_memory(found, 10**9, 120))


def test_a_sync_interval_is_an_error_unless_it_is_always(tmp_path: Path) -> None:
    """With nats-server's default of two minutes acknowledged events do not survive a power cut."""
    with monitored_server(tmp_path, "max_file_store: 1GB") as url:
        finding = only(examined(url), Level.ERROR)
    assert ("sync_interval", "n1 syncs every 120 s only") == (finding.check, finding.what)
    with monitored_server(tmp_path, "max_file_store: 1GB, sync_interval: always") as url:
        fine(examined(url))


def test_a_node_without_jetstream_is_an_error(tmp_path: Path) -> None:
    """It takes clients and holds nothing."""
    with monitored_server(tmp_path, "") as url:
        assert "has no JetStream" in only(examined(url), Level.ERROR).what


def test_a_max_file_store_beyond_the_disk_is_an_error(tmp_path: Path) -> None:
    """A node whose disk is full turns JetStream off until it is restarted."""
    with monitored_server(tmp_path, "max_file_store: 9000TB, sync_interval: always") as url:
        assert "below the size of the disk" in only(examined(url), Level.ERROR).action


def test_a_monitoring_port_out_of_reach_is_unknown_and_no_error() -> None:
    """It is on an inner network, as it should be."""
    url = f"http://{LOOPBACK}:{free_ports(1)[0]}"
    finding = only(examined(url), Level.UNKNOWN)
    assert f"the monitoring port {url} is not reachable" == finding.what
    assert ["http://n1:8222", "http://n2:8222"] == cluster.monitoring_urls([], ["n1:4222", "n1:4223", "n2:4222"])


def test_a_node_that_takes_clients_and_does_not_answer_is_unknown() -> None:
    """The others answered; that it was not asked would look as if it were fine."""
    assert "n2 did not report its state" == only(cluster.silent_nodes({"n2"}), Level.UNKNOWN).what


@pytest.mark.parametrize(
    ("offset", "level"), [(0.0, Level.OK), (-5.0, Level.WARNING), (5.0, Level.WARNING), (3600.0, Level.ERROR)]
)
def test_a_clock_that_is_off_is_told_with_its_direction(tmp_path: Path, offset: float, level: Level) -> None:
    """The clock of this machine cannot be changed here, so it is taken to be off."""
    with monitored_server(tmp_path, "max_file_store: 1GB, sync_interval: always") as url:
        (finding,) = [one for one in examined(url, offset) if one.check == "clocks"]
    assert level is finding.level
    if level is not Level.OK:
        assert ("behind" if offset > 0 else "ahead") in finding.what


# -- support ----------------------------------------------------------------------------------------------------------


@contextmanager
def _speaker(text: bytes) -> Iterator[str]:
    """Listen on a port, send *text* to each client, and yield the address."""
    with socket.create_server((LOOPBACK, 0)) as listener:

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(text)

        thread = threading.Thread(target=speak)
        thread.start()
        yield f"{LOOPBACK}:{listener.getsockname()[1]}"
        thread.join()


def _make_certificate(folder: Path, begins: int, ends: int) -> None:
    """Make a certificate that signs itself, valid from so many days from now to so many."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "n1")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + begins * DAY)
        .not_valid_after(NOW + ends * DAY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("n1")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    (folder / "key.pem").chmod(0o600)
