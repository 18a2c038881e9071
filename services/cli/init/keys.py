"""The keys of a deployment: its own certificate authority and the certificates it signs, and the CURVE keys of ZeroMQ.

ECDSA on P-256 throughout: nats-server, OpenSSL and Go read it, and a TLS 1.3 handshake takes a millisecond. A node's
certificate is valid for clients and servers, because a node is both on a route.

CURVE keys (``fiq init FOLDER --curve NAMES``) are in the format of ``zmq.auth``. The persisters share one pair; each
name is a client with a pair of its own. ``clients/`` has the public keys that persisters let in: a key whose file is
removed from there is refused after their next start.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.cli.errors import CommandError, UsageError
from services.cli.init.files import FileOwner, Layout, Secrets

#: validity of the authority; replacing it means to change every process
CA_LIFETIME = timedelta(days=3650)
#: validity of a node's certificate: renewing it once a year is an exercise, not an emergency
NODE_LIFETIME = timedelta(days=398)
#: the machines' clocks may differ by this much
_BACKDATED = timedelta(hours=1)

_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs certificates of nodes with the authority's *pair*.

    Raises ValueError: it is not a certificate and its key.
    """

    def __init__(self, pair: Pair) -> None:
        self._certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = serialization.load_pem_private_key(pair.key, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._certificate.public_key():
            raise ValueError("the key does not belong to the certificate")
        self._key = key

    @property
    def not_after(self) -> datetime:
        """When the authority's own certificate expires."""
        return self._certificate.not_valid_after_utc

    def sign(self, name: str, hosts: Sequence[str], *, start: datetime, lifetime: timedelta = NODE_LIFETIME) -> Pair:
        """Make a key and a certificate for the node *name*.

        Args:
            name: its common name, and the first of its host names.
            hosts: further names and addresses.
            start: of its validity.
            lifetime: of the certificate; never longer than the authority's own.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        end = min(start + lifetime, self.not_after)
        builder = (
            _builder(name, key.public_key(), start, end)
            .issuer_name(self._certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName([_general_name(host) for host in (name, *hosts)]), critical=False
            )
            .add_extension(_authority_key(self._certificate), critical=False)
        )
        return _pair(builder.sign(self._key, hashes.SHA256()), key)

    def signed(self, certificate: bytes) -> bool:
        """Return whether this authority signed *certificate* (PEM)."""
        try:
            x509.load_pem_x509_certificate(certificate).verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True


def make_authority(name: str, *, now: datetime) -> Pair:
    """Make the authority of one deployment."""
    key = ec.generate_private_key(ec.SECP256R1())
    start = now - _BACKDATED
    builder = (
        _builder(name, key.public_key(), start, start + CA_LIFETIME)
        .issuer_name(_name(name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    return _pair(builder.sign(key, hashes.SHA256()), key)


def start_of(now: datetime) -> datetime:
    """Return the start of validity of a certificate made *now*, for machines whose clocks are behind."""
    return now - _BACKDATED


def names_in(certificate: bytes) -> list[str]:
    """Return the names and addresses in *certificate* (PEM), in its order."""
    parsed = x509.load_pem_x509_certificate(certificate)
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def belong_together(pair: Pair) -> bool:
    """Return whether key and certificate of *pair* belong together."""
    try:
        key = serialization.load_pem_private_key(pair.key, None)
        return key.public_key() == x509.load_pem_x509_certificate(pair.certificate).public_key()
    except (ValueError, TypeError):
        return False


def check_host(host: str) -> str:
    """Return *host*, an address normalised. Raises ValueError: it is neither a host name nor an address."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        if _HOST.fullmatch(host) is None or len(host) > 253:
            raise ValueError(f"{host!r} is neither a host name nor an address") from None
        return host


def _builder(name: str, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start.astimezone(UTC))
        .not_valid_after(end.astimezone(UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _authority_key(certificate: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), private)


# -- CURVE keys -------------------------------------------------------------------------------------------------------

SERVER = "server"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)


def make_curve_keys(folder: Path, owner: FileOwner, names: Sequence[str]) -> list[str]:
    """Make the keys that are missing in *folder*; return what was done, a line each.

    Raises UsageError: a name is malformed; CommandError: a public key has lost its file.
    """
    for name in names:
        if _NAME.fullmatch(name) is None or name == SERVER:
            raise UsageError(f"--curve {name}: names are lower-case letters, digits and hyphens, but not {SERVER}")
    layout = Layout(folder.absolute())
    secrets = Secrets(layout.folder, lambda path: FileOwner.myself() if path == layout.folder else owner)
    keys = layout.secrets / "zmq"
    clients = keys / "clients"
    for path in (layout.folder, layout.secrets, keys, clients):
        secrets.folder(path)
    with secrets.alone(layout.secrets):
        secrets.put(layout.ignore, b"*\n")
        _ensure_pair(secrets, keys / f"{SERVER}.key_secret", keys / f"{SERVER}.key")
        for name in names:
            _ensure_pair(secrets, keys / f"{name}.key_secret", clients / f"{name}.key")
    return secrets.changes


def _ensure_pair(secrets: Secrets, secret: Path, public: Path) -> None:
    import zmq  # slow to import, and most of fiq init needs none of it

    if not secret.exists():
        if public.exists():
            raise CommandError(f"{public} exists, but {secret} does not: remove it to make a new pair")
        pair = zmq.curve_keypair()
        secrets.create(secret, _certificate(*pair))
        secrets.create(public, _certificate(pair[0]))
    for path in (secret, public):
        if path.exists():  # a public key is removed to shut its client out
            secrets.mend(path)


def _certificate(public: bytes, secret: bytes | None = None) -> bytes:
    lines = ["#  Made by fiq init.", "metadata", "curve", f'    public-key = "{public.decode()}"']
    if secret is not None:
        lines.append(f'    secret-key = "{secret.decode()}"')
    return "\n".join([*lines, ""]).encode()
