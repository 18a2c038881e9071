"""The files of a deployment: where they are, and how secrets are written.

A secret is readable by its owner alone, and whole after a crash. Containers mount single files, and a mount stays with
the file that it found, so a changed secret is written into the same file (:meth:`Secrets.put`); a reader at that moment
(a node at its reload, a service at a connect) tries again. API tokens are in a folder that is mounted as a whole, so
their file is replaced (:meth:`Secrets.replace`).

A secret belongs to the user of the containers that mount it (:meth:`Layout.container_of`), or to the operator. Folders
that are mounted as a whole belong to such a user, too, and root works in them. That user may put a link in place of a
file at any moment, so everything is opened without following links, from the deployment's folder down, and checked and
changed through the descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from services.cli.errors import CommandError

#: what nats.conf includes from the folder ``security`` beside it
NATS_FILES = ("accounts.conf", "at-rest.conf", "client-tls.conf", "route-tls.conf")

_NODE = re.compile(r"n([1-9][0-9]?)\.pem", re.ASCII)
_OWNER = re.compile(r"([0-9]{1,9})(?::([0-9]{1,9}))?", re.ASCII)
FILE_MODE = 0o600
#: of a certificate that every container reads
PUBLIC_MODE = 0o644
FOLDER_MODE = 0o700


class ContainerRole(StrEnum):
    """The containers that run as one user: they share secrets and volumes."""

    #: and `provision`: a node's user has the streams and the permissions of all NATS users anyway
    NODES = "nodes"
    INGEST = "ingest"
    #: and `ops` and `placement`, which mount the corpus
    PERSISTER = "persister"
    BALANCER = "balancer"
    GRAFANA = "grafana"

    @property
    def variable(self) -> str:
        """The variable of the compose files that has the user."""
        return f"FIQ_{self.name}_USER"


#: which containers mount the seed of a NATS user
_SEEDS = {
    "ingest": ContainerRole.INGEST,
    "persister": ContainerRole.PERSISTER,
    "ops": ContainerRole.PERSISTER,
    "placement": ContainerRole.PERSISTER,
    "provisioner": ContainerRole.NODES,
}


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

    def container_of(self, path: Path) -> ContainerRole | None:
        """Return which containers must read *path*; None if only the operator may, or everybody."""
        mounted = {
            self.nats: ContainerRole.NODES,
            self.api: ContainerRole.INGEST,
            self.balancer: ContainerRole.BALANCER,
            self.grafana_password: ContainerRole.GRAFANA,
        }
        for whole in (path, path.parent):
            if whole in mounted:
                return mounted[whole]
        if path.parent == self.nodes:
            return ContainerRole.NODES
        return _SEEDS.get(path.name.partition(".")[0]) if path.parent == self.users else None

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

    @classmethod
    def parse(cls, text: str) -> FileOwner:
        """Return the owner in *text*, a user's number and perhaps a group's. Raises ValueError: it has no such form."""
        match = _OWNER.fullmatch(text)
        if match is None:
            raise ValueError("give numbers, such as 10001 or 10001:10001")
        return cls(int(match[1]), int(match[2] or match[1]))

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"


#: user and group of the image's processes
IMAGE_USER = FileOwner(10001, 10001)
#: users of the containers where root makes the deployment; the compose files have the same defaults
CONTAINER_USERS = {
    ContainerRole.PERSISTER: IMAGE_USER,
    ContainerRole.INGEST: FileOwner(10002, 10002),
    ContainerRole.NODES: FileOwner(10003, 10003),
    ContainerRole.BALANCER: FileOwner(10004, 10004),
    ContainerRole.GRAFANA: FileOwner(10005, 10005),
}


def container_users(layout: Layout) -> dict[ContainerRole, FileOwner] | None:
    """Return the user of each role by .env, else the default of the compose files; None when there is no .env.

    Raises CommandError: it cannot be read, or a user in it is malformed.
    """
    path = layout.environment
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CommandError(f"{path} cannot be read ({error.strerror}): run as root, or as its owner") from None
    users = dict(CONTAINER_USERS)
    for role in users:
        found = re.findall(rf"""^[ ]*{role.variable}[ ]*=[ ]*["']?([^\s"'#]*)""", text, re.MULTILINE)
        if found and found[-1]:
            try:
                users[role] = FileOwner.parse(found[-1])
            except ValueError as error:
                raise CommandError(f"{path}: {role.variable}={found[-1]}: {error}") from None
    return users


@dataclass
class Secrets:
    """Writes files and folders that their owner alone may read; *changes* has one line for each thing done.

    Attributes:
        root: the folder above all of them; links on the way to it are the caller's own.
        owner_of: the owner of each path.
    """

    root: Path
    owner_of: Callable[[Path], FileOwner]
    changes: list[str] = field(default_factory=list)

    def folder(self, path: Path) -> None:
        """Make a folder, or correct its owner and mode."""
        new = False
        if path == self.root:
            new = not path.exists()
            path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        else:
            with self._parent(path) as parent, contextlib.suppress(FileExistsError):
                os.mkdir(path.name, FOLDER_MODE, dir_fd=parent)
                new = True
        self._mend(path, FOLDER_MODE, self.owner_of(path), silent=new)
        if new:
            self.changes.append(f"made {path}")

    def create(self, path: Path, content: bytes, *, mode: int = FILE_MODE) -> None:
        """Write a file that must not exist yet; after a crash it is whole or missing.

        Raises FileExistsError: it does exist.
        """
        with self._temporary(path, content, mode) as (parent, temporary):
            os.link(temporary, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        self.changes.append(f"made {path}")

    def replace(self, path: Path, content: bytes) -> None:
        """Replace a file atomically; a container that mounts the file itself would not see the new one."""
        with self._temporary(path, content, FILE_MODE) as (parent, temporary):
            os.rename(temporary, path.name, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
        self.changes.append(f"wrote {path}")

    @contextlib.contextmanager
    def _temporary(self, path: Path, content: bytes, mode: int) -> Iterator[tuple[int, str]]:
        """Yield the descriptor of *path*'s folder, and the name in it of a file with *content*."""
        temporary = path.with_name(_temporary_name(path))
        with self._parent(path) as parent:
            _remove(temporary.name, parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(temporary.name, flags, FILE_MODE, dir_fd=parent)
            try:
                with open(descriptor, "wb") as file:
                    _fill(file.fileno(), content)
                self._mend(temporary, mode, self.owner_of(path), silent=True)
                yield parent, temporary.name
            finally:
                _remove(temporary.name, parent)

    def put(self, path: Path, content: bytes) -> None:
        """Write *content*, into the same file if it exists."""
        if not os.path.lexists(path):
            self.create(path, content)
            return
        self.mend(path)
        with self._opened(path, os.O_RDWR) as descriptor:
            if _content(descriptor) != content:
                _fill(descriptor, content)
                self.changes.append(f"wrote {path}")

    def mend(self, path: Path, *, mode: int = FILE_MODE) -> None:
        """Correct owner and mode of a file."""
        with self._parent(path) as parent:  # after a crash in `create` the file still has this second name
            _remove(_temporary_name(path), parent)
        self._mend(path, mode, self.owner_of(path))

    def remove(self, path: Path) -> None:
        """Remove a file."""
        with self._parent(path) as parent:
            os.unlink(path.name, dir_fd=parent)
        self.changes.append(f"removed {path}")

    @contextlib.contextmanager
    def alone(self, folder: Path) -> Iterator[None]:
        """Lock *folder* against other processes. Raises CommandError: another one has locked it."""
        with self._opened(folder) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CommandError(f"another fiq init or fiq token is working in {folder}: wait for it") from None
            yield

    def _mend(self, path: Path, mode: int, owner: FileOwner, *, silent: bool = False) -> None:
        before = len(self.changes)
        with self._opened(path) as descriptor:
            found = os.fstat(descriptor)
            if FileOwner.of(found) != owner:
                try:
                    os.fchown(descriptor, owner.uid, owner.gid)
                except PermissionError:
                    raise CommandError(
                        f"{path} cannot be given to {owner}: run as root, or with users of your own in .env"
                    ) from None
                self.changes.append(f"gave {path} to {owner}")
            if stat.S_IMODE(found.st_mode) != mode:
                os.fchmod(descriptor, mode)
                who = "everybody" if mode == PUBLIC_MODE else "its owner only"
                self.changes.append(f"made {path} readable by {who}")
        if silent:
            del self.changes[before:]

    @contextlib.contextmanager
    def _parent(self, path: Path) -> Iterator[int]:
        """Yield a descriptor of the folder of *path*, which is below the root."""
        with self._opened(path.parent) as descriptor:
            yield descriptor

    @contextlib.contextmanager
    def _opened(self, path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
        """Yield a descriptor of *path*: the root, or what is below it.

        Raises CommandError: it, or a folder between, is a link, or a file with a second name; this user may not open
        it.
        """
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            at = self.root
            for name in path.relative_to(self.root).parts:
                at /= name
                below = _open(at, descriptor, flags if at == path else os.O_RDONLY | os.O_DIRECTORY)
                os.close(descriptor)
                descriptor = below
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                _check_one_name(path, descriptor)
            yield descriptor
        finally:
            os.close(descriptor)


def _open(path: Path, parent: int, flags: int) -> int:
    try:
        # a pipe in place of a file must not block
        return os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    except PermissionError:
        raise CommandError(f"{path} cannot be opened: run as root, or as its owner") from None
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            raise CommandError(
                f"{path} is a symbolic link: replace it by a regular file or folder, secrets must not be links"
            ) from None
        raise


def _check_one_name(path: Path, descriptor: int) -> None:
    """Raise CommandError unless *path* is a regular file without a second name elsewhere, that of a hard link."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise CommandError(f"{path} is a link, or no regular file: replace it by one, secrets must not be links")


def _temporary_name(path: Path) -> str:
    return f".{path.name}.new"


def _remove(name: str, parent: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)


def _content(descriptor: int) -> bytes:
    with open(os.dup(descriptor), "rb") as file:
        return file.read()


def _fill(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], written)
    os.fsync(descriptor)
