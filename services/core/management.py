"""The management endpoints of every service: ``/healthz``, ``/readyz`` and ``/metrics``.

``/healthz`` answers 503 when the event loop is blocked. ``/readyz`` answers 503, with the reasons and the process id,
while the service cannot work. ``/metrics`` is the Prometheus text format.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from fiq.errors import BindError, FiqError
from services.core.lifecycle import background_task

#: between two ticks of the event loop, seconds
TICK_SECONDS = 0.5
#: a tick that is late by more than this means that the loop is blocked, seconds
OVERDUE_SECONDS = 5.0
#: for answers that are being written when the listener closes, seconds
_FLUSH_SECONDS = 0.5

#: returns the reasons why the service is not ready; none means ready
ReadinessCheck = Callable[[], Awaitable[list[str]]]


class Heartbeat:
    """Measures how late the event loop is; tick with :meth:`run`."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    @property
    def late_seconds(self) -> float:
        """Seconds by which the next tick is late."""
        return max(0.0, time.monotonic() - self._last - TICK_SECONDS)

    async def run(self) -> None:
        """Tick for ever."""
        while True:
            self._last = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)


class CachedCheck:
    """Calls *check* at most once in *seconds*, and gives up after *timeout* seconds.

    So each of many probes gets its answer in time, and the log gets one question.
    """

    def __init__(self, check: ReadinessCheck, *, seconds: float, timeout: float) -> None:
        self._check = check
        self._seconds = seconds
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._reasons: list[str] = []
        self._expires = -math.inf

    async def __call__(self) -> list[str]:
        """Return the reasons why the service is not ready."""
        async with self._lock:
            if time.monotonic() >= self._expires:
                self._reasons = await self._ask()
                self._expires = time.monotonic() + self._seconds
            return self._reasons

    async def _ask(self) -> list[str]:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._check()
        except TimeoutError:
            return [f"no answer within {self._timeout:g} s"]
        except FiqError as error:
            return [str(error)]


def bind(host: str, port: int, variables: str) -> socket.socket:
    """Return a socket bound to *host* and *port* that does not listen yet, so clients are refused.

    Args:
        host: an address of this host.
        port: 0 takes a free one.
        variables: the settings of *host* and *port*, for the message.

    Raises BindError: the port is taken, or the address belongs to another host.
    """
    sock: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise BindError(f"cannot listen on {host}:{port} ({variables}): {error.strerror or error}") from error
    return sock


def add_management_routes(app: web.Application, registry: CollectorRegistry, ready: ReadinessCheck) -> None:
    """Add the three endpoints to *app*.

    Args:
        app: the aiohttp application.
        registry: of ``/metrics``.
        ready: called for each ``/readyz``; must be quick.
    """
    heartbeat = Heartbeat()

    async def healthz(_: web.Request) -> web.Response:
        late = heartbeat.late_seconds
        alive = late < OVERDUE_SECONDS
        status = "ok" if alive else f"the event loop was blocked for {late:.1f} s"
        return web.json_response({"status": status}, status=200 if alive else 503)

    async def readyz(_: web.Request) -> web.Response:
        reasons = await ready()
        body = {"status": "not ready" if reasons else "ready", "reasons": reasons, "pid": os.getpid()}
        return web.json_response(body, status=503 if reasons else 200)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def beat(_: web.Application) -> AsyncIterator[None]:
        async with background_task(heartbeat.run(), "heartbeat"):
            yield

    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    app.cleanup_ctx.append(beat)


@asynccontextmanager
async def serve_management(
    sock: socket.socket, registry: CollectorRegistry, ready: ReadinessCheck, variables: str
) -> AsyncIterator[None]:
    """Serve the three endpoints on a listener of their own; *sock* is closed at the end.

    They have no authentication, and show nothing of events.

    Args:
        sock: bound, see :func:`bind`.
        registry: of ``/metrics``.
        ready: called for each ``/readyz``.
        variables: the settings of the address, for the message.

    Raises BindError: another process took the port in the meantime.
    """
    app = web.Application()
    add_management_routes(app, registry, ready)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_FLUSH_SECONDS)
    await runner.setup()
    try:
        try:
            await web.SockSite(runner, sock).start()
        except OSError as error:
            raise BindError(f"cannot listen ({variables}): {error.strerror or error}") from error
        yield
    finally:
        await runner.cleanup()
        sock.close()
