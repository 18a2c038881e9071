"""``fiq post``: posts the lines of a file, several batches at a time, so that a stopped post can continue.

A file is checked as a whole before the first line is sent. A :class:`Line` gets an idempotency key made of the post's
key (the file's SHA-256) and its number, so sending it again stores nothing twice. :class:`Sender` distributes the lines
to queues, all lines of one consultation to the same queue, and sends each queue's lines in order.
:class:`PostCheckpoint` keeps in a file up to which line everything is accepted; the same command continues from there.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shlex
import stat
import sys
import time
import zlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass
from os import fstat
from pathlib import Path
from typing import IO, Annotated
from uuid import UUID

import orjson
import typer

from fiq.client import Accepted, AsyncClient, ClientError, RefusedError, RetryPolicy
from fiq.errors import InvalidIdError, PoisonError
from fiq.event import InvalidBodyError, NotJsonError, check_body, check_consultation_id, event_id_from_key, new_event_id
from fiq.words import count
from services.cli.console import bar
from services.cli.errors import CommandError, UsageError
from services.cli.target import CaFileOption, ServiceTarget, TokenFileOption, UrlOption, find_service, trusting
from services.core.lifecycle import Stop, run_until_stopped, stop_on_signals

#: longest --key: the number of a line is appended to it
_LONGEST_KEY = 200
#: one try of a batch, seconds
_ATTEMPT = 30.0
#: exit codes of the two signals: 128 and their numbers
_STOPPED = {"SIGINT": 130, "SIGTERM": 143}
#: malformed lines that are printed; refused lines that a message names
_SHOWN, _NAMED = 20, 10
#: the checkpoint is written at most this often, seconds
_CHECKPOINT_SECONDS = 1.0
#: after this long without an accepted event, a post that is being retried says so, seconds
_WAITING_SECONDS = 3.0
#: bytes of a batch, at most, unless a single event has more
_BATCH_BYTES = 1 << 20
#: lines that share a key, and are told apart by their numbers. A batch has lines of one block only
_BLOCK = 10_000
#: lines that are read ahead, bytes, and what each counts for besides its body
_AHEAD_BYTES, _LINE_BYTES = 32 << 20, 500
#: bytes that are read at a time
_PIECE = 1 << 18
#: what precedes the event in a line of `fiq export`: before it there are only texts, in which quotes are escaped
_EXPORTED_EVENT = b',"event":'
#: problem types of a service without batches
_NO_BATCHES = frozenset({"/problems/not-found", "/problems/method-not-allowed"})


@dataclass(frozen=True, slots=True)
class _Options:
    service: ServiceTarget
    ca_file: Path | None
    consultation: str | None
    concurrency: int
    batch: int
    patience: float
    exported: bool


def post(
    file: Annotated[Path, typer.Argument(help="NDJSON, one event per line; - for stdin.")],
    url: UrlOption = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of that `fiq up`; ./.fiq by default.")] = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    consultation: Annotated[
        str | None, typer.Option(help="Consultation of the lines without a consultation_id.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Key of the post; by default the file's SHA-256, or a new one for a pipe.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="File for the progress; FILE.posting by default.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Batches in flight.")] = 4,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Events of a batch.")] = 500,
    patience: Annotated[float, typer.Option(min=1, max=86400, help="How long each batch is tried, seconds.")] = 60,
    exported: Annotated[
        bool, typer.Option("--exported", help="The file is from `fiq export`: keep the events' ids.")
    ] = False,
) -> None:
    """Post the events of a file; a stopped post can continue.

    Every line is checked before the first one is sent. Events of one consultation keep their order.
    """
    _check_ids(consultation, key)
    # the ids of exported events are not in their bodies, where a batch would look for them
    batch = 1 if exported else batch
    with _opened(file) as source:
        service = find_service(url, folder, token_file)
        options = _Options(service, ca_file, consultation, concurrency, batch, patience, exported)
        if not _is_regular(source):
            _post(source, options, key or _new_key(), state, None)
            return
        checked = _checked(source, consultation, exported=exported)
        source.seek(0)
        default = None if str(file) == "-" else file.with_name(f"{file.name}.posting")
        _post(source, options, key or checked.digest, state or default, checked)


def _post(source: IO[bytes], options: _Options, key: str, state: Path | None, checked: CheckedInput | None) -> None:
    checkpoint = PostCheckpoint(state, PostIdentity(key, options.service.url, options.consultation))
    progress, stop, started = PostProgress(done=checkpoint.load()), Stop(), time.monotonic()

    async def run() -> int | None:
        stop_on_signals(stop)
        return await run_until_stopped(_send(source, options, key, checked, progress, on_accepted), stop)

    with bar("posting") as show:

        def on_accepted() -> None:
            checkpoint.save(progress.done)
            show(progress.accepted / checked.events if checked else 0.0, f"events: {progress.accepted:,}")

        try:
            retries = asyncio.run(run())
        except CommandError as error:
            checkpoint.save(progress.done, now=True)
            raise CommandError(f"{error}\n{_how_to_continue(progress, key, checked)}") from None
    if retries is None:
        checkpoint.save(progress.done, now=True)
        typer.echo(f"fiq: {stop.reason}: {_how_to_continue(progress, key, checked)}", err=True)
        raise typer.Exit(_STOPPED[stop.reason])
    checkpoint.clear()
    seconds = time.monotonic() - started
    typer.echo(
        f"accepted    {progress.accepted:>10}\nduplicates  {progress.duplicates:>10}\n"
        f"retried     {retries:>10}\nseconds     {seconds:>10.1f}"
    )


async def _send(
    source: IO[bytes],
    options: _Options,
    key: str,
    checked: CheckedInput | None,
    progress: PostProgress,
    on_accepted: Callable[[], None],
) -> int:
    """Send everything and return the number of retries."""
    context, service = trusting(options.ca_file), options.service
    retry = RetryPolicy(deadline=options.patience, attempt_timeout=min(_ATTEMPT, options.patience))
    size = None if checked is None else checked.size
    async with (
        AsyncClient(
            service.url, service.token, retry=retry, connections=options.concurrency, context=context
        ) as client,
        aclosing(
            lines(source, options.consultation, exported=options.exported, after=progress.done, size=size)
        ) as events,
    ):
        typer.echo(f"fiq: posting to {service}", err=True)
        sender = Sender(
            client, key, progress, concurrency=options.concurrency, batch=options.batch, on_accepted=on_accepted
        )
        note = asyncio.create_task(_note_waiting(client, options, progress))
        try:
            await sender.run(events)
        finally:
            note.cancel()
        return client.retries


async def _note_waiting(client: AsyncClient, options: _Options, progress: PostProgress) -> None:
    """Say once that the service accepts nothing, when that has gone on for a while."""
    while True:
        accepted, retries = progress.accepted, client.retries
        await asyncio.sleep(_WAITING_SECONDS)
        if progress.accepted == accepted and client.retries > retries:
            typer.echo(
                f"fiq: {options.service.url} accepts nothing at the moment: does `fiq up` run? Each batch is tried for "
                f"{options.patience:g} s (--patience)",
                err=True,
            )
            return


def _checked(source: IO[bytes], consultation: str | None, *, exported: bool) -> CheckedInput:
    with bar("checking") as show:
        found = check(source, consultation, show, exported=exported)
    if found.malformed:
        for number, reason in found.malformed[:_SHOWN]:
            typer.echo(f"line {number}: {reason}", err=True)
        more = f", {len(found.malformed) - _SHOWN} more than are shown" if len(found.malformed) > _SHOWN else ""
        lines = count(found.events, "line")
        events = "an event" if len(found.malformed) == 1 else "events"
        raise CommandError(f"{len(found.malformed)} of {lines} cannot be {events}{more}; nothing was sent")
    return found


def _new_key() -> str:
    """Return a key for a post without one, and print it at once: a killed process cannot."""
    key = str(new_event_id())
    typer.echo(f"fiq: if this is stopped, the same input with  --key {key}  repeats no line", err=True)
    return key


def _how_to_continue(progress: PostProgress, key: str, checked: CheckedInput | None) -> str:
    far = f"{count(progress.accepted, 'line')} accepted in this run"
    if progress.done:
        far += f"; lines 1 to {progress.done} are all accepted"
    if checked is None:
        command = ["fiq", *sys.argv[1:]]
        if key not in command and f"--key={key}" not in command:
            command += ["--key", key]
        return f"{far}; with the same input from its beginning, continue with:  {shlex.join(command)}"
    changed = "" if key != checked.digest else f"; if you change the file, add  --key {key}"
    return f"{far}; the same command continues and repeats none{changed}"


# -- Arguments -------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    if str(file) == "-":
        yield sys.stdin.buffer
        return
    try:
        source = file.open("rb")
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error
    with source:
        yield source


def _check_ids(consultation: str | None, key: str | None) -> None:
    try:
        if consultation is not None:
            check_consultation_id(consultation)
        if key is not None:
            event_id_from_key(key)
    except InvalidIdError as error:
        raise UsageError(str(error)) from None
    if key is not None and (len(key) > _LONGEST_KEY or '"' in key):
        raise UsageError(f"--key is at most {_LONGEST_KEY} characters, without quotes")


# -- The checkpoint --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PostIdentity:
    """Which post it is: its key, the service's URL, and the consultation of lines that name none."""

    key: str
    url: str
    consultation: str | None


