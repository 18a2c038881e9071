"""``fiq token``: the API tokens of a deployment, in a file that a running ingest reads again within a second."""

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
from services.cli.console import JsonOption
from services.cli.errors import CommandError, UsageError
from services.cli.init.files import FileOwner, Layout, Secrets
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

_EXPIRIES = "expected a span such as 90d or 12h, a date, or a time with its zone such as 2027-01-31T12:00:00Z"
#: longest expiry given as a span, seconds: a hundred years
_LONGEST = 100 * 365 * 86400

token = typer.Typer(
    name="token",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Create, list and revoke API tokens without a restart.",
)

NameArgument = Annotated[str, typer.Argument(help="Its name in the file, in logs and here.")]
DeploymentOption = Annotated[Path, typer.Option(help="Folder that `fiq init` made; the current one by default.")]
FileOption = Annotated[
    Path | None, typer.Option(help="A token file (FI_TOKEN_FILE) instead of a deployment's; made if it is missing.")
]


@token.command()
def new(
    name: NameArgument,
    scopes: Annotated[str, typer.Option(help="read, write, ops, or admin for all, separated by commas.")] = "write",
    prefix: Annotated[str, typer.Option(help="Prefix of the ids of its consultations; all of them by default.")] = "",
    expires: Annotated[str, typer.Option(help="When it expires: 90d, 12h, 2027-01-31 or 2027-01-31T12:00:00Z.")] = "",
    deployment: DeploymentOption = Path(),
    file: FileOption = None,
) -> None:
    """Create a token and print it once: the file has only its hash. It is valid within a second."""
    try:
        secret = new_secret()
        made = Token(check_name(name), digest_of(secret), parse_scopes(scopes), parse_prefix(f"{prefix}*"))
        made = replace(made, expires=_expiry(expires))
        if prefix and Scope.OPS in made.scopes:
            raise ValueError("the scope ops is about all consultations: leave --prefix out, or name other --scopes")
    except ValueError as error:
        raise UsageError(str(error)) from None
    tokens = TokenFile(deployment, file)
    tokens.add(made)
    typer.echo(f"{name} is in {tokens.path}; its token is shown only this once:", err=True)
    typer.echo(secret)


@token.command(name="list")
def list_(
    deployment: DeploymentOption = Path(),
    file: FileOption = None,
    json: JsonOption = False,
) -> None:
    """Show names, scopes, prefixes and expiry. The tokens themselves are stored nowhere."""
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
    table = console.table("name", "scopes", "consultations", "expires")
    for one in found:
        table.add_row(one.name, ", ".join(_scopes(one)), f"{one.prefix}*", _shown_expiry(one))
    console.show(table)


@token.command()
def revoke(
    name: NameArgument,
    deployment: DeploymentOption = Path(),
    file: FileOption = None,
) -> None:
    """Revoke a token. Requests with it are refused within a second."""
    try:
        check_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for change in TokenFile(deployment, file).remove(name):
        typer.echo(change)


def _expiry(value: str) -> datetime | None:
    if not value:
        return None
    try:
        if not value[-1].isalpha():
            raise ValueError("a number without a unit may be a year")
        span = seconds(1, _LONGEST)(value)
    except ValueError:
        try:
            moment = parse_expiry(value)
        except ValueError:
            raise ValueError(f"--expires {value}: {_EXPIRIES}") from None
        if moment is not None and moment <= datetime.now(UTC):
            raise ValueError(f"--expires {value} is in the past: the token would never be accepted") from None
        return moment
    return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=span)


def _scopes(one: Token) -> list[str]:
    return [scope.value for scope in Scope if scope in one.scopes]


def _shown_expiry(one: Token) -> str:
    if one.expires is None:
        return "never"
    ended = "expired " if one.expires <= datetime.now(UTC) else ""
    return f"{ended}{one.expires:%Y-%m-%d %H:%M} UTC"


# -- The token file: replaced as a whole, because a running ingest reads it -------------------------------------------


class TokenFile:
    """The token file of a *deployment*, or *file*."""

    def __init__(self, deployment: Path, file: Path | None) -> None:
        self._layout = Layout(deployment.absolute()) if file is None else None
        self.path = self._layout.tokens if self._layout is not None else Path(file or "").absolute()

    def read(self) -> list[Token]:
        """Return the tokens, in their order. Raises CommandError: there is no such file, or it is malformed."""
        return list(self._parsed(self._text()).values())

    def add(self, token: Token) -> None:
        """Append a token. Raises CommandError: the name is taken."""
        with self._locked() as secrets:
            text = f"{HEADER}\n" if self._layout is None and not self.path.exists() else self._text()
            if token.name in {one.name for one in self._parsed(text).values()}:
                raise CommandError(f"{self.path} has a token called {token.name}: revoke it first, or choose another")
            ended = text if text.endswith("\n") else f"{text}\n"
            secrets.replace(self.path, f"{ended}{token.line()}\n".encode())

    def remove(self, name: str) -> list[str]:
        """Remove the token called *name*, and the copy for clients that ``fiq init`` made; return what was done.

        Raises CommandError: there is no such token.
        """
        with self._locked() as secrets:
            text = self._text()
            if name not in {one.name for one in self._parsed(text).values()}:
                raise CommandError(f"{self.path} has no token called {name}: see  fiq token list")
            lines = [line for line in text.splitlines() if line.partition("#")[0].split()[:1] != [name]]
            # an empty file would look truncated to the service
            kept = lines if any(line.strip() for line in lines) else [HEADER]
            secrets.replace(self.path, "".join(f"{line}\n" for line in kept).encode())
            if self._layout is not None and self._layout.token(name).exists():
                secrets.remove(self._layout.token(name))
        return secrets.changes

    @contextmanager
    def _locked(self) -> Iterator[Secrets]:
        """Lock the file against other processes; yield a writer that keeps its owner, or its folder's."""
        folder = self.path.parent
        if not folder.is_dir():
            what = "make the deployment with  fiq init, or name a --file" if self._layout else "make that folder first"
            raise CommandError(f"{folder} does not exist: {what}")
        root = self._layout.folder if self._layout is not None else folder
        owner = FileOwner.of((self.path if self.path.exists() else folder).stat())
        secrets = Secrets(root, lambda _: owner)
        with secrets.alone(self._layout.secrets if self._layout is not None else folder):
            yield secrets

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            hint = "make the deployment with  fiq init, or name it with --deployment or --file"
            raise CommandError(f"{self.path} does not exist: {hint}") from None
        except UnicodeDecodeError:
            raise CommandError(f"{self.path} is not UTF-8 text") from None

    def _parsed(self, text: str) -> dict[str, Token]:
        try:
            return parse(text)
        except ConfigurationError as error:
            raise CommandError(f"{self.path}: {'; '.join(error.problems)}") from None
