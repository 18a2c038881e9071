"""API tokens and the token file.

A line of the file is ``name sha256 scopes prefix [expiry]``; ``#`` begins a comment. The file holds hashes only, so a
reader of the file gets no token. A token is 32 random bytes and cannot be guessed, so one round of SHA-256 is enough.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from fiq.errors import ConfigurationError
from fiq.words import count

#: first line of a file that the product writes: a file without tokens is not empty, a truncated one is
HEADER = "# name, SHA-256 of the token, scopes, prefix of the ids, end"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z0-9_-]{0,128}\*", re.ASCII)
_RANDOM_BYTES = 32
_NEVER = "-"
#: malformed lines of a token file that are named
_SHOWN = 3


class Scope(StrEnum):
    """What a token allows; ``admin`` includes the others."""

    READ = "read"
    WRITE = "write"
    #: the state of the pipeline, and the dead letters of all consultations
    OPS = "ops"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Token:
    """One line of the file.

    Attributes:
        name: shown in logs; unique in its file.
        digest: SHA-256 of the token, in hexadecimal.
        scopes: what it allows.
        prefix: of the ids of its consultations; empty for all of them.
        expires: UTC, or None.
    """

    name: str
    digest: str
    scopes: frozenset[Scope]
    prefix: str = ""
    expires: datetime | None = None

    def may(self, scope: Scope, consultation: str | None = None) -> bool:
        """Return whether it allows *scope*, and *consultation* where one is given; its expiry is not checked."""
        if scope not in self.scopes and Scope.ADMIN not in self.scopes:
            return False
        return consultation is None or consultation.startswith(self.prefix)

    def line(self) -> str:
        """Return its line of the file."""
        scopes = ",".join(scope for scope in Scope if scope in self.scopes)
        end = _NEVER if self.expires is None else self.expires.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return f"{self.name} {self.digest} {scopes} {self.prefix}* {end}"


def new_secret() -> str:
    """Make a token: 43 random characters of base64url."""
    return secrets.token_urlsafe(_RANDOM_BYTES)


def digest_of(secret: str) -> str:
    """Return the digest of the token *secret*."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def check_name(name: str) -> str:
    """Return *name*. Raises ValueError: it is no valid name of a token."""
    if _NAME.fullmatch(name) is None or name.startswith("."):
        raise ValueError("a name is 1 to 64 characters of A-Z a-z 0-9 _ - . and does not begin with a dot")
    return name


def parse_scopes(value: str) -> frozenset[Scope]:
    """Parse scopes such as ``read,write``. Raises ValueError: malformed."""
    try:
        return frozenset(Scope(part.strip()) for part in value.split(","))
    except ValueError:
        raise ValueError("scopes are read, write, ops or admin, separated by commas") from None


def parse_prefix(value: str) -> str:
    """Parse a prefix such as ``visit-*``; ``*`` is every consultation. Raises ValueError: malformed."""
    if _PREFIX.fullmatch(value) is None:
        raise ValueError("a prefix is up to 128 characters of A-Z a-z 0-9 _ - followed by *")
    return value[:-1]


def parse_expiry(value: str) -> datetime | None:
    """Parse ``2027-01-31``, ``2027-01-31T12:00:00Z`` or ``-`` for never.

    Raises ValueError: malformed, or a time without a time zone.
    """
    if value == _NEVER:
        return None
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("an expiry is a date, a time such as 2027-01-31T12:00:00Z, or -") from None
    if found.tzinfo is None:
        if "T" in value:
            raise ValueError("an expiry with a time of day needs a time zone, such as Z")
        found = found.replace(tzinfo=UTC)
    try:
        return found.astimezone(UTC)
    except OverflowError:
        raise ValueError("an expiry lies within the years 1 to 9999") from None


def parse(text: str) -> dict[str, Token]:
    """Parse a token file; return its tokens by their digests.

    Raises ConfigurationError: a line is malformed, or the file is empty (truncated). It gives line numbers, never text.
    """
    if not text.strip():
        raise ConfigurationError(["the token file is empty: make a token with  fiq token new"])
    found: dict[str, Token] = {}
    names: set[str] = set()
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            token = _token(words)
            if token.name in names or token.digest in found:
                raise ValueError("the name or the token is there twice")
        except ValueError as error:
            problems.append(f"line {number} of the token file: {error}")
            continue
        names.add(token.name)
        found[token.digest] = token
    if problems:
        more = len(problems) - _SHOWN
        raise ConfigurationError([*problems[:_SHOWN], *([f"and {count(more, 'line')} more"] if more > 0 else [])])
    return found


def render(tokens: Mapping[str, Token] | Iterable[Token]) -> str:
    """Return the text of a file with *tokens*."""
    values = tokens.values() if isinstance(tokens, Mapping) else tokens
    return "\n".join([HEADER, *(token.line() for token in values)]) + "\n"


def _token(words: list[str]) -> Token:
    if len(words) not in {4, 5}:
        raise ValueError("expected: name, SHA-256, scopes, prefix, and optionally an expiry")
    if _DIGEST.fullmatch(words[1]) is None:
        raise ValueError("a SHA-256 is 64 lower-case hexadecimal digits")
    expires = parse_expiry(words[4]) if len(words) == 5 else None
    return Token(check_name(words[0]), words[1], parse_scopes(words[2]), parse_prefix(words[3]), expires)
