"""The lines of an NDJSON file or stream, each of them an event."""

from __future__ import annotations

import asyncio
import hashlib
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from os import fstat
from typing import IO
from uuid import UUID

import orjson

from services.contract.errors import PoisonError
from services.contract.event import InvalidBodyError, check_body
from services.contract.ids import check_consultation_id, event_id_from_key

#: what precedes the event in a line of `fiq export`: before it there are only texts, in which quotes are escaped
_EXPORTED_EVENT = b',"event":'
#: bytes that are read at a time
_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Line:
    """One event.

    Attributes:
        number: of the line, from 1.
        consultation: whose event it is.
        named: the line itself says so; otherwise the command does.
        event_id: the key that the line brings with it, or None.
        body: the line, byte for byte.
    """

    number: int
    consultation: str
    named: bool
    event_id: str | None
    body: bytes


@dataclass(frozen=True, slots=True)
class Checked:
    """What a file held when it was looked through.

    Attributes:
        digest: SHA-256 of its bytes, in hexadecimal digits.
        size: bytes.
        events: lines that are not empty.
        wrong: the lines that are no events: number and reason.
    """

    digest: str
    size: int
    events: int
    wrong: list[tuple[int, str]]


def read_exported(number: int, raw: bytes) -> Line:
    """Read one line of `fiq export`: the event with its own id, byte for byte.

    Raises:
        PoisonError: it is no such line. The message quotes nothing of it.
    """
    before, separator, after = raw.partition(_EXPORTED_EVENT)
    try:
        document = orjson.loads(before + b"}")
        consultation, event_id = document["consultation"], str(UUID(document["event_id"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidBodyError("it is no line of `fiq export --format ndjson`") from None
    if not separator or not after.endswith(b"}"):
        raise InvalidBodyError("it is no line of `fiq export --format ndjson`")
    return Line(number, check_consultation_id(consultation), True, event_id, check_body(after[:-1]))


def read_line(number: int, raw: bytes, consultation: str | None, *, exported: bool = False) -> Line:
    """Read one line; *consultation* is for those that name none.

    Raises:
        PoisonError: it is no event. The message quotes nothing of it.
    """
    if exported:
        return read_exported(number, raw)
    body = check_body(raw)
    document = orjson.loads(body)
    named, event_id = (document.get(name) for name in ("consultation_id", "event_id"))
    if named is None and consultation is None:
        raise InvalidBodyError("it names no consultation_id, and there is no --consultation")
    if named is not None and not isinstance(named, str):
        raise InvalidBodyError("consultation_id is a string")
    if event_id is not None:
        if not isinstance(event_id, str):
            raise InvalidBodyError("event_id is a string")
        event_id_from_key(event_id)
    owner = check_consultation_id(named or consultation or "")
    return Line(number, owner, named is not None, event_id, body)


def check(
    file: IO[bytes],
    consultation: str | None,
    on_progress: Callable[[float, str], None],
    *,
    exported: bool = False,
) -> Checked:
    """Look through the whole *file* and find each line that is no event."""
    digest, size, events = hashlib.sha256(), 0, 0
    total = max(1, fstat(file.fileno()).st_size)
    wrong: list[tuple[int, str]] = []
    for number, raw in enumerate(file, start=1):
        digest.update(raw)
        size += len(raw)
        if text := _text(raw):
            events += 1
            try:
                read_line(number, text, consultation, exported=exported)
            except PoisonError as error:
                wrong.append((number, str(error)))
        if number % 1000 == 0:
            on_progress(size / total, f"{events:,} events")
    return Checked(digest.hexdigest(), size, events, wrong)


async def lines(
    file: IO[bytes],
    consultation: str | None,
    *,
    exported: bool = False,
    behind: int = 0,
    size: int | None = None,
) -> AsyncGenerator[Line, None]:
    """Yield the lines of *file* that are not empty, as soon as they are there.

    Args:
        file: a regular one, or a pipe, a socket, a terminal.
        consultation: of lines that name none.
        exported: they are of `fiq export`.
        behind: number of the line behind which to begin.
        size: bytes that were looked through; what came later is left. None for all.

    Raises:
        PoisonError: a line is no event; it begins with the line's number.
    """
    number = 0
    async for piece in _whole_lines(file, size):
        for raw in piece:
            number += 1
            text = _text(raw)
            if text and number > behind:
                try:
                    line = read_line(number, text, consultation, exported=exported)
                except PoisonError as error:
                    raise InvalidBodyError(f"line {number}: {error}") from None
                yield line


def is_regular(file: IO[bytes]) -> bool:
    """Return whether *file* can be read twice."""
    return stat.S_ISREG(fstat(file.fileno()).st_mode)


async def _whole_lines(file: IO[bytes], size: int | None) -> AsyncIterator[list[bytes]]:
    rest = b""
    async for piece in _of_file(file, size) if is_regular(file) else _of_stream(file):
        *whole, rest = (rest + piece).split(b"\n")
        yield whole
    if rest:
        yield [rest]


async def _of_file(file: IO[bytes], size: int | None) -> AsyncIterator[bytes]:
    for piece in _pieces(file, size):
        yield piece
        await asyncio.sleep(0)  # whoever sends goes on meanwhile


def _pieces(file: IO[bytes], size: int | None) -> Iterator[bytes]:
    left = size
    while piece := file.read(_PIECE if left is None else min(_PIECE, left)):
        left = None if left is None else left - len(piece)
        yield piece


async def _of_stream(file: IO[bytes]) -> AsyncIterator[bytes]:
    # in the loop, not in a thread: one that waits for input could not be ended
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    try:
        while piece := await reader.read(_PIECE):
            yield piece
    finally:
        transport.close()


def _text(raw: bytes) -> bytes:
    return raw.strip(b" \t\r\n")
