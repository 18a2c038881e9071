"""How far a posting came, beside its file: nothing of an event stands in it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import orjson

from services.cli.errors import CommandError

#: it is written again after this at the soonest, seconds
_INTERVAL = 1.0


@dataclass(frozen=True, slots=True)
class Posting:
    """Which one it is: its key, the service's URL, the consultation of lines that name none."""

    key: str
    url: str
    consultation: str | None


class Checkpoint:
    """The file that says up to which line everything was accepted; None for no file at all."""

    def __init__(self, path: Path | None, posting: Posting) -> None:
        self._path = path
        self._posting = posting
        self._written_at = 0.0

    def load(self) -> int:
        """Return the number of the last line before which, and with which, all were accepted; 0 at the beginning.

        Raises:
            CommandError: the events have changed since, or the file cannot be read.
        """
        if self._path is None:
            return 0
        try:
            found = orjson.loads(self._path.read_bytes())
            posting, accepted = Posting(found["key"], found["url"], found["consultation"]), int(found["accepted"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CommandError(f"{self._path} cannot be read as the state of a posting: remove it") from error
        if (posting.url, posting.consultation) != (self._posting.url, self._posting.consultation):
            return 0
        if posting.key != self._posting.key:
            raise CommandError(
                f"what was posted in part, up to line {accepted}, has changed since: --key {posting.key} goes on "
                f"behind that line; without {self._path} everything is posted as new"
            )
        return accepted

    def save(self, accepted: int, *, now: bool = False) -> None:
        """Note that all lines up to number *accepted* are; at most once a second unless it has to be *now*.

        Raises:
            CommandError: the file cannot be written.
        """
        if self._path is None or (not now and time.monotonic() - self._written_at < _INTERVAL):
            return
        posting = self._posting
        document = {"key": posting.key, "url": posting.url, "consultation": posting.consultation, "accepted": accepted}
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))
            temporary.replace(self._path)
        except OSError as error:
            raise CommandError(
                f"cannot write {self._path}: {error.strerror}; name another place with --state"
            ) from error
        self._written_at = time.monotonic()

    def clear(self) -> None:
        """Forget it: everything is accepted."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
