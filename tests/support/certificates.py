"""A certificate for ingest, in files, and the authority that clients trust."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from services.cli.init.keys import Authority, Pair, make_authority

HOUR = timedelta(hours=1)


class CertificateFiles:
    """A certificate, its key, and the authority that clients trust."""

    def __init__(self, folder: Path) -> None:
        made = make_authority("test", now=datetime.now(UTC))
        self._authority = Authority(made)
        self.ca, self.certificate, self.key = folder / "ca.pem", folder / "tls.pem", folder / "tls.key"
        self.ca.write_bytes(made.certificate)
        self.renew("first")

    def renew(self, name: str, pair: Pair | None = None) -> None:
        """Write another pair as an operator who renews certificates does: the key first."""
        pair = pair or self._authority.sign(name, ["127.0.0.1"], start=datetime.now(UTC) - HOUR)
        self.key.write_bytes(pair.key)
        self.certificate.write_bytes(pair.certificate)

    @property
    def settings(self) -> dict[str, Any]:
        return {"tls_cert": str(self.certificate), "tls_key": str(self.key)}

    def trust(self) -> ssl.SSLContext:
        """What a client trusts."""
        return ssl.create_default_context(cafile=str(self.ca))
