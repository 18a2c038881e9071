"""The first steps of a service: reach the cluster within a bounded time, and make sure that the streams exist."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nats.aio.client import Client

from services.contract.errors import TransientError
from services.contract.logs import get_logger
from services.eventlog.errors import StartupError
from services.eventlog.jetstream.connection import close, connect
from services.eventlog.jetstream.names import Role
from services.eventlog.jetstream.provision import provision
from services.eventlog.settings import LogSettings

#: one try to reach the cluster, seconds; each that fails is logged
_TRY_SECONDS = 5.0
#: pause between two tries, and the least that a try gets, seconds
_RETRY_SECONDS = 0.5


async def reach(settings: LogSettings, *, name: str, role: Role, on_closed: Callable[[str], None]) -> Client:
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
    log = get_logger("startup")
    loop = asyncio.get_running_loop()
    end = loop.time() + settings.startup_timeout
    while True:
        deadline = min(_TRY_SECONDS, max(_RETRY_SECONDS, end - loop.time()))
        try:
            return await _try(settings, name, role, on_closed, deadline)
        except TransientError as error:
            left = end - loop.time()
            if left <= 0:
                waited = f"gave up after {settings.startup_timeout:g} s (FI_STARTUP_TIMEOUT)"
                raise StartupError(f"{waited}: {error}") from error
            log.warning("LOG_AWAITED", reason=str(error), seconds_left=round(left, 1))
        await asyncio.sleep(_RETRY_SECONDS)


async def _try(
    settings: LogSettings, name: str, role: Role, on_closed: Callable[[str], None], deadline: float
) -> Client:
    client = await connect(settings, name=name, role=role, on_closed=on_closed, deadline=deadline)
    try:
        if settings.provision:
            await provision(client, settings)
    except BaseException:
        await close(client)
        raise
    return client
