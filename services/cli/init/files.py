"""The files of a deployment: where they are, and how secrets are written.

A secret is readable by its owner alone, and whole after a crash. Containers mount single files, and a mount stays with
the file that it found, so a changed secret is written into the same file (:meth:`Secrets.put`); a reader at that moment
(a node at its reload, a service at a connect) tries again. API tokens are in a folder that is mounted as a whole, so
their file is replaced (:meth:`Secrets.replace`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from services.cli.errors import CommandError

#: what nats.conf includes from the folder ``security`` beside it
NATS_FILES = ("accounts.conf", "at-rest.conf", "client-tls.conf", "route-tls.conf")

_NODE = re.compile(r"n([1-9][0-9]?)\.pem", re.ASCII)
FILE_MODE = 0o600
FOLDER_MODE = 0o700


class Layout:
    """Paths in the folder that ``fiq init`` makes.

    Attributes:
        folder: the deployment's folder.
        environment: variables for compose; no secret among them.
        secrets: the folder of everything below.
        ignore: keeps git away from it.
        ca_certificate: of the authority that every process trusts.
        ca_key: signs certificates; for the operator only, no process needs it.
        nodes: folder of the nodes' certificates and keys.
        users: folder of the NATS users' seeds.
        nats: folder of the files that nats.conf includes.
        clients: folder of the API tokens, for clients.
        api: folder of what ingest needs for its clients; mounted as a whole, so that its files can be replaced.
        tokens: hashes of the API tokens, for ingest.
        balancer: folder for the certificate of compose.yaml's balancer, which the operator may put there.
        grafana_password: first password of Grafana's user admin.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = folder / ".env"
        self.secrets = secrets = folder / "secrets"
        self.ignore = secrets / ".gitignore"
        self.ca_certificate = secrets / "ca.pem"
        self.ca_key = secrets / "ca.key"
        self.nodes = secrets / "nodes"
        self.users = secrets / "users"
        self.nats = secrets / "nats"
        self.clients = secrets / "clients"
        self.api = secrets / "api"
        self.tokens = self.api / "tokens"
        self.balancer = secrets / "balancer"
        self.grafana_password = secrets / "grafana.password"

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders of secrets."""
        return self.nodes, self.users, self.nats, self.api, self.balancer, self.clients

    def node_certificate(self, node: str) -> Path:
        """Return the certificate of *node*."""
        return self.nodes / f"{node}.pem"

    def node_key(self, node: str) -> Path:
        """Return the private key of *node*."""
        return self.nodes / f"{node}.key"

    def seed(self, user: str) -> Path:
        """Return the nkey seed of *user*."""
        return self.users / f"{user}.seed"

    def next_seed(self, user: str) -> Path:
        """Return the seed of *user* after the current rotation."""
        return self.users / f"{user}.seed.next"

    def token(self, name: str) -> Path:
        """Return the API token called *name*."""
        return self.clients / f"{name}.token"

    def known_nodes(self) -> list[str]:
        """Return the names of the nodes that have a certificate, in order."""
        found = (_NODE.fullmatch(path.name) for path in self.nodes.glob("n*.pem"))
        return [f"n{number}" for number in sorted(int(match[1]) for match in found if match)]


@dataclass(frozen=True, slots=True)
class FileOwner:
    """A user and a group by their numbers."""

    uid: int
    gid: int

    @classmethod
    def myself(cls) -> FileOwner:
        """Return the user of this process."""
        return cls(os.geteuid(), os.getegid())

    @classmethod
    def of(cls, found: os.stat_result) -> FileOwner:
        """Return the owner of a file by its stat result."""
        return cls(found.st_uid, found.st_gid)

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"


@dataclass
class Secrets:
    """Writes files and folders that *owner* alone may read; *changes* has one line for each thing done."""

    owner: FileOwner
    changes: list[str] = field(default_factory=list)

    def folder(self, path: Path, *, owner: FileOwner | None = None) -> None:
        """Make a folder, or correct its owner and mode."""
        new = not path.exists()
        if new:
            path.mkdir(mode=FOLDER_MODE, parents=True)
        self._mend(path, FOLDER_MODE, owner or self.owner, silent=new)
        if new:
            self.changes.append(f"made {path}")

    def create(self, path: Path, content: bytes, *, owner: FileOwner | None = None) -> None:
        """Write a file that must not exist yet; after a crash it is whole or missing.

        Raises FileExistsError: it does exist.
        """
        with self._temporary(path, content, owner or self.owner) as temporary:
            os.link(temporary, path)
        self.changes.append(f"made {path}")

    def replace(self, path: Path, content: bytes) -> None:
        """Replace a file atomically; a container that mounts the file itself would not see the new one."""
        with self._temporary(path, content, self.owner) as temporary:
            temporary.rename(path)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.changes.append(f"wrote {path}")

    @contextlib.contextmanager
    def _temporary(self, path: Path, content: bytes, owner: FileOwner) -> Iterator[Path]:
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            with open(descriptor, "wb") as file:
                _fill(file.fileno(), content)
            self._mend(temporary, FILE_MODE, owner, silent=True)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def put(self, path: Path, content: bytes) -> None:
        """Write *content*, into the same file if it exists."""
        if not path.exists():
            self.create(path, content)
            return
        if path.read_bytes() != content:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            with open(descriptor, "wb") as file:
                _fill(file.fileno(), content)
            self.changes.append(f"wrote {path}")
        self.mend(path)

    def mend(self, path: Path, *, owner: FileOwner | None = None) -> None:
        """Correct owner and mode of a file."""
        self._mend(path, FILE_MODE, owner or self.owner)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()
        self.changes.append(f"removed {path}")

    @contextlib.contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Lock *folder* against other processes. Raises CommandError: another one has locked it."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise CommandError(f"another fiq init or fiq token is working in {folder}: wait for it") from None
        finally:
            os.close(descriptor)

    def _mend(self, path: Path, mode: int, owner: FileOwner, *, silent: bool = False) -> None:
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            raise CommandError(f"{path} is a symbolic link: replace it by a regular file, secrets must not be links")
        before = len(self.changes)
        if FileOwner.of(found) != owner:
            try:
                os.chown(path, owner.uid, owner.gid)
            except PermissionError:
                raise CommandError(
                    f"{path} cannot be given to {owner}: run as root, or name yourself with --owner"
                ) from None
            self.changes.append(f"gave {path} to {owner}")
        if stat.S_IMODE(found.st_mode) != mode:
            path.chmod(mode)
            self.changes.append(f"made {path} readable by its owner only")
        if silent:
            del self.changes[before:]


def _fill(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], written)
    os.fsync(descriptor)
