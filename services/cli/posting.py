"""Sends the lines of a posting: several batches at a time, those of one consultation one after the other."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
import zlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from os import fstat
from pathlib import Path
from typing import IO
from uuid import UUID

import orjson

from fiq.client import Accepted, AsyncClient, ClientError, RefusedError
from fiq.errors import PoisonError
from fiq.event import InvalidBodyError, check_body, check_consultation_id, event_id_from_key
from services.cli.errors import CommandError

#: what precedes the event in a line of `fiq export`: before it there are only texts, in which quotes are escaped
_EXPORTED_EVENT = b',"event":'
#: bytes that are read at a time
_PIECE = 1 << 18
#: it is written again after this at the soonest, seconds
_INTERVAL = 1.0
#: bytes of a batch, at most, unless a single event has more
_BATCH_BYTES = 1 << 20
#: lines that are read ahead of those that send, bytes, and what each counts for besides its body
_AHEAD_BYTES, _LINE_BYTES = 32 << 20, 500
#: lines of the file that share a key, and are told apart by their numbers. A batch has lines of one such block only
_BLOCK = 10_000
#: what a service without batches says
_NO_BATCHES = frozenset({"/problems/not-found", "/problems/method-not-allowed"})
#: lines that a message names at most
_NAMED = 10


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

        Raises CommandError: the events have changed since, or the file cannot be read.
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

        Raises CommandError: the file cannot be written.
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


@dataclass(slots=True)
class Tally:
    """What came of it so far.

    Attributes:
        accepted: lines that a quorum has, those among them that it had before.
        duplicates: those.
        done: number of the last line before which, and with which, all are accepted.
    """

    accepted: int = 0
    duplicates: int = 0
    done: int = 0


class Lane:
    """Lines that are sent one after the other."""

    def __init__(self) -> None:
        self._waiting: deque[Line] = deque()
        self._changed = asyncio.Event()
        self._ended = False

    def put(self, line: Line) -> None:
        """Add a line."""
        self._waiting.append(line)
        self._changed.set()

    def end(self) -> None:
        """Let it end behind the last line."""
        self._ended = True
        self._changed.set()

    async def take(self, limit: int) -> list[Line]:
        """Wait for lines, and return those that may go together, *limit* at most; none at the end."""
        while not self._waiting and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        batch: list[Line] = []
        size = 0
        while self._waiting and len(batch) < limit and (not batch or self._fits(batch[0], size)):
            size += len(self._waiting[0].body)
            batch.append(self._waiting.popleft())
        return batch

    def _fits(self, first: Line, size: int) -> bool:
        line = self._waiting[0]
        block = (line.number - 1) // _BLOCK == (first.number - 1) // _BLOCK
        # lines that name no consultation are all of one
        return block and line.named == first.named and size + len(line.body) <= _BATCH_BYTES


class Poster:
    """One posting.

    Args:
        client: an open one.
        key: of the posting: line n has a key made of it and n, unless it brings its own.
        tally: of what is accepted, kept up to date; what it says is done is not among the lines any more.
        lanes: batches on their way at the same time.
        batch: events of a batch, at most.
        on_accepted: called after each batch.
    """

    def __init__(
        self,
        client: AsyncClient,
        key: str,
        tally: Tally,
        *,
        lanes: int,
        batch: int,
        on_accepted: Callable[[], None],
    ) -> None:
        self._client = client
        self._key = key
        self._batch = batch
        self._on_accepted = on_accepted
        self._lanes = [Lane() for _ in range(lanes)]
        self._under_way: dict[int, int] = {}  # sizes of lines by number, in their order
        self._bytes = 0
        self._last = tally.done
        self._room = asyncio.Event()
        self._has_batches = True
        self._tally = tally

    async def run(self, lines: AsyncIterator[Line]) -> None:
        """Send *lines* until all of them are accepted.

        Raises CommandError: one was refused, not taken in time, or is no event; those before it are accepted or on
        their way, and none is ever stored twice.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for lane in self._lanes:
                    group.create_task(self._send(lane))
                await self._distribute(lines)
        except BaseExceptionGroup as group_of_errors:
            raise group_of_errors.exceptions[0] from None

    async def _distribute(self, lines: AsyncIterator[Line]) -> None:
        wrong: PoisonError | None = None
        try:
            async for line in lines:
                self._last = line.number
                self._under_way[line.number] = size = len(line.body) + _LINE_BYTES
                self._bytes += size
                # all events of a consultation go through one lane, which keeps their order
                self._lanes[zlib.crc32(line.consultation.encode()) % len(self._lanes)].put(line)
                await self._until(lambda: self._bytes <= _AHEAD_BYTES)
        except PoisonError as error:
            wrong = error  # the lines before it are sent all the same
        for lane in self._lanes:
            lane.end()
        if wrong is not None:
            await self._until(lambda: not self._under_way)
            raise CommandError(str(wrong))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._room.clear()
            await self._room.wait()

    async def _send(self, lane: Lane) -> None:
        while batch := await lane.take(self._batch):
            try:
                await self._post(batch)
            except ClientError as error:
                raise CommandError(_told(batch, error)) from None

    async def _post(self, batch: Sequence[Line]) -> None:
        """Send *batch*, in parts where the service takes no such batch."""
        if self._has_batches or _alone(batch):
            try:
                self._note(batch, await self._sent(batch))
            except RefusedError as refusal:
                if refusal.type in _NO_BATCHES and not _alone(batch):
                    self._has_batches = False
                elif refusal.status != 413 or _alone(batch):
                    raise
            else:
                return
        part = (len(batch) + 1) // 2 if self._has_batches else 1
        for start in range(0, len(batch), part):
            await self._post(batch[start : start + part])

    async def _sent(self, batch: Sequence[Line]) -> list[Accepted]:
        first = batch[0]
        key = f"{self._key}.{(first.number - 1) // _BLOCK}"
        numbers = [(line.number - 1) % _BLOCK + 1 for line in batch]
        if _alone(batch):
            return [await self._client.post(first.consultation, first.body, first.event_id or f"{key}:{numbers[0]}")]
        consultation = None if first.named else first.consultation
        return await self._client.post_batch(consultation, [line.body for line in batch], key, numbers)

    def _note(self, batch: Sequence[Line], accepted: Sequence[Accepted]) -> None:
        for line in batch:
            self._bytes -= self._under_way.pop(line.number)
        self._room.set()
        tally = self._tally
        tally.accepted += len(accepted)
        tally.duplicates += sum(one.duplicate for one in accepted)
        tally.done = next(iter(self._under_way), self._last + 1) - 1
        self._on_accepted()


def _alone(batch: Sequence[Line]) -> bool:
    return len(batch) == 1


def _told(batch: Sequence[Line], error: ClientError) -> str:
    """Return what is wrong with which lines of the file."""
    bad = error.problem.lines if error.problem else ()
    if not bad:
        where = f"line {batch[0].number}" if _alone(batch) else f"lines {batch[0].number} to {batch[-1].number}"
        token = " (its token: --token-file or FI_TOKEN)" if error.status == 401 else ""
        return f"{where}: {error}{token}"
    start = batch[0].number - (batch[0].number - 1) % _BLOCK - 1
    named = "; ".join(f"line {start + line.number}: {line.reason}" for line in bad[:_NAMED])
    more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return f"{named}{more} ({error.type})"


# -- The lines of an NDJSON file or stream, each of them an event ----------------------------------------------------


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

    Raises PoisonError: it is no such line. The message quotes nothing of it.
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

    Raises PoisonError: it is no event. The message quotes nothing of it.
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

    Raises PoisonError: a line is no event; it begins with the line's number.
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
