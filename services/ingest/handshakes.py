"""Accepts connections for TLS: asyncio tells nobody of those that are still in their handshake, and has any number."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

from services.contract.logs import get_logger
from services.ingest.connections import Connections

#: seconds for a handshake, and for the other side's farewell
HANDSHAKE_SECONDS, FAREWELL_SECONDS = 10.0, 2.0
#: pause when there are no files or no memory for one more, seconds
_PAUSE_SECONDS = 1.0

_log = get_logger("ingest.handshakes")


class TlsListener:
    """Listens on a bound socket from its making on, and serves whoever completes a handshake.

    Args:
        sock: bound.
        context: what is shown.
        connect: makes the protocol of a connection.
        connections: counts those in their handshake.
        backlog: connections that wait to be accepted.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        connect: Callable[[], asyncio.Protocol],
        connections: Connections,
        *,
        backlog: int,
    ) -> None:
        self._sock = sock
        self._context = context
        self._connect = connect
        self._connections = connections
        self._shaking: set[asyncio.Task[None]] = set()
        sock.setblocking(False)
        sock.listen(backlog)
        self._task = asyncio.create_task(self._accept(), name="accept")

    def close(self) -> None:
        """Accept no more; handshakes that have begun go on."""
        self._task.cancel()
        self._sock.close()

    async def abandon(self) -> None:
        """End the handshakes that are left."""
        tasks = {self._task, *self._shaking}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop, said = asyncio.get_running_loop(), ""
        while True:
            try:
                connection, _ = await loop.sock_accept(self._sock)
            except ConnectionError:  # it has gone already
                continue
            except OSError as error:
                if said != str(error):
                    said = str(error)
                    _log.error("ACCEPT_FAILED", reason=said)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            if not self._connections.begin():
                connection.close()
                continue
            connection.setblocking(False)
            task = asyncio.create_task(self._shake(connection))
            self._shaking.add(task)
            task.add_done_callback(self._shaking.discard)
            await asyncio.sleep(0)  # a flood is accepted without a pause; others get their turn

    async def _shake(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._connect,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=FAREWELL_SECONDS,
            )
        except OSError:  # no TLS, another version, nothing in time, gone; the socket is closed
            pass
        finally:
            self._connections.end()
