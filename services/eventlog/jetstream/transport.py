"""A TCP transport whose end is an OSError on every event loop.

uvloop raises a RuntimeError when a closed transport is written to; asyncio's own loop does not. nats-py 2.16 expects
OSError: a RuntimeError in the handshake of a reconnect ends its reconnecting task for good, and one in ``close()`` ends
the process with a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nats.aio.transport import TcpTransport


class LoopNeutralTransport(TcpTransport):
    """The stock transport, but a write to a closed connection is a ConnectionResetError."""

    def write(self, payload: Any) -> None:
        """Buffer *payload*."""
        with _closed_is_reset():
            super().write(payload)  # type: ignore[no-untyped-call]

    def writelines(self, payload: Any) -> None:
        """Buffer all of *payload*."""
        with _closed_is_reset():
            super().writelines(payload)  # type: ignore[no-untyped-call]

    async def drain(self) -> None:
        """Wait until there is room in the buffer."""
        with _closed_is_reset():
            await super().drain()  # type: ignore[no-untyped-call]


@contextmanager
def _closed_is_reset() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionResetError("the connection is closed") from error
