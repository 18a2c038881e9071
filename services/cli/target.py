"""Which cluster, and which corpus, a command is about."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import orjson
import typer
from nats.aio.client import Client

from fiq.errors import ConfigurationError
from services.cli.embedded.stack import Stack
from services.cli.errors import AlreadyRunningError, CommandError, NotRunningError
from services.core.settings import load
from services.log.jetstream.connection import close, connect
from services.log.jetstream.names import Role
from services.log.settings import LogSettings

#: where `fiq up` puts everything unless told otherwise
DEFAULT_FOLDER = Path(".fiq")
#: a reader that looks whether somebody runs holds the lock for a moment: how long `up` tries, seconds
_LOCK_PATIENCE = 0.5
_POLL = 0.05
#: options that several commands share
ServerOption = Annotated[
    str | None, typer.Option(help="Nodes of the cluster, nats://host:port, separated by commas; FI_LOG_URL otherwise.")
]
FolderOption = Annotated[
    Path | None,
    typer.Option(help="Folder of a running `fiq up`; ./.fiq when nothing else says which cluster is meant."),
]
CorpusOption = Annotated[
    Path | None,
    typer.Option(help="Data directory, or one partition file; else FI_DATA_DIR, ./.fiq/corpus or ./corpus."),
]


#: how long a command tries to reach the cluster, seconds: somebody is waiting for it
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a running stack: its name, process id, where it listens, and where it tells of itself."""

    name: str
    pid: int
    url: str
    monitoring: str


@dataclass(frozen=True, slots=True)
class State:
    """What a running ``fiq up`` tells the other commands (``state.json``)."""

    pid: int
    nats_url: str
    ingest_url: str
    data_dir: str
    members: tuple[Member, ...]

    @classmethod
    def of(cls, stack: Stack) -> State:
        """Describe a started *stack*."""
        nodes = [
            Member(node.name, node.pid or 0, url, f"http://127.0.0.1:{ports.monitoring}")
            for node, url, ports in zip(stack.cluster.nodes, stack.cluster.urls, stack.cluster.ports, strict=True)
        ]
        services = [
            Member(service.name, service.process.pid or 0, service.url, service.management_url)
            for service in stack.services
        ]
        return cls(os.getpid(), stack.cluster.url, stack.ingest.url, str(stack.data_dir), (*nodes, *services))


class StackFolder:
    """``./.fiq``, or what ``--folder`` names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def corpus(self) -> Path:
        """Where its persisters write, running or not."""
        return self.path / "corpus"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the only one that runs a stack in the folder; make it when it is missing.

        Raises AlreadyRunningError: another process does already; CommandError: the folder cannot be written, or is
        none.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CommandError(f"{self.path} is no directory; name another with --folder")
        try:
            self._prepare()
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CommandError(
                f"cannot use the folder {self.path}: {error.strerror}; name another with --folder"
            ) from error
        try:
            self._lock(descriptor)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            yield
        finally:
            os.close(descriptor)

    def write(self, state: State) -> None:
        """Publish *state*, atomically."""
        temporary = self._state_path.with_suffix(".tmp")
        temporary.write_bytes(orjson.dumps(asdict(state), option=orjson.OPT_INDENT_2) + b"\n")
        temporary.rename(self._state_path)

    def clear(self) -> None:
        """Withdraw the state."""
        self._state_path.unlink(missing_ok=True)

    def read(self) -> State:
        """Return the state of the stack that runs here. Raises NotRunningError: none does, or it is not ready yet."""
        if not self._is_held():
            raise NotRunningError(
                f"nothing runs in {self.path}: start it with  fiq up  or name another: --server, or --url of fiq post"
            )
        try:
            found = orjson.loads(self._state_path.read_bytes())
            members = tuple(Member(**member) for member in found.pop("members"))
            return State(**found, members=members)
        except FileNotFoundError:
            raise NotRunningError(f"the stack in {self.path} is not ready yet: wait for  fiq up") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise NotRunningError(f"{self._state_path} is damaged: stop  fiq up  and start it again") from error

    @property
    def _lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def _state_path(self) -> Path:
        return self.path / "state.json"

    def _prepare(self) -> None:
        # medical data: for the owner only, and in no repository
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        ignore = self.path / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n", encoding="ascii")

    def _lock(self, descriptor: int) -> None:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(_POLL)
                    continue
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                raise AlreadyRunningError(
                    f"{self.path} is in use by process {holder or '(unknown)'}: stop that one, or name another --folder"
                ) from None
            else:
                return

    def _is_held(self) -> bool:
        try:
            descriptor = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


@dataclass(frozen=True, slots=True)
class Target:
    """A cluster, and the state of the stack on this machine that it belongs to, if it is one."""

    settings: LogSettings
    state: State | None


def find_cluster(
    server: str | None, folder: Path | None, *, env: Mapping[str, str] = os.environ, fallback: bool = False
) -> Target:
    """Choose the cluster: *server*, else *folder*, else FI_LOG_URL, else ./.fiq, else with *fallback* the default.

    Raises ConfigurationError: a setting is malformed; NotRunningError: nothing says which one.
    """
    if server is not None:
        return _asked_for(env, server)
    if folder is not None:
        return _running(env, folder)
    if env.get("FI_LOG_URL", "").strip():
        return Target(load(LogSettings, env), None)
    try:
        return _running(env, DEFAULT_FOLDER)
    except NotRunningError:
        if fallback:
            return Target(load(LogSettings, env), None)
        raise


def _asked_for(env: Mapping[str, str], server: str) -> Target:
    try:
        return _named(env, server)
    except ConfigurationError as error:  # names what the user wrote, not the setting that it stands for
        raise ConfigurationError(
            [problem.replace("FI_LOG_URL=", "--server ", 1) for problem in error.problems]
        ) from None


def _named(env: Mapping[str, str], url: str) -> Target:
    return Target(load(LogSettings, {**env, "FI_LOG_URL": url}), None)


def _running(env: Mapping[str, str], folder: Path) -> Target:
    state = StackFolder(folder).read()
    return Target(_named(env, state.nats_url).settings, state)


def find_corpus(corpus: Path | None, folder: Path | None, *, env: Mapping[str, str] = os.environ) -> Path:
    """Choose the corpus: *corpus*, else the one in *folder*, else FI_DATA_DIR, ./.fiq/corpus or ./corpus.

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
    raise CommandError(f"there is no corpus (looked for {looked}): name its data directory with --corpus")


@asynccontextmanager
async def connected(settings: LogSettings, role: Role = Role.OPS) -> AsyncIterator[Client]:
    """Connect for the time of one command.

    Raises LogAccessError: the nodes do not let us in; LogUnavailableError: no server took the connection.
    """
    connection = await connect(settings, name="fiq", role=role, on_closed=lambda _: None, deadline=_PATIENCE)
    try:
        yield connection
    finally:
        await close(connection)
