"""Changes a file of API tokens under the eyes of a service that reads it: replaced as a whole, never written over.

Compose mounts the folder in which it is, because a mounted file would stay the old one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.cli.errors import CommandError
from services.cli.security.files import Owner, Secrets
from services.cli.security.layout import Layout
from services.contract.errors import ConfigurationError
from services.contract.tokens import HEADER, Token, parse


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

        Raises:
            CommandError: there is no such file, or it is none.
        """
        return list(self._parsed(self._text()).values())

    def add(self, token: Token) -> None:
        """Add a line at the end.

        Raises:
            CommandError: the name is taken.
        """
        with self._alone() as secrets:
            text = f"{HEADER}\n" if self._layout is None and not self.path.exists() else self._text()
            if token.name in {one.name for one in self._parsed(text).values()}:
                raise CommandError(f"{self.path} has a token called {token.name}: revoke it first, or choose another")
            ended = text if text.endswith("\n") else f"{text}\n"
            secrets.replace(self.path, f"{ended}{token.line()}\n".encode())

    def remove(self, name: str) -> list[str]:
        """Take the token called *name* out, also the copy for clients that ``fiq init`` made; return what was done.

        Raises:
            CommandError: there is none.
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
