"""The first steps of a service: reach the cluster within a bounded time, and make sure that the streams exist."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from services.contract.errors import TransientError
from services.contract.logs import get_logger
from services.eventlog.errors import StartupError
from services.eventlog.jetstream.connection import Connection, close, connect
from services.eventlog.jetstream.names import Role
from services.eventlog.jetstream.provision import DEADLINE_SECONDS, provision, stream_identity
from services.eventlog.protocol import LogIdentity
from services.eventlog.settings import LogSettings

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: one try to reach the cluster, seconds; each that fails is logged
_TRY_SECONDS = 5.0
#: pause between two tries, and the least that a try gets, seconds
_RETRY_SECONDS = 0.5


async def reach(settings: LogSettings, *, name: str, role: Role, on_closed: Callable[[str], None]) -> Connection:
    """Connect and, where the settings say so, provision; try again while only time can help.

    Args:
        settings: of the log.
        name: of the connection, shown in the servers' monitoring.
        role: of the process, which decides where answers arrive.
        on_closed: called with the reason when the connection is lost for good.

    Raises:
        ConfigurationError: a file with an authority or a seed cannot be used.
        LogAccessError: the nodes do not let this process in.
        StartupError: no cluster within FI_STARTUP_TIMEOUT.
        ProvisionError: the stream is not what the settings ask for.
    """
    client, _ = await _reach(settings, name, role, on_closed, provision if settings.provision else _nothing)
    return client


async def reach_log(
    settings: LogSettings, *, name: str, role: Role, on_closed: Callable[[str], None]
) -> tuple[Connection, LogIdentity]:
    """Do as :func:`reach`, and return which log it is, too; without provisioning the stream must exist already."""
    return await _reach(settings, name, role, on_closed, provision if settings.provision else stream_identity)


class _Step(Protocol[T_co]):
    """What is done with a new connection, within *deadline* seconds."""

    async def __call__(self, nc: Connection, settings: LogSettings, *, deadline: float) -> T_co: ...


async def _nothing(nc: Connection, settings: LogSettings, *, deadline: float) -> None:
    """Leave the streams to others."""


async def _reach(
    settings: LogSettings, name: str, role: Role, on_closed: Callable[[str], None], step: _Step[T]
) -> tuple[Connection, T]:
    log = get_logger("startup")
    loop = asyncio.get_running_loop()
    end = loop.time() + settings.startup_timeout

    def within(limit: float) -> float:
        return min(limit, max(_RETRY_SECONDS, end - loop.time()))

    while True:
        try:
            client = await connect(settings, name=name, role=role, on_closed=on_closed, deadline=within(_TRY_SECONDS))
            try:
                return client, await step(client, settings, deadline=within(DEADLINE_SECONDS))
            except BaseException:
                await close(client)
                raise
        except TransientError as error:
            left = end - loop.time()
            if left <= 0:
                waited = f"gave up after {settings.startup_timeout:g} s (FI_STARTUP_TIMEOUT)"
                raise StartupError(f"{waited}: {error}") from error
            log.warning("LOG_AWAITED", reason=str(error), seconds_left=round(left, 1))
        await asyncio.sleep(_RETRY_SECONDS)