class PostCheckpoint:
    """The file that says up to which line everything was accepted; without a path it does nothing."""

    def __init__(self, path: Path | None, identity: PostIdentity) -> None:
        self._path = path
        self._identity = identity
        self._written_at = 0.0

    def load(self) -> int:
        """Return the line up to which all were accepted; 0 at the beginning.

        Raises CommandError: the events have changed since, or the file cannot be read.
        """
        if self._path is None:
            return 0
        try:
            found = orjson.loads(self._path.read_bytes())
            identity, accepted = PostIdentity(found["key"], found["url"], found["consultation"]), int(found["accepted"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CommandError(f"{self._path} cannot be read as the progress of a post: remove it") from error
        if (identity.url, identity.consultation) != (self._identity.url, self._identity.consultation):
            return 0
        if identity.key != self._identity.key:
            raise CommandError(
                f"the file was posted in part, up to line {accepted}, and has changed since: --key {identity.key} "
                f"continues after that line; remove {self._path} to post everything as new"
            )
        return accepted

    def save(self, accepted: int, *, now: bool = False) -> None:
        """Write that all lines up to number *accepted* are; at most once a second unless *now*.

        Raises CommandError: the file cannot be written.
        """
        if self._path is None or (not now and time.monotonic() - self._written_at < _CHECKPOINT_SECONDS):
            return
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        document = {**asdict(self._identity), "accepted": accepted}
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))
            temporary.replace(self._path)
        except OSError as error:
            raise CommandError(
                f"cannot write {self._path}: {error.strerror}; name another file with --state"
            ) from error
        self._written_at = time.monotonic()

    def clear(self) -> None:
        """Remove the file: everything is accepted."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


# -- Sending ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class PostProgress:
    """What was accepted so far.

    Attributes:
        accepted: lines that are stored.
        duplicates: those of them that had been stored before.
        done: number of the line up to which all are accepted.
    """

    accepted: int = 0
    duplicates: int = 0
    done: int = 0


class LineQueue:
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
        """Say that no more lines come."""
        self._ended = True
        self._changed.set()

    async def take(self, limit: int) -> list[Line]:
        """Wait for lines, and return those that may be one batch, at most *limit*; none at the end."""
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
        # lines that name no consultation are all of one
        return line.block == first.block and line.named == first.named and size + len(line.body) <= _BATCH_BYTES


class Sender:
    """Sends the lines of one post.

    Args:
        client: an open one.
        key: of the post.
        progress: kept up to date; the lines that it counts as done are not sent.
        concurrency: batches in flight.
        batch: events of a batch, at most.
        on_accepted: called after each batch.
    """

    def __init__(
        self,
        client: AsyncClient,
        key: str,
        progress: PostProgress,
        *,
        concurrency: int,
        batch: int,
        on_accepted: Callable[[], None],
    ) -> None:
        self._client = client
        self._key = key
        self._batch = batch
        self._on_accepted = on_accepted
        self._queues = [LineQueue() for _ in range(concurrency)]
        self._in_flight: dict[int, int] = {}  # sizes of lines by number, in their order
        self._bytes = 0
        self._last = progress.done
        self._room = asyncio.Event()
        self._has_batches = True
        self._progress = progress

    async def run(self, lines: AsyncIterator[Line]) -> None:
        """Send *lines* until all of them are accepted.

        Raises CommandError: a line was refused, not accepted in time, or is not an event; those before it are accepted
        or in flight, and none is ever stored twice.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for queue in self._queues:
                    group.create_task(self._send(queue))
                await self._distribute(lines)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _distribute(self, lines: AsyncIterator[Line]) -> None:
        malformed: PoisonError | None = None
        try:
            async for line in lines:
                self._last = line.number
                self._in_flight[line.number] = size = len(line.body) + _LINE_BYTES
                self._bytes += size
                # all events of a consultation go through one queue, which keeps their order
                self._queues[zlib.crc32(line.consultation.encode()) % len(self._queues)].put(line)
                await self._until(lambda: self._bytes <= _AHEAD_BYTES)
        except PoisonError as error:
            malformed = error  # the lines before it are sent nevertheless
        for queue in self._queues:
            queue.end()
        if malformed is not None:
            await self._until(lambda: not self._in_flight)
            raise CommandError(str(malformed))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._room.clear()
            await self._room.wait()

    async def _send(self, queue: LineQueue) -> None:
        while batch := await queue.take(self._batch):
            try:
                await self._post(batch)
            except ClientError as error:
                raise CommandError(_failure(batch, error)) from None

    async def _post(self, batch: Sequence[Line]) -> None:
        if self._has_batches and len(batch) > 1:
            first = batch[0]
            consultation = None if first.named else first.consultation
            bodies, numbers = [line.body for line in batch], [line.place for line in batch]
            try:
                key = f"{self._key}.{first.block}"
                self._note(batch, await self._client.post_batch(consultation, bodies, key, numbers))
            except RefusedError as refusal:
                if refusal.type not in _NO_BATCHES:
                    raise
                self._has_batches = False
            else:
                return
        for line in batch:
            key = line.event_id or f"{self._key}.{line.block}:{line.place}"
            self._note([line], [await self._client.post(line.consultation, line.body, key)])

    def _note(self, batch: Sequence[Line], accepted: Sequence[Accepted]) -> None:
        for line in batch:
            self._bytes -= self._in_flight.pop(line.number)
        self._room.set()
        progress = self._progress
        progress.accepted += len(accepted)
        progress.duplicates += sum(one.duplicate for one in accepted)
        progress.done = next(iter(self._in_flight), self._last + 1) - 1
        self._on_accepted()


