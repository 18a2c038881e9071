"""Which cluster, which service, and which corpus a command is about."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from fiq.errors import ConfigurationError, InvalidIdError
from fiq.event import check_consultation_id
from services.cli.embedded.stack import DEFAULT_FOLDER, StackFolder, StackState
from services.cli.errors import CommandError, NotRunningError, UsageError
from services.core.settings import load
from services.log.jetstream.connection import Connection, Role, close, connect
from services.log.settings import LogSettings

#: options that several commands share
ServerOption = Annotated[
    str | None, typer.Option(help="Nodes of the cluster, nats://host:port, separated by commas; FI_LOG_URL otherwise.")
]
FolderOption = Annotated[
    Path | None,
    typer.Option(help="Folder of a running `fiq up`; ./.fiq if nothing else names a cluster."),
]
UrlOption = Annotated[str | None, typer.Option(help="URL of the service; else of a running `fiq up`, else FI_URL.")]
TokenFileOption = Annotated[Path | None, typer.Option(help="File with the token; FI_TOKEN by default.")]
CaFileOption = Annotated[Path | None, typer.Option(help="PEM file of the authority of an https URL.")]
CorpusOption = Annotated[
    Path | None,
    typer.Option(help="Data directory, or one partition file; else FI_DATA_DIR, ./.fiq/corpus or ./corpus."),
]

#: how long a command tries to reach the cluster, seconds
_CONNECT_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """A cluster, the state of the stack on this machine that it belongs to, if any, and as whom to ask it."""

    settings: LogSettings
    state: StackState | None
    role: Role = Role.OPS


def find_cluster(
    server: str | None,
    folder: Path | None,
    *,
    env: Mapping[str, str] = os.environ,
    fallback: bool = False,
) -> Target:
    """Return the cluster of *server*, else *folder*, else FI_LOG_URL, else ./.fiq, else with *fallback* the default.

    Raises UsageError: *server* is malformed; ConfigurationError: a setting is; NotRunningError: none of them names one.
    """
    if server is not None:
        return _asked_for(env, server)
    if folder is not None:
        return _running(env, folder)
    if env.get("FI_LOG_URL", "").strip():
        return Target(load(LogSettings, env), None)
    try:
        return _running(env, DEFAULT_FOLDER)
    except NotRunningError as error:
        if fallback:
            return Target(load(LogSettings, env), None)
        raise NotRunningError(f"{error}, or a cluster with --server") from None


def find_cluster_to_place(server: str | None, folder: Path | None) -> Target:
    """Return the cluster as :func:`find_cluster` does, for a command that writes where partitions are."""
    return replace(find_cluster(server, folder), role=Role.PLACEMENT)


def _asked_for(env: Mapping[str, str], server: str) -> Target:
    try:
        return Target(load(LogSettings, {**env, "FI_LOG_URL": server}), None)
    except ConfigurationError as error:  # the option that the user wrote, instead of the setting
        problems = [problem.replace("FI_LOG_URL=", "--server ", 1) for problem in error.problems]
        if all(problem.startswith("--server ") for problem in problems):
            raise UsageError("; ".join(problems)) from None
        raise ConfigurationError(problems) from None


def _running(env: Mapping[str, str], folder: Path) -> Target:
    state = StackFolder(folder).read()
    return Target(load(LogSettings, {**env, "FI_LOG_URL": state.log_url}), state)


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """A service: its URL, the token for it, and what named it."""

    url: str
    token: str | None
    named_by: str

    def __str__(self) -> str:
        return f"{self.url} ({self.named_by})"


def find_service(
    url: str | None, folder: Path | None, token_file: Path | None, *, env: Mapping[str, str] = os.environ
) -> ServiceTarget:
    """Return the service at *url*, else of the stack in *folder*, else at FI_URL, else of the stack in ./.fiq.

    There is no default address: whatever listens there would get the events.

    Raises UsageError: *url* is malformed; NotRunningError: none of them names one; CommandError: the token cannot be
    read.
    """
    if url is not None:
        _check_url(url)
    token = _token(token_file, env)
    if url is not None:
        return ServiceTarget(url, token, "--url")
    if folder is None and (named := env.get("FI_URL", "").strip()):
        return ServiceTarget(named, token, "FI_URL")
    home = DEFAULT_FOLDER if folder is None else folder
    try:
        return ServiceTarget(StackFolder(home).read().ingest_url, token, f"`fiq up` in {home}")
    except NotRunningError as error:
        if folder is not None:
            raise
        raise NotRunningError(f"{error}, or name the service with --url or FI_URL") from None


def _check_url(url: str) -> None:
    from fiq.client import InvalidArgumentError
    from fiq.client.client import service_url  # with aiohttp, which only commands about a service need

    try:
        service_url(url)
    except InvalidArgumentError as error:
        raise UsageError(f"--url: {error}") from None


def _token(file: Path | None, env: Mapping[str, str]) -> str | None:
    if file is None:
        return env.get("FI_TOKEN", "").strip() or None
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise CommandError(f"{file} does not contain a token") from None


def trusting(ca_file: Path | None) -> ssl.SSLContext | None:
    """Return a context that trusts the authority in *ca_file*, or None, which is the machine's authorities.

    Raises CommandError: it cannot be read.
    """
    if ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # SSLError is one too
        raise CommandError(f"cannot read certificates from {ca_file}: {error.strerror or error}") from error


def find_corpus(
    corpus: Path | None, folder: Path | None, *, env: Mapping[str, str] = os.environ, how: str = "with --corpus"
) -> Path:
    """Return the path of *corpus*, else the one in *folder*, else FI_DATA_DIR, ./.fiq/corpus or ./corpus.

    *how* the command takes the path is part of the message.

    Raises CommandError: there is none.
    """
    if corpus is not None:
        candidates = [corpus]
    elif folder is not None:
        candidates = [StackFolder(folder).corpus]
    elif env.get("FI_DATA_DIR", "").strip():
        candidates = [Path(env["FI_DATA_DIR"].strip())]
    else:
        candidates = [StackFolder(DEFAULT_FOLDER).corpus, Path("corpus")]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    looked = " and ".join(str(candidate) for candidate in candidates)
    raise CommandError(f"there is no corpus (looked for {looked}): name its data directory {how}")


def check_consultation(consultation: str) -> None:
    """Raise UsageError unless the argument *consultation* is a consultation's id."""
    try:
        check_consultation_id(consultation)
    except InvalidIdError as error:
        raise UsageError(f"{consultation!r} is not a consultation's id: {error}") from None


