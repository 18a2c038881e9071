"""Notices that files have changed, so that they are read again without a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from fiq.errors import ConfigurationError
from services.core.logs import get_logger

#: how often the files are looked at, seconds
LOOK_SECONDS = 1.0

#: what tells two versions of a file apart; None for one that cannot be seen
_Signature = tuple[int, int, int, int] | None


class WatchedFiles:
    """Files that belong together, and what reads them.

    What they say now stays in force when their new content is no good: *load* raises then, and changes nothing. That is
    told once for each reason, and tried again at each look, because a file may be looked at while it is being written.

    Args:
        what: their name in log lines.
        paths: of the files.
        load: reads them; raises ConfigurationError.
        on_state: told whether the last try went well.
    """

    def __init__(
        self, what: str, paths: Sequence[str], load: Callable[[], None], on_state: Callable[[bool], None]
    ) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._load = load
        self._on_state = on_state
        self._seen: tuple[_Signature, ...] | None = None
        self._said = ""
        self._log = get_logger("ingest.files")

    def start(self) -> None:
        """Read them for the first time. Raises ConfigurationError: they are no good."""
        seen = self._signatures()
        self._load()
        self._seen = seen
        self._on_state(True)

    def look(self) -> None:
        """Read them again if they have changed."""
        seen = self._signatures()
        if seen == self._seen:
            return
        try:
            self._load()
        except ConfigurationError as error:
            self._refused("; ".join(error.problems))
            return
        except Exception as error:  # noqa: BLE001 - whatever a file holds, it must not end the watch over all later ones
            self._refused(f"it cannot be read: {type(error).__name__}")
            return
        self._seen = seen
        self._said = ""
        self._on_state(True)
        self._log.info("FILE_READ_AGAIN", what=self._what)

    def _refused(self, reason: str) -> None:
        self._seen = None
        self._on_state(False)
        if reason != self._said:
            self._said = reason
            self._log.error("FILE_REFUSED", what=self._what, reason=reason, action="what was read before stays")

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def _signatures(self) -> tuple[_Signature, ...]:
        return tuple(_signature(path) for path in self._paths)


def read(path: str, variable: str) -> str:
    """Return the text of the file at *path*.

    Raises ConfigurationError: it cannot be read; the message names the setting *variable*.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError([f"{variable}={path}: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise ConfigurationError([f"{variable}={path}: it is no text in UTF-8"]) from None


def _signature(path: str) -> _Signature:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_dev, found.st_size
