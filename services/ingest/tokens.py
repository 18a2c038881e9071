"""The tokens that a process knows, from a file that is read again when it changes."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from hashlib import blake2b
from hmac import compare_digest

from services.contract import tokens
from services.contract.errors import ConfigurationError
from services.contract.tokens import Token, digest_of
from services.ingest.changes import read

VARIABLE = "FI_TOKEN_FILE"
#: the digest of nobody
ANONYMOUS = ""
#: what a token that is not known is compared with
_NOBODY = "0" * 64


class Tokens:
    """Tokens by their digests.

    The file's digest of a token is found by a hash of it with a key that this process alone has, and only then
    compared, in constant time: how long either takes tells nothing about any token or its digest, and does not grow
    with the number of tokens.

    Attributes:
        path: of the file; empty when no tokens are asked for, and everybody may everything.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._tokens: dict[str, Token] = {}
        self._key = secrets.token_bytes(32)
        #: digests by their hashes
        self._blinded: dict[bytes, str] = {}

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
        self._blinded = {self._blind(digest): digest for digest in self._tokens}

    def known(self, secret: str) -> str | None:
        """Return the digest of *secret* when it is a token that has not ended."""
        digest = digest_of(secret)
        ours = self._blinded.get(self._blind(digest), _NOBODY)
        return ours if compare_digest(ours, digest) and self.by_digest(ours) is not None else None

    def by_digest(self, digest: str) -> Token | None:
        """Return the token with *digest*, unless it has ended or there is none."""
        token = self._tokens.get(digest)
        if token is None or (token.expires is not None and token.expires <= datetime.now(UTC)):
            return None
        return token

    def _blind(self, digest: str) -> bytes:
        return blake2b(digest.encode(), key=self._key, digest_size=16).digest()
