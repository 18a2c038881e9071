"""``fiq logs``: the logs of a ``fiq up``, of all processes by time, readable and filtered; also after it has ended.

Services write JSON lines with an event name and values. Nodes write plain lines, whose times are the machine's. Both
become a :class:`LogLine`. A line without a time of its own, such as one of a traceback, belongs to the one before it.
"""

from __future__ import annotations

import heapq
import json as texts
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from services.cli import console
from services.cli.embedded.stack import DEFAULT_FOLDER
from services.cli.errors import CommandError
from services.cli.times import Period, SinceOption, UntilOption, iso

#: how much of the end of each log is read, unless all lines are asked for, bytes
_END_BYTES = 16 << 20
#: how often a followed log is read, seconds
_FOLLOW_SECONDS = 0.25
#: values of a JSON line that have a place of their own, or say nothing new
_PLACED = frozenset({"event", "level", "timestamp", "service", "component"})
#: a line of nats-server: process id, local time, level, text
_NODE_LINE = re.compile(r"\[\d+\] (\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{6}) \[([A-Z]{3})\] (.*)")
_NODE_LEVELS = {"TRC": "debug", "DBG": "debug", "WRN": "warning", "ERR": "error", "FTL": "error"}
_COLOURS = {"warning": "yellow", "error": "red", "critical": "red"}


class LogLevel(StrEnum):
    """How serious a line is."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


_ORDER = {level.value: number for number, level in enumerate(LogLevel)} | {"critical": len(LogLevel)}


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a log.

    Attributes:
        at: ISO 8601 in UTC with microseconds, so that texts sort as times do.
        part: name of the process in the stack.
        level: of :class:`LogLevel`.
        text: event name, or the line of a node.
        values: of the event.
    """

    at: str
    part: str
    level: str
    text: str
    values: dict[str, Any]

    def __str__(self) -> str:
        values = "".join(f" {name}={_value(value)}" for name, value in self.values.items())
        when = self.at[:23].replace("T", " ")
        return console.printable(f"{when}  {self.part:<12} {self.level:<8} {self.text}{values}")

    def document(self) -> dict[str, Any]:
        """Return it for scripts."""
        return {"time": self.at, "process": self.part, "level": self.level, "event": self.text, **self.values}


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else texts.dumps(value, ensure_ascii=False)
    return texts.dumps(text, ensure_ascii=False) if not text or " " in text or '"' in text else text


def logs(
    processes: Annotated[
        list[str] | None, typer.Argument(help="Names of processes, as `fiq up` prints them; all by default.")
    ] = None,
    level: Annotated[LogLevel, typer.Option(help="Only lines of this level or above.")] = LogLevel.DEBUG,
    grep: Annotated[str, typer.Option(help="Only lines with this text: an event name, an id, a value.")] = "",
    since: SinceOption = None,
    until: UntilOption = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Only the last ones; 0 for all.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines, until Ctrl-C.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print each line as a JSON object.")] = False,
    folder: Annotated[Path, typer.Option(help="Folder of the `fiq up`.")] = DEFAULT_FOLDER,
) -> None:
    """Show the logs of `fiq up`, of all processes by time.

    Also of one that has ended. Logs have no payloads.
    """
    period = Period.of(since, until)
    first, end = (iso(at) if at in _TIMES else "" for at in (period.since, period.until))

    def wanted(entry: LogLine) -> bool:
        in_time = entry.at >= first and not (end and entry.at >= end)
        return in_time and _ORDER.get(entry.level, 1) >= _ORDER[level] and (not grep or grep in str(entry))

    logs = _Logs(folder, processes or [], whole=not lines or bool(since))
    found = (entry for entry in logs.read() if wanted(entry))
    _show(found if not lines else deque(found, maxlen=lines), json=json)
    while follow:
        time.sleep(_FOLLOW_SECONDS)
        _show((entry for entry in logs.read() if wanted(entry)), json=json)


#: times that can be written as a text, nanoseconds since the Unix epoch
_TIMES = range(253_402_300_800 * 10**9)


def _show(entries: Iterable[LogLine], *, json: bool) -> None:
    for entry in entries:
        if json:
            typer.echo(orjson.dumps(entry.document()))
        else:
            typer.secho(str(entry), fg=_COLOURS.get(entry.level))


class _Logs:
    """The logs in the folder of a stack.

    Args:
        folder: of the stack.
        parts: names of the processes; all if there are none.
        whole: read all of each log, instead of its end.

    Raises CommandError: there are no logs, or none of a process that is named.
    """

    def __init__(self, folder: Path, parts: Sequence[str], *, whole: bool) -> None:
        self._folders = folder / "cluster", folder / "logs"
        self._parts = parts
        self._files: dict[Path, _LogFile] = {}
        found = {path.stem: path for path in self._paths()}
        if not found:
            raise CommandError(f"there are no logs in {folder}: start  fiq up, or name its folder with --folder")
        if missing := [part for part in parts if part not in found]:
            raise CommandError(f"no process {missing[0]!r} in {folder}: it has {', '.join(found)}")
        for path in self._chosen():
            self._files[path] = _LogFile(path, whole=whole)

    def read(self) -> Iterator[LogLine]:
        """Yield what has come since the last call, by time."""
        for path in self._chosen():
            self._files.setdefault(path, _LogFile(path, whole=True))
        return heapq.merge(*(file.read() for file in self._files.values()), key=attrgetter("at"))

    def _paths(self) -> list[Path]:
        return sorted(chain(*(folder.glob("*.log") for folder in self._folders)))

    def _chosen(self) -> list[Path]:
        return [path for path in self._paths() if not self._parts or path.stem in self._parts]


class _LogFile:
    """One log, read from where the last call ended."""

    def __init__(self, path: Path, *, whole: bool) -> None:
        self._path = path
        self._at = 0 if whole else max(0, path.stat().st_size - _END_BYTES)
        self._last = LogLine("", path.stem, "info", "", {})

    def read(self) -> Iterator[LogLine]:
        """Yield the new lines that are complete."""
        with self._path.open("rb") as file:
            if self._at > os.fstat(file.fileno()).st_size:  # it was begun anew
                self._at = 0
            file.seek(self._at)
            if self._at and self._last.at == "":
                self._at += len(file.readline())  # cut off by the limit
            while (raw := file.readline()).endswith(b"\n"):
                self._at += len(raw)
                self._last = _entry(raw.rstrip().decode("utf-8", "replace"), self._last)
                yield self._last


def _entry(line: str, before: LogLine) -> LogLine:
    """Read a line; one without a time has that of the line *before*."""
    if (match := _NODE_LINE.fullmatch(line)) is not None:
        moment = datetime.strptime(match[1], "%Y/%m/%d %H:%M:%S.%f").astimezone(UTC)
        at = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
        return LogLine(at, before.part, _NODE_LEVELS.get(match[2], "info"), match[3], {})
    try:
        found = orjson.loads(line)
        values = {name: value for name, value in found.items() if name not in _PLACED}
        return LogLine(str(found["timestamp"]), before.part, str(found["level"]), str(found["event"]), values)
    except (ValueError, KeyError, AttributeError, TypeError):
        return LogLine(before.at, before.part, before.level, line, {})
