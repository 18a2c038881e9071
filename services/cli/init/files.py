"""Writes secrets: for their owner alone, whole or not at all, and never another file in the place of an old one.

Containers mount single files, and a mount stays with the file that it found: what is renewed must be written into the
same file. So a change truncates; whoever reads meanwhile (a node at its reload, a service at a connect) tries again.
What lies in a folder that is mounted as a whole, the API tokens, is replaced.
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


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of the folder that ``fiq init`` makes."""

    folder: Path

    @property
    def environment(self) -> Path:
        """Variables for compose; no secret among them."""
        return self.folder / ".env"

    @property
    def secrets(self) -> Path:
        """Everything that nobody else may read."""
        return self.folder / "secrets"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Everything in it that is a folder."""
        return self.nodes, self.users, self.nats, self.api, self.balancer, self.clients

    @property
    def ignore(self) -> Path:
        """Keeps git away from the secrets."""
        return self.secrets / ".gitignore"

    @property
    def ca_certificate(self) -> Path:
        """What everybody trusts."""
        return self.secrets / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """What makes certificates; for the operator only, no process ever needs it."""
        return self.secrets / "ca.key"

    @property
    def nodes(self) -> Path:
        """Folder of the nodes' certificates and keys."""
        return self.secrets / "nodes"

    @property
    def users(self) -> Path:
        """Folder of the users' seeds."""
        return self.secrets / "users"

    @property
    def nats(self) -> Path:
        """Folder of the files that nats.conf includes."""
        return self.secrets / "nats"

    @property
    def clients(self) -> Path:
        """Folder of the API tokens as clients send them."""
        return self.secrets / "clients"

    @property
    def api(self) -> Path:
        """Folder of what ingest needs for its clients; mounted as a whole, so that its files can be replaced."""
        return self.secrets / "api"

    @property
    def tokens(self) -> Path:
        """The API tokens as the ingest service knows them: hashes."""
        return self.api / "tokens"

    @property
    def balancer(self) -> Path:
        """Folder of the certificate that compose.yaml's balancer shows to clients, if the operator puts one there."""
        return self.secrets / "balancer"

    @property
    def grafana_password(self) -> Path:
        """The first password of Grafana's user admin."""
        return self.secrets / "grafana.password"

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
        """Return the seed that *user* will have when the rotation that is under way is finished."""
        return self.users / f"{user}.seed.next"

    def token(self, name: str) -> Path:
        """Return the API token called *name*."""
        return self.clients / f"{name}.token"

    def known_nodes(self) -> list[str]:
        """Return the names of the nodes that have a certificate, in order."""
        found = (_NODE.fullmatch(path.name) for path in self.nodes.glob("n*.pem"))
        return [f"n{number}" for number in sorted(int(match[1]) for match in found if match)]


@dataclass(frozen=True, slots=True)
class Owner:
    """A user and a group by their numbers."""

    uid: int
    gid: int

    @classmethod
    def myself(cls) -> Owner:
        """Return who runs this process."""
        return cls(os.geteuid(), os.getegid())

    @classmethod
    def of(cls, found: os.stat_result) -> Owner:
        """Return whose a file is, by what stat or lstat said of it."""
        return cls(found.st_uid, found.st_gid)

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"


@dataclass
class Secrets:
    """Writes files and folders that *owner* alone may read.

    Attributes:
        owner: whose they are.
        changes: what was done, a line each.
    """

    owner: Owner
    changes: list[str] = field(default_factory=list)

    def folder(self, path: Path, *, owner: Owner | None = None) -> None:
        """Make a folder, or put its owner and mode right."""
        new = not path.exists()
        if new:
            path.mkdir(mode=FOLDER_MODE, parents=True)
        self._mend(path, FOLDER_MODE, owner or self.owner, silent=new)
        if new:
            self.changes.append(f"made {path}")

    def create(self, path: Path, content: bytes, *, owner: Owner | None = None) -> None:
        """Write a file that must not exist yet; after a crash it is whole or missing.

        Raises FileExistsError: it does exist.
        """
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            with open(descriptor, "wb") as file:
                _fill(file.fileno(), content)
            self._mend(temporary, FILE_MODE, owner or self.owner, silent=True)
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self.changes.append(f"made {path}")

    def replace(self, path: Path, content: bytes) -> None:
        """Put another file in the place of *path*, at once: whoever reads sees the old or the new one.

        For files whose folder is mounted; a container that mounts the file itself would not see it.
        """
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            with open(descriptor, "wb") as file:
                _fill(file.fileno(), content)
            self._mend(temporary, FILE_MODE, self.owner, silent=True)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
        self.changes.append(f"wrote {path}")

    def put(self, path: Path, content: bytes) -> None:
        """Write a file unless it holds *content* already; one that exists stays the same file."""
        if not path.exists():
            self.create(path, content)
            return
        if path.read_bytes() != content:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            with open(descriptor, "wb") as file:
                _fill(file.fileno(), content)
            self.changes.append(f"wrote {path}")
        self.mend(path)

    def mend(self, path: Path, *, owner: Owner | None = None) -> None:
        """Put owner and mode of a file right."""
        self._mend(path, FILE_MODE, owner or self.owner)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()
        self.changes.append(f"removed {path}")

    @contextlib.contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Be the only one that writes into *folder*. Raises CommandError: another process does just now."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise CommandError(f"another fiq init or fiq token is at work in {folder}: wait for it") from None
        finally:
            os.close(descriptor)

    def _mend(self, path: Path, mode: int, owner: Owner, *, silent: bool = False) -> None:
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            raise CommandError(f"{path} is a symbolic link: secrets must be files of their own, replace it")
        before = len(self.changes)
        if Owner.of(found) != owner:
            try:
                os.chown(path, owner.uid, owner.gid)
            except PermissionError:
                raise CommandError(
                    f"{path} cannot be given to {owner}: run as root, or name yourself with --owner"
                ) from None
            self.changes.append(f"gave {path} to {owner}")
        if stat.S_IMODE(found.st_mode) != mode:
            path.chmod(mode)
            self.changes.append(f"took {path} from everybody else")
        if silent:
            del self.changes[before:]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fill(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], written)
    os.fsync(descriptor)
