"""``fiq init``: the secrets of a deployment."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from services.cli.errors import CommandError
from services.cli.init.authority import check_host
from services.cli.init.deployment import Deployment
from services.cli.init.files import Layout, Owner

_OWNER = re.compile(r"([0-9]{1,9})(?::([0-9]{1,9}))?", re.ASCII)
#: whom the image's processes run as
IMAGE_UID = 10001


class Rotation(StrEnum):
    """What can be renewed."""

    CERTIFICATES = "certificates"
    USERS = "users"
    USERS_FINISH = "users-finish"


#: what is to be done after each
_NEXT = {
    Rotation.CERTIFICATES: "copy secrets/nodes to every host, into the same files "
    "(rsync -a --inplace --numeric-ids), then reload each node: check with `nats-server -t`, then SIGHUP",
    Rotation.USERS: "copy secrets/nats to every host (rsync -a --numeric-ids) and reload each node, check with "
    "`nats-server -t`, then SIGHUP; both seeds are good then, and  fiq init {folder} --rotate users-finish  is the "
    "second step",
    Rotation.USERS_FINISH: "copy secrets/users and secrets/nats to every host, into the same files "
    "(rsync -a --inplace --numeric-ids), then reload each node: the services connect with their new seeds by "
    "themselves",
}


def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the deployment; made when it is missing.")],
    hosts: Annotated[
        str,
        typer.Option(
            help="Names or addresses of the machines, one node each, separated by commas; n1 is on the first."
        ),
    ] = "",
    owner: Annotated[
        str,
        typer.Option(
            metavar="UID[:GID]",
            help="Who may read the secrets: whom the containers run as. By default whose they are; of a new "
            "deployment 10001 for root, else yourself.",
        ),
    ] = "",
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Let the nodes encrypt what they store; to be chosen at the beginning.")
    ] = False,
    rotate: Annotated[
        Rotation | None,
        typer.Option(help="Renew the nodes' certificates; or the users' seeds, in two steps: users, users-finish."),
    ] = None,
) -> None:
    """Create the secrets of a deployment.

    A second run changes nothing. Renewing needs no downtime: docs/security.md has the steps.
    """
    if rotate is not None and encrypt:
        raise CommandError("--encrypt is chosen at the beginning, not with --rotate")
    names = _hosts(hosts)
    deployment = Deployment(folder, _owner(owner, Layout(folder)))
    if rotate is Rotation.CERTIFICATES:
        deployment.renew_certificates(names)
    elif rotate is Rotation.USERS:
        deployment.begin_users()
    elif rotate is Rotation.USERS_FINISH:
        deployment.finish_users()
    else:
        deployment.complete(names, encrypt=encrypt)
    for change in deployment.changes:
        typer.echo(change)
    if not deployment.changes:
        typer.echo(f"{folder}: everything is there, nothing was changed")
    if rotate is not None:
        typer.echo(f"next: {_NEXT[rotate].format(folder=folder)}")


def _hosts(value: str) -> list[str]:
    try:
        hosts = [check_host(part.strip()) for part in value.split(",") if part.strip()]
    except ValueError as error:
        raise CommandError(f"--hosts: {error}") from None
    if len(set(hosts)) < len(hosts):
        raise CommandError("--hosts: each host has one node, name it once")
    if len(hosts) == 2 or len(hosts) > 99:
        raise CommandError(f"--hosts: {len(hosts)} nodes make no cluster; name three or five hosts")
    return hosts


def _owner(value: str, layout: Layout) -> Owner:
    if not value:
        return _present_owner(layout) or (Owner(IMAGE_UID, IMAGE_UID) if os.geteuid() == 0 else Owner.myself())
    match = _OWNER.fullmatch(value)
    if match is None:
        raise CommandError(f"--owner {value}: give numbers, such as 10001 or 10001:10001")
    return Owner(int(match[1]), int(match[2] or match[1]))


def _present_owner(layout: Layout) -> Owner | None:
    """Return whose the secrets are: processes run as that user, and could not read another one's."""
    try:
        return Owner.of(layout.ca_certificate.lstat())
    except OSError:  # nothing is there yet; or somebody else's, which is refused later
        return None
