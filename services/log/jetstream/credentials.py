"""What a process shows to the cluster, and what it wants to see: an nkey, and certificates of a known authority."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nkeys
from nats.aio.client import Client

from fiq.errors import ConfigurationError
from services.log.settings import LogSettings
from services.log.status import CertificateExpiry

CA_VARIABLE = "FI_NATS_CA_FILE"
SEED_VARIABLE = "FI_NATS_SEED_FILE"


@dataclass(frozen=True, slots=True)
class Signer:
    """The key of a user; its text form shows the public half only."""

    _pair: nkeys.KeyPair
    public_key: str

    def __repr__(self) -> str:
        return f"Signer({self.public_key})"

    def sign(self, nonce: str) -> bytes:
        """Return the signature of a server's *nonce*, in base64."""
        return base64.b64encode(self._pair.sign(nonce.encode()))


def tls_context(settings: LogSettings) -> ssl.SSLContext | None:
    """Return what certificates are checked with, or None when the settings ask for no TLS.

    Raises ConfigurationError: the authority's file is missing, unreadable, or no certificate.
    """
    if not settings.ca_file:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
    except ssl.SSLError:
        raise _problem(
            CA_VARIABLE, settings.ca_file, "no certificate in PEM form; it is ca.pem of `fiq init`"
        ) from None
    except OSError as error:
        raise _problem(CA_VARIABLE, settings.ca_file, f"{error.strerror}; it is ca.pem of `fiq init`") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def read_signer(settings: LogSettings) -> Signer | None:
    """Return the user's key, or None when the settings name none.

    Raises ConfigurationError: the seed's file is missing, unreadable, or no seed.
    """
    if not settings.seed_file:
        return None
    try:
        seed = Path(settings.seed_file).read_bytes()
    except OSError as error:
        remedy = "it is users/<role>.seed of `fiq init`, and belongs to whom this process runs as (--owner)"
        raise _problem(SEED_VARIABLE, settings.seed_file, f"{error.strerror}; {remedy}") from None
    try:
        public = public_key(seed)
    except ValueError as error:
        raise _problem(SEED_VARIABLE, settings.seed_file, str(error)) from None
    return Signer(nkeys.from_seed(bytearray(seed.strip())), public)


def public_key(seed: bytes) -> str:
    """Return the public key that belongs to *seed*. Raises ValueError: it is no seed of a user."""
    text = seed.strip()
    try:
        # nkeys compares no checksum: what was typed wrong would be another user's valid key
        prefix, raw = nkeys.decode_seed(text)
        good = prefix == nkeys.PREFIX_BYTE_USER and nkeys.encode_seed(bytes(raw), prefix) == text
    except (nkeys.NkeysError, ValueError):
        good = False
    if not good:
        raise ValueError("no nkey seed of a user, which begins with SU and has 58 characters")
    return bytes(nkeys.from_seed(bytearray(text)).public_key).decode("ascii")


def _problem(variable: str, path: str, what: str) -> ConfigurationError:
    return ConfigurationError([f"{variable}={path}: {what}"])


def certificates(nc: Client) -> list[CertificateExpiry]:
    """Return the certificates of the connection *nc*; none when it is not encrypted."""
    transport = getattr(nc, "_transport", None)  # nats-py offers no way to its socket
    writer = getattr(transport, "_io_writer", None)
    tls: ssl.SSLObject | None = writer.get_extra_info("ssl_object") if writer is not None else None
    node = tls.getpeercert() if tls is not None else None
    if tls is None or not node:
        return []
    found = [_validity("node", node)]
    # the context knows the authorities that were loaded from the file; of those only the one that signed matters
    found += [_validity("ca", ca) for ca in tls.context.get_ca_certs() if ca.get("subject") == node.get("issuer")]
    return found


def _validity(kind: str, certificate: Mapping[str, Any]) -> CertificateExpiry:
    attributes = dict(pair for group in certificate.get("subject", ()) for pair in group)
    return CertificateExpiry(kind, attributes.get("commonName", ""), ssl.cert_time_to_seconds(certificate["notAfter"]))
