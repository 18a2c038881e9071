"""Sends the lines of a posting: several batches at a time, those of one consultation one after the other."""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from services.cli.errors import CommandError
from services.cli.posting.lines import Line
from services.client import Accepted, ClientError, FiqClient, RefusedError
from services.contract.errors import PoisonError

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
        client: FiqClient,
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

        Raises:
            CommandError: one was refused, not taken in time, or is no event; those before it are accepted or on
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