def check_is_nats(settings: LogSettings) -> None:
    """Raise CommandError unless the log is a NATS cluster."""
    if settings.uses_zeromq:
        raise CommandError(
            f"this command needs NATS nodes, and the log at {settings.url} has none: docs/logs.md has alternatives"
        )


@asynccontextmanager
async def connected(settings: LogSettings, role: Role = Role.OPS) -> AsyncIterator[Connection]:
    """Connect as long as the body runs.

    Raises CommandError: the log has no nodes; LogAccessError: the nodes refuse the login; LogUnavailableError: none of
    them took the connection.
    """
    check_is_nats(settings)
    # all nodes at the same time: a frozen one takes connections and says nothing. The first attempt may use any of
    # them; its error names them all
    choices = [settings, *(replace(settings, servers=(server,)) for server in settings.servers)]
    attempts = [asyncio.create_task(_connect(choice, role)) for choice in choices]
    try:
        yield await _first(attempts)
    finally:
        for attempt in attempts:
            attempt.cancel()
        for made in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(made, Connection):
                await close(made)


async def _connect(settings: LogSettings, role: Role) -> Connection:
    return await connect(settings, name="fiq", role=role, on_closed=lambda _: None, deadline=_CONNECT_TIMEOUT)


async def _first(attempts: Sequence[asyncio.Task[Connection]]) -> Connection:
    """Return the first connection that is made. Raises what the first attempt raised: none was made."""
    pending = set(attempts)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for attempt in done:
            if attempt.exception() is None:
                for loser in pending:
                    loser.cancel()
                return attempt.result()
    return attempts[0].result()
