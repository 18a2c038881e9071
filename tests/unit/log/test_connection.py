"""What a refused connection and a refused subject are told as."""

from __future__ import annotations

import ssl
from pathlib import Path

import nats.errors
import nkeys
import pytest

from services.log.errors import LogForbiddenError
from services.log.jetstream.connection import (
    Connection,
    Refusal,
    public_key,
    read_signer,
    tls_context,
    why_refused,
)
from services.log.settings import LogSettings

SEED = bytes(nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER))
PUBLISH = 'nats: permissions violation for publish to "$js.api.stream.info.fi-events"'
LISTEN = 'nats: Permissions Violation for Subscription to "_INBOX_ingest.abc.*"'


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("WRONG_VERSION_NUMBER", "does not speak TLS from the first byte"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "speaks no TLS 1.3"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "refused the TLS handshake (TLSV13_ALERT_CERTIFICATE_REQUIRED)"),
    ],
)
def test_a_handshake_that_fails_is_told_by_its_reason(reason: str, told: str) -> None:
    """OpenSSL's own words mean nothing to most operators."""
    error = ssl.SSLError(1, "handshake")
    error.reason = reason

    assert told in (why_refused(error, LogSettings(), None) or "")


@pytest.mark.parametrize("error", [ConnectionRefusedError(), TimeoutError(), nats.errors.Error("nats: something")])
def test_what_is_not_about_access_is_not_told_as_such(error: Exception) -> None:
    """A node that is down may come back; that is waited for."""
    assert None is why_refused(error, LogSettings(ca_file="ca.pem"), None)


def test_a_user_is_told_by_its_public_key_and_never_by_its_seed(tmp_path: Path) -> None:
    """Neither in the message nor in the text form of the object."""
    path = tmp_path / "seed"
    path.write_bytes(SEED)
    settings = LogSettings(seed_file=str(path))
    signer = read_signer(settings)
    assert signer is not None

    told = why_refused(nats.errors.Error("nats: 'Authorization Violation'"), settings, signer) or ""

    assert public_key(SEED) in told
    assert SEED.decode() not in told + repr(signer) + repr(settings)


@pytest.mark.parametrize("position", [3, 20, 57])
def test_a_typing_error_in_a_seed_is_noticed(position: int) -> None:
    """Its last two bytes are a checksum, which the nkeys package does not look at."""
    assert public_key(SEED).startswith("U")
    wrong = bytearray(SEED)
    wrong[position] = ord("B") if wrong[position] != ord("B") else ord("C")

    with pytest.raises(ValueError, match="no nkey seed of a user"):
        public_key(bytes(wrong))


def test_a_seed_of_something_else_than_a_user_is_refused() -> None:
    """An account's key signs nothing that a node wants to see."""
    with pytest.raises(ValueError, match="no nkey seed of a user"):
        public_key(bytes(nkeys.encode_seed(bytes(32), nkeys.PREFIX_BYTE_ACCOUNT)))


def test_without_files_there_is_neither_tls_nor_a_user() -> None:
    """The embedded cluster on loopback."""
    assert (None, None) == (tls_context(LogSettings()), read_signer(LogSettings()))


def test_a_refusal_hits_the_request_that_it_is_about() -> None:
    """Subjects come back in lower case; a lost inbox is the end of every request that waits below it."""
    publish, subscription = Refusal.parse(PUBLISH), Refusal.parse(LISTEN)
    assert publish is not None
    assert subscription is not None

    assert publish.hits("$JS.API.STREAM.INFO.fi-events", "_INBOX_ingest")
    assert not publish.hits("$JS.API.STREAM.INFO.fi-dead", "_INBOX_ingest")
    assert subscription.hits("anything", "_INBOX_ingest")
    assert not subscription.hits("anything", "_INBOX_ops")


def test_other_errors_are_no_refusals() -> None:
    """The same callback gets them."""
    assert None is Refusal.parse("nats: maximum payload violation")


def test_a_refusal_says_what_to_do() -> None:
    """Subject and remedy."""
    refusal = Refusal.parse(PUBLISH)
    assert refusal is not None

    told = str(refusal.error())

    assert isinstance(refusal.error(), LogForbiddenError)
    assert "may not publish on $js.api.stream.info.fi-events" in told
    assert "FI_NATS_SEED_FILE" in told


async def test_listeners_hear_every_refusal_until_they_stop_listening() -> None:
    """Also one that is in the list of violations already: each request waits for itself."""
    client = Connection(LogSettings(), pytest.fail)
    heard: list[Refusal] = []
    refusal = Refusal("publish", "a")
    stop = client.listen(heard.append)

    client.note(refusal, "a refused")
    client.note(refusal, "a refused")
    stop()
    stop()
    client.note(refusal, "a refused")

    assert [refusal, refusal] == heard
    assert ["a refused"] == client.violations
