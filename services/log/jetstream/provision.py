"""Creates the streams, or checks that they are what the settings ask for.

Idempotent, and safe when several processes do it at once while the cluster still elects its leaders: whatever is
transient is tried again until a deadline, and every round starts from what the broker holds now, because a creation
that timed out may have taken effect.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

from nats.aio.client import Client

from fiq.errors import TransientError
from services.core.logs import get_logger
from services.log.errors import LogForbiddenError, LogUnavailableError, ProvisionError, StartupError
from services.log.jetstream import names
from services.log.jetstream.api import NOT_ENABLED_ERR_CODES, ApiError, JetStreamApi, NoRespondersError
from services.log.jetstream.connection import Connection, close, connect, server_info
from services.log.jetstream.definitions import (
    Config,
    bucket_config,
    changes,
    check_ownership,
    dead_stream_config,
    own_metadata,
    size_setting,
    stream_config,
)
from services.log.jetstream.names import Role
from services.log.protocol import LogIdentity
from services.log.settings import LogSettings

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

#: one try to reach the cluster, seconds; each that fails is logged
_TRY_SECONDS = 5.0
#: pause between two tries, and the least that a try gets, seconds
_STARTUP_RETRY_SECONDS = 0.5

#: oldest server that this was tested with
MINIMUM_VERSION = (2, 14)
#: elections right after a cluster's start may take this long, seconds
DEADLINE_SECONDS = 30.0
#: one answer of the broker may take this long, seconds; some never come although the request took effect
ANSWER_SECONDS = 2.0
#: nodes that have just started are not offered for placement yet; after this a refusal is believed, seconds
GRACE_SECONDS = 6.0
_RETRY_SECONDS = 0.25

_NO_PEERS = 10005
_NO_STORAGE = 10047
_EXISTS_DIFFERENTLY = 10058
_OVERLAP = 10065
_NOT_CLUSTERED = 10074
#: errors of placement, which a cluster also answers while its nodes come up
_NO_PLACE = frozenset({_NO_PEERS, _NO_STORAGE})

_log = get_logger("eventlog.provision")


async def provision(nc: Client, settings: LogSettings, *, deadline: float = DEADLINE_SECONDS) -> LogIdentity:
    """Make both streams what *settings* ask for, and return which log this is.

    Args:
        nc: a connection whose user may create and update streams.
        settings: the wanted state.
        deadline: seconds for everything.

    Raises ProvisionError: the server or an existing stream stands against it; the message says what to do;
    LogUnavailableError: the cluster was not able to within *deadline*; call again.
    """
    check_version(str(server_info(nc).get("version", "")))
    api = JetStreamApi(nc, timeout=min(ANSWER_SECONDS, deadline))
    patience = _Patience(deadline)
    try:
        await patience.retry(lambda: _enabled(nc, api.request("INFO")))
        info = await patience.retry(lambda: _ensure(api, stream_config(settings), patience))
        await patience.retry(lambda: _ensure(api, dead_stream_config(settings), patience))
        # who had keys in an earlier bucket is then not known: nothing is trimmed until an operator has told
        late = {names.LATE_KEY: info["created"]} if info["state"]["last_seq"] else {}
        await patience.retry(lambda: _ensure(api, bucket_config(settings), patience, at_creation=late))
    except LogForbiddenError as error:
        raise ProvisionError(
            f"the NATS user may not provision ({error}): run `fiq provision` as one who may, and set "
            "FI_PROVISION=false here"
        ) from error
    return _identity(info)


async def stream_identity(nc: Client, settings: LogSettings, *, deadline: float = DEADLINE_SECONDS) -> LogIdentity:
    """Check that the stream exists and is what *settings* ask for, change nothing, and return which log it is.

    Raises ProvisionError: there is no JetStream, no such stream, or it is another one; LogUnavailableError: no answer
    within *deadline* seconds; call again.
    """
    check_version(str(server_info(nc).get("version", "")))
    api = JetStreamApi(nc, timeout=min(ANSWER_SECONDS, deadline))
    # not INFO of the account: a persister that does not provision may have no right to ask for it
    info = await _Patience(deadline).retry(lambda: _enabled(nc, api.stream_info(names.STREAM)))
    if info is None:
        raise ProvisionError(f"stream {names.STREAM} does not exist: run `fiq provision`, or set FI_PROVISION=true")
    check_ownership(stream_config(settings), info["config"])
    return _identity(info)


def check_version(version: str) -> None:
    """Check that the server is new enough. Raises ProvisionError: it is older than 2.14, or says no version."""
    match = re.match(r"v?(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < MINIMUM_VERSION:
        wanted = ".".join(str(part) for part in MINIMUM_VERSION)
        raise ProvisionError(
            f"nats-server is {version or 'of unknown version'}, fiq needs {wanted} or newer (consumer reset): "
            "upgrade every node of the cluster"
        )


def _identity(info: Mapping[str, Any]) -> LogIdentity:
    return LogIdentity(names.STREAM, info["created"])


async def _enabled(nc: Client, request: Awaitable[T]) -> T:
    """Return the answer to *request*, or say that it can never come because JetStream is off."""
    try:
        return await request
    except NoRespondersError:
        if not server_info(nc).get("jetstream"):
            raise _not_enabled() from None
        raise
    except ApiError as error:
        if error.err_code in NOT_ENABLED_ERR_CODES:
            raise _not_enabled() from None
        raise


def _not_enabled() -> ProvisionError:
    return ProvisionError(
        "JetStream is not enabled on the server, or not for this account: add `jetstream { ... }` to nats.conf, or "
        "point FI_LOG_URL to the cluster of deploy/nats-cluster"
    )


async def _ensure(
    api: JetStreamApi, wanted: Config, patience: _Patience, *, at_creation: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Bring one stream to *wanted* and return its info; one round, to be repeated when it says "unavailable"."""
    info = await api.stream_info(wanted["name"])
    if info is None:
        metadata = {**wanted["metadata"], **(at_creation or {})}
        return await _change(api, "CREATE", {**wanted, "metadata": metadata}, patience)
    check_version(_own_version(info["config"]))
    different = changes(wanted, info["config"], info["state"]["bytes"])
    if not different:
        return info
    before = {key: info["config"].get(key) for key in different}
    config = {**info["config"], "metadata": own_metadata(info["config"]), **different}
    info = await _change(api, "UPDATE", config, patience)
    _log.warning("LOG_STREAM_CHANGED", stream=wanted["name"], before=before, after=different)
    return info


