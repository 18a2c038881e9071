"""The tokens that a process knows, from a file that is read again when it changes."""

from __future__ import annotations

from datetime import UTC, datetime

from services.contract import tokens
from services.contract.errors import ConfigurationError
from services.contract.tokens import Token, digest_of
from services.ingest.changes import read

VARIABLE = "FI_TOKEN_FILE"
#: the digest of nobody
ANONYMOUS = ""


class Tokens:
    """Tokens by their digests.

    A token is looked up by its SHA-256 in a dict. How long that takes may tell something about the digest, which
    nobody can choose, and nothing about the token, of which it is the hash: so there is no comparison that would have
    to take the same time for all tokens. That holds because a token is 256 random bits and no password.

    Attributes:
        path: of the file; empty when no tokens are asked for, and everybody may everything.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._tokens: dict[str, Token] = {}

    @property
    def asked_for(self) -> bool:
        """Whether a request needs a token."""
        return bool(self.path)

    @property
    def names(self) -> set[str]:
        """Names of all tokens, also of those that have ended."""
        return {token.name for token in self._tokens.values()}

    def load(self) -> None:
        """Read the file.

        Raises:
            ConfigurationError: it cannot be read, or is none; the tokens stay as they were.
        """
        try:
            self._tokens = tokens.parse(read(self.path, VARIABLE))
        except ConfigurationError as error:
            marked = [one if one.startswith(VARIABLE) else f"{VARIABLE}={self.path}: {one}" for one in error.problems]
            raise ConfigurationError(marked) from None

    def known(self, secret: str) -> str | None:
        """Return the digest of *secret* when it is a token that has not ended."""
        digest = digest_of(secret)
        return digest if self.by_digest(digest) is not None else None

    def by_digest(self, digest: str) -> Token | None:
        """Return the token with *digest*, unless it has ended or there is none."""
        token = self._tokens.get(digest)
        if token is None or (token.expires is not None and token.expires <= datetime.now(UTC)):
            return None
        return token
