"""Until when the certificates behind a connection are valid, as the connection itself shows them."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nats.aio.client import Client


@dataclass(frozen=True, slots=True)
class Validity:
    """A certificate and its end.

    Attributes:
        kind: ``node`` for the one that the connected node showed, ``ca`` for the authority that signed it.
        name: its common name.
        expires: Unix time.
    """

    kind: str
    name: str
    expires: float


def certificates(nc: Client) -> list[Validity]:
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


def _validity(kind: str, certificate: Mapping[str, Any]) -> Validity:
    attributes = dict(pair for group in certificate.get("subject", ()) for pair in group)
    return Validity(kind, attributes.get("commonName", ""), ssl.cert_time_to_seconds(certificate["notAfter"]))