def _failure(batch: Sequence[Line], error: ClientError) -> str:
    """Return what is wrong with which lines of the file."""
    refused = error.problem.lines if error.problem else ()
    if not refused:
        first, last = batch[0].number, batch[-1].number
        where = f"line {first}" if first == last else f"lines {first} to {last}"
        token = " (its token: --token-file or FI_TOKEN)" if error.status == 401 else ""
        return f"{where}: {error}{token}"
    start = batch[0].block * _BLOCK
    named = "; ".join(f"line {start + line.number}: {line.reason}" for line in refused[:_NAMED])
    more = f"; and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
    return f"{named}{more} ({error.type})"


# -- The lines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """One event.

    Attributes:
        number: of the line, from 1.
        consultation: the event's consultation.
        named: whether the line itself names it; otherwise the command does.
        event_id: the key in the line, or None.
        body: the line, byte for byte.
    """

    number: int
    consultation: str
    named: bool
    event_id: str | None
    body: bytes

    @property
    def block(self) -> int:
        """Number of its block of lines, from 0."""
        return (self.number - 1) // _BLOCK

    @property
    def place(self) -> int:
        """Its number within the block, from 1."""
        return (self.number - 1) % _BLOCK + 1


@dataclass(frozen=True, slots=True)
class CheckedInput:
    """What a file holds.

    Attributes:
        digest: SHA-256 of its bytes, in hexadecimal digits.
        size: bytes.
        events: lines that are not empty.
        malformed: the lines that are not events: number and reason.
    """

    digest: str
    size: int
    events: int
    malformed: list[tuple[int, str]]


def read_exported(number: int, raw: bytes) -> Line:
    """Read one line of `fiq export`: the event with its own id, byte for byte.

    Raises PoisonError: it is not such a line. The message quotes nothing of it.
    """
    before, separator, after = raw.partition(_EXPORTED_EVENT)
    try:
        document = orjson.loads(before + b"}")
        consultation, event_id = document["consultation"], str(UUID(document["event_id"]))
        if not separator or not after.endswith(b"}"):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidBodyError("it is not a line of `fiq export --format ndjson`") from None
    return Line(number, check_consultation_id(consultation), True, event_id, check_body(after[:-1]))


def read_line(number: int, raw: bytes, consultation: str | None, *, exported: bool = False) -> Line:
    """Read one line; *consultation* is for those that name none.

    Raises PoisonError: it is not an event. The message quotes nothing of it.
    """
    if exported:
        return read_exported(number, raw)
    try:
        body = check_body(raw)
    except NotJsonError as error:
        column = len(raw[: error.offset].decode("utf-8", "replace")) + 1
        raise InvalidBodyError(f"it is not JSON in UTF-8, from its column {column} on") from None
    document = orjson.loads(body)
    named, event_id = (document.get(name) for name in ("consultation_id", "event_id"))
    if named is None and consultation is None:
        if "consultation" in document and "event" in document:
            raise InvalidBodyError("it has no consultation_id: if the file is from `fiq export`, add --exported")
        raise InvalidBodyError("it has no consultation_id: name the consultation with --consultation")
    if named is not None and not isinstance(named, str):
        raise InvalidBodyError("consultation_id must be a string")
    if event_id is not None:
        if not isinstance(event_id, str):
            raise InvalidBodyError("event_id must be a string")
        event_id_from_key(event_id)
    owner = check_consultation_id(named or consultation or "")
    return Line(number, owner, named is not None, event_id, body)


def check(
    file: IO[bytes], consultation: str | None, on_progress: Callable[[float, str], None], *, exported: bool = False
) -> CheckedInput:
    """Read the whole *file* and find each line that is not an event."""
    digest, size, events = hashlib.sha256(), 0, 0
    total = max(1, fstat(file.fileno()).st_size)
    malformed: list[tuple[int, str]] = []
    for number, raw in enumerate(file, start=1):
        digest.update(raw)
        size += len(raw)
        if text := _text(raw):
            events += 1
            try:
                read_line(number, text, consultation, exported=exported)
            except PoisonError as error:
                malformed.append((number, str(error)))
        if number % 1000 == 0:
            on_progress(size / total, f"events: {events:,}")
    return CheckedInput(digest.hexdigest(), size, events, malformed)


async def lines(
    file: IO[bytes], consultation: str | None, *, exported: bool = False, after: int = 0, size: int | None = None
) -> AsyncGenerator[Line, None]:
    """Yield the lines of *file* that are not empty, as soon as they are there.

    Args:
        file: a regular one, or a pipe, a socket, a terminal.
        consultation: of lines that name none.
        exported: they are of `fiq export`.
        after: number of the line after which to begin.
        size: bytes that were checked; what was appended later is left. None for all.

    Raises PoisonError: a line is not an event; the message begins with the line's number.
    """
    number = 0
    async for piece in _whole_lines(file, size):
        for raw in piece:
            number += 1
            text = _text(raw)
            if text and number > after:
                try:
                    line = read_line(number, text, consultation, exported=exported)
                except PoisonError as error:
                    raise InvalidBodyError(f"line {number}: {error}") from None
                yield line


def _is_regular(file: IO[bytes]) -> bool:
    return stat.S_ISREG(fstat(file.fileno()).st_mode)


async def _whole_lines(file: IO[bytes], size: int | None) -> AsyncIterator[list[bytes]]:
    rest = b""
    async for piece in _of_file(file, size) if _is_regular(file) else _of_stream(file):
        *whole, rest = (rest + piece).split(b"\n")
        yield whole
    if rest:
        yield [rest]


async def _of_file(file: IO[bytes], size: int | None) -> AsyncIterator[bytes]:
    for piece in _pieces(file, size):
        yield piece
        await asyncio.sleep(0)  # the senders continue meanwhile


def _pieces(file: IO[bytes], size: int | None) -> Iterator[bytes]:
    left = size
    while piece := file.read(_PIECE if left is None else min(_PIECE, left)):
        left = None if left is None else left - len(piece)
        yield piece


async def _of_stream(file: IO[bytes]) -> AsyncIterator[bytes]:
    # in the loop: a thread that waits for input could not be stopped
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
