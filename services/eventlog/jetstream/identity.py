"""Who a connection is, and whom it trusts: asked at each connect, because both may be renewed while a process runs."""

from __future__ import annotations

from typing import Any

import nats.errors

from services.contract.errors import ConfigurationError
from services.contract.logs import get_logger
from services.eventlog.jetstream.credentials import Signer, read_signer, tls_context
from services.eventlog.jetstream.refusals import RefusalAwareClient
from services.eventlog.settings import LogSettings

#: what a node says to a connection whose user was changed or removed
_USER_GONE = "authorization violation"

_log = get_logger("eventlog.connection")


class IdentifiedClient(RefusalAwareClient):
    """A client that signs with the seed as it is now, and speaks TLS from the first byte where an authority is named.

    Args:
        settings: name the files.
    """

    def __init__(self, settings: LogSettings) -> None:
        super().__init__()
        self._settings = settings
        self._signer: Signer | None = None
        self._established = False
        self._told = ""

    def credentials(self) -> dict[str, Any]:
        """Return the options of the first connect.

        Raises:
            ConfigurationError: a file cannot be used.
        """
        self._signer = read_signer(self._settings)
        options: dict[str, Any] = {} if self._signer is None else {"signature_cb": self._sign}
        if (context := tls_context(self._settings)) is not None:
            options |= {"tls": context, "tls_handshake_first": True}
        return options

    def tell(self, reason: str) -> None:
        """Log why a node does not let us in, once: it is tried four times a second."""
        if reason != self._told:
            self._told = reason
            _log.error("LOG_ACCESS_REFUSED", reason=reason)

    def forget(self) -> None:
        """Begin anew after a connect that succeeded."""
        super().forget()
        self._told = ""

    @property
    def _writer(self) -> Any:
        return getattr(self._transport, "_io_writer", None)  # nats-py offers no way to its socket

    # -- what nats-py asks at each connect ----------------------------------------------------------------------------

    def _connect_command(self) -> bytes:
        """Introduce ourselves with the seed as it is now: it may have been rotated since the last connect."""
        if self._established:
            try:
                self._signer = read_signer(self._settings)
            except ConfigurationError as error:  # it is being written, or gone: go on with the one we know
                self.tell(str(error))
        self._public_nkey = None if self._signer is None else self._signer.public_key
        return super()._connect_command()

    def _sign(self, nonce: str) -> bytes:
        if self._signer is None:
            raise nats.errors.Error("no key to sign with")
        return self._signer.sign(nonce)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Learn of other servers; each has to show its own address in its certificate, and not the first one's."""
        await super()._process_info(info, initial_connection)
        for server in self._server_pool:
            server.tls_name = None
        if initial_connection and self._settings.ca_file:
            self._announce_tls()

    def _announce_tls(self) -> None:
        """Tell the protocol, which nats-py makes by hand, that it is over TLS: the loop warns of each end otherwise."""
        protocol = self._writer.transport.get_protocol() if self._writer is not None else None
        if protocol is not None:  # the connection may have ended already
            protocol._over_ssl = True

    async def _process_err(self, err_msg: str) -> None:
        """Come back when a reload of the node has thrown this user out: the seed's file may hold its next one."""
        if self._established and _USER_GONE in err_msg:
            await self._process_op_err(nats.errors.AuthorizationError())
            return
        await super()._process_err(err_msg)
