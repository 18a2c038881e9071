"""``fiq token``: the API tokens of a deployment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import orjson
import typer

from fiq.errors import ConfigurationError
from services.cli import console
from services.cli.errors import CommandError
from services.cli.init.files import Layout, Owner, Secrets
from services.core.settings import seconds
from services.core.tokens import (
    HEADER,
    Scope,
    Token,
    check_name,
    digest_of,
    new_secret,
    parse,
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
    help="Create, list and revoke API tokens without a restart.",
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

    Raises CommandError: it may not.
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


# -- Changes a file of API tokens under the eyes of a service that reads it: replaced as a whole, never written over -
#
# Compose mounts the folder in which it is, because a mounted file would stay the old one.


class TokenFile:
    """The file of a deployment, or one of its own.

    Attributes:
        path: of the file.

    Args:
        deployment: folder that ``fiq init`` made.
        file: instead of it.
    """

    def __init__(self, deployment: Path, file: Path | None) -> None:
        self._layout = Layout(deployment.absolute()) if file is None else None
        self.path = self._layout.tokens if self._layout is not None else Path(file or "").absolute()

    def read(self) -> list[Token]:
        """Return the tokens, in their order.

        Raises CommandError: there is no such file, or it is none.
        """
        return list(self._parsed(self._text()).values())

    def add(self, token: Token) -> None:
        """Add a line at the end.

        Raises CommandError: the name is taken.
        """
        with self._alone() as secrets:
            text = f"{HEADER}\n" if self._layout is None and not self.path.exists() else self._text()
            if token.name in {one.name for one in self._parsed(text).values()}:
                raise CommandError(f"{self.path} has a token called {token.name}: revoke it first, or choose another")
            ended = text if text.endswith("\n") else f"{text}\n"
            secrets.replace(self.path, f"{ended}{token.line()}\n".encode())

    def remove(self, name: str) -> list[str]:
        """Take the token called *name* out, also the copy for clients that ``fiq init`` made; return what was done.

        Raises CommandError: there is none.
        """
        with self._alone() as secrets:
            text = self._text()
            if name not in {one.name for one in self._parsed(text).values()}:
                raise CommandError(f"{self.path} has no token called {name}: see  fiq token list")
            lines = [line for line in text.splitlines() if line.partition("#")[0].split()[:1] != [name]]
            # a file without any token begins with a comment, or the service would take it for one that was cut off
            kept = lines if any(line.strip() for line in lines) else [HEADER]
            secrets.replace(self.path, "".join(f"{line}\n" for line in kept).encode())
            if self._layout is not None and self._layout.token(name).exists():
                secrets.remove(self._layout.token(name))
        return secrets.changes

    @contextmanager
    def _alone(self) -> Iterator[Secrets]:
        """Keep others from changing it meanwhile; what is written belongs to whom the file or its folder does."""
        folder = self.path.parent
        if not folder.is_dir():
            raise CommandError(f"{folder} does not exist: make the deployment with  fiq init, or name a --file")
        secrets = Secrets(Owner.of((self.path if self.path.exists() else folder).stat()))
        with secrets.alone(self._layout.secrets if self._layout is not None else folder):
            yield secrets

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            hint = "make the deployment with  fiq init, or name it with --deployment or --file"
            raise CommandError(f"{self.path} does not exist: {hint}") from None
        except UnicodeDecodeError:
            raise CommandError(f"{self.path} is no text in UTF-8") from None

    def _parsed(self, text: str) -> dict[str, Token]:
        try:
            return parse(text)
        except ConfigurationError as error:
            raise CommandError(f"{self.path}: {'; '.join(error.problems)}") from None
