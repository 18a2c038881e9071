"""``fiq nats-context``: a context file for the ``nats`` command line (nats-architecture-and-design, ADR-21)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from services.cli.errors import CommandError
from services.cli.target import FolderOption, ServerOption, find_cluster

#: how a file of ours is told from a user's own
_MARK = "written by fiq"


def nats_context(
    server: ServerOption = None,
    folder: FolderOption = None,
    name: Annotated[str, typer.Option(help="Name of the context.")] = "fiq",
    select: Annotated[bool, typer.Option("--select", help="Make it the context that `nats` uses by default.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a context that fiq did not write.")] = False,
) -> None:
    """Write a context file, so that `nats --context fiq stream info fi-events` works."""
    target = find_cluster(server, folder)
    path = context_path(name)
    write_context(path, ",".join(target.settings.servers), force=force)
    if select:
        _replace(path.parent.parent / "context.txt", name)
    typer.echo(f"wrote {path}; try  nats {'' if select else f'--context {name} '}stream info fi-events")


def context_path(name: str, env: Mapping[str, str] = os.environ) -> Path:
    """Return where the ``nats`` command line looks for the context *name*.

    Raises:
        CommandError: it would be outside of that folder.
    """
    if not name or ".." in name or "/" in name or os.sep in name or "\0" in name:
        raise CommandError(f"{name!r} cannot be the name of a context: leave out slashes and double dots")
    base = env.get("XDG_CONFIG_HOME") or str(Path(env.get("HOME") or Path.home()) / ".config")
    return Path(base) / "nats" / "context" / f"{name}.json"


def write_context(path: Path, url: str, *, force: bool) -> None:
    """Write the context file.

    Raises:
        CommandError: there is one that fiq did not write, and *force* is not set.
    """
    if path.exists() and not force and not _is_ours(path):
        raise CommandError(f"{path} was not written by fiq: choose another --name, or replace it with --force")
    content = {"description": f"Free Intelligence event log ({_MARK})", "url": url}
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
