"""``fiq token``: the API tokens of a deployment."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import orjson
import typer

from services.cli import console
from services.cli.errors import CommandError
from services.cli.security.token_file import TokenFile
from services.contract.settings import seconds
from services.contract.tokens import (
    Scope,
    Token,
    check_name,
    digest_of,
    new_secret,
    parse_expiry,
    parse_prefix,
    parse_scopes,
)

#: longest life that is given as a span, seconds: a hundred years
_LONGEST = 100 * 365 * 86400

token = typer.Typer(
    name="token",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Make, list and revoke the API tokens of a deployment, without a restart.",
)

NameArgument = Annotated[str, typer.Argument(help="What it is called in the file, in logs and here.")]
DeploymentOption = Annotated[
    Path, typer.Option(help="Folder of the deployment, as `fiq init` made it; the current one by default.")
]
FileOption = Annotated[
    Path | None, typer.Option(help="A token file (FI_TOKEN_FILE) instead of a deployment's; made when it is missing.")
]


@token.command()
def new(
    name: NameArgument,
    scopes: Annotated[str, typer.Option(help="read, write or admin, which is both, separated by commas.")] = "write",
    prefix: Annotated[
        str, typer.Option(help="What the ids of its consultations begin with; all of them by default.")
    ] = "",
    expires: Annotated[str, typer.Option(help="When it ends: 90d, 12h, 2027-01-31 or 2027-01-31T12:00:00Z.")] = "",
    deployment: DeploymentOption = Path(),
    file: FileOption = None,
) -> None:
    """Make a token and print it, this once: the file has its hash only. It is good within a second."""
    try:
        secret = new_secret()
        made = Token(check_name(name), digest_of(secret), parse_scopes(scopes), parse_prefix(f"{prefix}*"))
        made = replace(made, expires=_end(expires))
    except ValueError as error:
        raise CommandError(str(error)) from None
    tokens = TokenFile(deployment, file)
    tokens.add(made)
    typer.echo(f"{name} is in {tokens.path}; its token is shown this once:", err=True)
    typer.echo(secret)


@token.command(name="list")
def list_(
    deployment: DeploymentOption = Path(),
    file: FileOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Show the tokens: their names and what they are for. The tokens themselves are nowhere."""
    found = TokenFile(deployment, file).read()
    if json:
        rows = [
            {
                "name": one.name,
                "scopes": _scopes(one),
                "prefix": one.prefix,
                "expires": None if one.expires is None else one.expires.isoformat(),
            }
            for one in found
        ]
        typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2))
        return
    table = console.table("name", "scopes", "consultations", "ends")
    for one in found:
        table.add_row(one.name, ", ".join(_scopes(one)), f"{one.prefix}*", _ends(one))
    console.out().print(table)


@token.command()
def revoke(
    name: NameArgument,
    deployment: DeploymentOption = Path(),
    file: FileOption = None,
) -> None:
    """Take a token away. Whoever sends it is refused within a second."""
    for change in TokenFile(deployment, file).remove(check_known(name)):
        typer.echo(change)


def check_known(name: str) -> str:
    """Return *name* when a token may be called that.

    Raises:
        CommandError: it may not.
    """
    try:
        return check_name(name)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _end(value: str) -> datetime | None:
    if not value:
        return None
    try:
        span = seconds(1, _LONGEST)(value)
    except ValueError:
        return parse_expiry(value)
    return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=span)


def _scopes(one: Token) -> list[str]:
    return [scope.value for scope in Scope if scope in one.scopes]


def _ends(one: Token) -> str:
    if one.expires is None:
        return "never"
    ended = "ended " if one.expires <= datetime.now(UTC) else ""
    return f"{ended}{one.expires:%Y-%m-%d %H:%M} UTC"