def _own_version(config: Config) -> str:
    """Return the version of the server that leads the stream, which need not be the one we are connected to."""
    return str((config.get("metadata") or {}).get("_nats.ver", ".".join(map(str, MINIMUM_VERSION))))


async def _change(api: JetStreamApi, verb: str, config: Config, patience: _Patience) -> dict[str, Any]:
    try:
        return await api.request(f"STREAM.{verb}.{config['name']}", config)
    except ApiError as error:
        if isinstance(error, LogUnavailableError):
            raise
        if error.err_code == _EXISTS_DIFFERENTLY or (error.err_code in _NO_PLACE and patience.elapsed < GRACE_SECONDS):
            # somebody created it after our look, or the nodes have only just come up: look again
            raise LogUnavailableError(str(error)) from error
        raise ProvisionError(_refusal(error, config)) from error


def _refusal(error: ApiError, config: Config) -> str:
    name, replicas = config["name"], config["num_replicas"]
    if error.err_code == _NO_STORAGE or "insufficient storage" in error.description:
        return (
            f"stream {name} needs {config['max_bytes']} bytes on {replicas} nodes, which have not that much left "
            f"({error.description}): raise max_file_store in nats.conf or lower {size_setting(name)}"
        )
    if error.err_code in {_NO_PEERS, _NOT_CLUSTERED}:
        return (
            f"stream {name} needs {replicas} nodes, the cluster offers fewer ({error.description}): start {replicas} "
            "nodes of one cluster, or set FI_REPLICAS=1 for an experiment"
        )
    if error.err_code == _OVERLAP:
        return (
            f"another stream takes subjects of {name} already ({error.description}): `nats stream ls` shows it; remove "
            "its subjects under fi.events and fi.dead, or use another NATS account"
        )
    return f"stream {name} is refused: {error}"


class _Patience:
    """Repeats what is unavailable just now until the time is over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._loop.time() - self._start

    async def retry(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Return what *operation* returns, the first time that it is not unavailable."""
        while True:
            try:
                return await operation()
            except LogUnavailableError as error:
                if self.elapsed + _RETRY_SECONDS > self._seconds:
                    raise LogUnavailableError(
                        f"the cluster did not get ready within {self._seconds:g} s: {error}. "
                        "Check that a majority of its nodes runs"
                    ) from error
                await asyncio.sleep(_RETRY_SECONDS)


# -- The first steps of a service: reach the cluster within a bounded time, and make sure that the streams exist -----


async def reach(settings: LogSettings, *, name: str, role: Role, on_closed: Callable[[str], None]) -> Connection:
    """Connect and, where the settings say so, provision; try again while only time can help.

    Args:
        settings: of the log.
        name: of the connection, shown in the servers' monitoring.
        role: of the process, which decides where answers arrive.
        on_closed: called with the reason when the connection is lost for good.

    Raises ConfigurationError: a file with an authority or a seed cannot be used; LogAccessError: the nodes do not let
    this process in; StartupError: no cluster within FI_STARTUP_TIMEOUT; ProvisionError: the stream is not what the
    settings ask for.
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
        return min(limit, max(_STARTUP_RETRY_SECONDS, end - loop.time()))

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
        await asyncio.sleep(_STARTUP_RETRY_SECONDS)
