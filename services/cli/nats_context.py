"""``fiq nats-context`` (a context file for the ``nats`` command line, NATS ADR-21) and ``fiq provision``."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fiq.words import count
from services.cli.errors import CommandError, UsageError
from services.cli.init.files import Layout
from services.cli.target import FolderOption, ServerOption, Target, check_is_nats, connected, find_cluster
from services.log.jetstream import stream as names
from services.log.jetstream.connection import Role, inbox_prefix
from services.log.jetstream.stream import provision as provision_log
from services.log.protocol import LogIdentity

#: marks files that fiq wrote
_MARK = "written by fiq"


class User(StrEnum):
    """Users for people; the others are for services."""

    OPS = "ops"
    PLACEMENT = "placement"
    PROVISIONER = "provisioner"
    SYSTEM = "system"


#: a command that each user may run
_TRY = {
    User.OPS: f"stream info {names.STREAM}",
    User.PLACEMENT: f"kv get {names.BUCKET} main.00",
    User.PROVISIONER: f"stream info {names.STREAM}",
    User.SYSTEM: "server report jetstream",
}


def nats_context(
    server: ServerOption = None,
    folder: FolderOption = None,
    name: Annotated[str, typer.Option(help="Name of the context.")] = "fiq",
    user: Annotated[
        User | None, typer.Option(help="User of a deployment: its seed and the authority go into the context.")
    ] = None,
    deployment: Annotated[
        Path, typer.Option(help="Folder that `fiq init` made, for --user; the current one by default.")
    ] = Path(),
    select: Annotated[bool, typer.Option("--select", help="Make it the context that `nats` uses by default.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a context that fiq did not write.")] = False,
) -> None:
    """Write a context file for the `nats` command line.

    Then `nats --context fiq stream info fi-events` works.
    """
    target = find_cluster(server, folder, fallback=user is not None)
    check_is_nats(target.settings)
    path = context_path(name)
    access = {} if user is None else access_of(user, deployment)
    write_context(path, ",".join(target.settings.servers), access, force=force)
    if select:
        _replace(path.parent.parent / "context.txt", name)
    chosen = "" if select else f"--context {name} "
    typer.echo(f"wrote {path}; try  nats {chosen}{_TRY[user or User.OPS]}")


def access_of(user: User, deployment: Path) -> dict[str, object]:
    """Return the fields of a context for *user*: paths of its seed and of the authority, and TLS.

    Raises CommandError: there is no such file in the folder *deployment*.
    """
    layout = Layout(deployment.absolute())
    for path in (layout.seed(user), layout.ca_certificate):
        if not os.access(path, os.R_OK):
            problem = "cannot be read: run this as root, or as its owner" if path.exists() else "does not exist"
            raise CommandError(f"{path} {problem}; name the folder of `fiq init` with --deployment")
    access: dict[str, object] = {"nkey": str(layout.seed(user)), "ca": str(layout.ca_certificate), "tls_first": True}
    return access if user is User.SYSTEM else access | {"inbox_prefix": inbox_prefix(Role(user))}


def context_path(name: str, env: Mapping[str, str] = os.environ) -> Path:
    """Return the path at which the ``nats`` command line looks for the context *name*.

    Its home is that of the password database, whatever HOME says.

    Raises CommandError: the name would lead out of that folder.
    """
    if not name or ".." in name or "/" in name or os.sep in name or "\0" in name:
        raise UsageError(f"{name!r} cannot be the name of a context: leave out slashes and double dots")
    base = Path(xdg) if (xdg := env.get("XDG_CONFIG_HOME")) else _home(env) / ".config"
    return base / "nats" / "context" / f"{name}.json"


def _home(env: Mapping[str, str]) -> Path:
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a user without an entry, as in a container
        return Path(env.get("HOME") or "/")


def write_context(path: Path, url: str, access: Mapping[str, object], *, force: bool) -> None:
    """Write the context file; *access* are the fields of the user.

    Raises CommandError: there is one that fiq did not write, and *force* is not set.
    """
    if path.exists() and not force and not _is_ours(path):
        raise CommandError(f"{path} was not written by fiq: choose another --name, or replace it with --force")
    content = {"description": f"Free Intelligence event log ({_MARK})", "url": url, **access}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _replace(path, json.dumps(content, indent=2) + "\n")


def _is_ours(path: Path) -> bool:
    try:
        return _MARK in json.loads(path.read_text(encoding="utf-8"))["description"]
    except (ValueError, KeyError, TypeError):
        return False


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    temporary.replace(path)


def provision(server: ServerOption = None, folder: FolderOption = None) -> None:
    """Create the streams, or check that they fit the settings.

    Changes nothing that is right already.

    The FI_… settings of the log apply: FI_PARTITIONS, FI_REPLICAS, FI_STREAM_MAX_BYTES and so on.
    """
    target = find_cluster(server, folder)
    identity = asyncio.run(_provision(target))
    settings = target.settings
    typer.echo(
        f"stream {identity.name}, created {identity.created}: {count(settings.partitions, 'partition')}, "
        f"{count(settings.replicas, 'replica')}, {settings.max_bytes} bytes at most; "
        f"dead letters in {names.DEAD_STREAM}"
    )


async def _provision(target: Target) -> LogIdentity:
    async with connected(target.settings, Role.PROVISIONER) as connection:
        return await provision_log(connection, target.settings)
