"""Why a node does not let a process in, in one sentence that says what to do."""

from __future__ import annotations

import ssl

from services.eventlog.jetstream.credentials import CA_VARIABLE, SEED_VARIABLE, Signer
from services.eventlog.settings import LogSettings

#: OpenSSL's X509_V_ERR_…
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_NAMES = frozenset({62, 64})
#: OpenSSL's reasons: what answered was no TLS at all, or an older version of it
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"})
_OLD_TLS = frozenset({"TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL"})

_AUTHORIZATION = "authorization violation"


def why_refused(error: Exception, settings: LogSettings, signer: Signer | None) -> str | None:
    """Return why a node refused a connection, or None when *error* has nothing to do with access.

    Args:
        error: what the attempt to connect raised.
        settings: that it was made with.
        signer: the user, when there is one.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate(error, settings)
    if isinstance(error, ssl.SSLError):
        return _handshake(error)
    if _AUTHORIZATION not in str(error).lower():
        return None
    if signer is None:
        return f"it wants to know who is there: set {SEED_VARIABLE} to the seed of this service's user"
    return (
        f"it does not know the user of {SEED_VARIABLE}={settings.seed_file} (public key {signer.public_key}): take the "
        "seed of this deployment, and reload the nodes after a rotation"
    )


def _certificate(error: ssl.SSLCertVerificationError, settings: LogSettings) -> str:
    if error.verify_code == _EXPIRED:
        return "its certificate has expired: run `fiq init FOLDER --rotate certificates` and reload the node"
    if error.verify_code == _NOT_YET_VALID:
        return "its certificate is not valid yet: compare the clocks of the machines"
    if error.verify_code in _OTHER_NAMES:
        return (
            f"its certificate has other names ({error.verify_message}): connect to one of them, or renew it with "
            "`fiq init FOLDER --rotate certificates --hosts …`"
        )
    if not settings.ca_file:
        return f"it speaks TLS: set {CA_VARIABLE} to ca.pem of the deployment"
    return (
        f"its certificate is not from the authority in {CA_VARIABLE}={settings.ca_file}: take ca.pem of the deployment"
    )


def _handshake(error: ssl.SSLError) -> str:
    reason = error.reason or type(error).__name__
    if reason in _NO_TLS:
        return f"it does not speak TLS from the first byte: correct its nats.conf, or unset {CA_VARIABLE}"
    if reason in _OLD_TLS:
        return "it speaks no TLS 1.3: correct the tls block of its nats.conf"
    return f"it refused the TLS handshake ({reason}): look at its log"
