"""The certificate that ingest shows to its clients, from two files that are read again when they change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contract.errors import ConfigurationError

CERTIFICATE_VARIABLE, KEY_VARIABLE = "FI_TLS_CERT", "FI_TLS_KEY"


@dataclass(frozen=True, slots=True)
class Shown:
    """What is told of a certificate: its common name, and its end in Unix time."""

    name: str
    expires: float


class Certificate:
    """A certificate with its key, and the context of a listener that shows it.

    Each handshake takes the newest context: it is chosen when the client's first message is here. Loading into one
    context would not do, as that keeps a certificate for each kind of key, and would show the old one beside the new.

    Attributes:
        context: for the listener, for as long as that lives.
        shown: of the certificate that new connections see.
    """

    def __init__(self, certificate: str, key: str) -> None:
        self._certificate = certificate
        self._key = key
        self.shown = Shown("", 0.0)
        self.context = _context()
        self._newest = self.context
        self.context.sni_callback = self._choose

    def load(self) -> None:
        """Read the files; connections from now on see what they hold, and those that there are go on.

        Raises:
            ConfigurationError: one of them cannot be read, or they do not belong together; nothing has changed.
        """
        context = _context()
        try:
            # an encrypted key would ask on the terminal
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
            shown = _read(Path(self._certificate).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigurationError([self._problem(error)]) from None
        self._newest = context
        self.shown = shown

    def _choose(self, connection: ssl.SSLObject, _: str, __: ssl.SSLContext) -> None:
        connection.context = self._newest

    def _problem(self, error: Exception) -> str:
        for variable, path in ((CERTIFICATE_VARIABLE, self._certificate), (KEY_VARIABLE, self._key)):
            try:
                Path(path).read_bytes()
            except OSError as unreadable:
                return f"{variable}={path}: {unreadable.strerror or unreadable}"
        reason = error.reason if isinstance(error, ssl.SSLError) else None
        where = f"{CERTIFICATE_VARIABLE}={self._certificate}, {KEY_VARIABLE}={self._key}"
        expected = "expected a certificate and its key, both PEM, the key without a password"
        return f"{where}: {expected}{'' if not reason else f' ({reason})'}"


def check_both(certificate: str, key: str) -> bool:
    """Say whether TLS is wanted.

    Raises:
        ConfigurationError: one of the two is missing.
    """
    if bool(certificate) != bool(key):
        raise ConfigurationError([f"{CERTIFICATE_VARIABLE} and {KEY_VARIABLE}: set both, or none for plain HTTP"])
    return bool(certificate)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _read(pem: bytes) -> Shown:
    from cryptography import x509  # who speaks plain HTTP need not wait for it

    found: Any = x509.load_pem_x509_certificates(pem)[0]
    names = found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return Shown(str(names[0].value) if names else "", found.not_valid_after_utc.timestamp())
