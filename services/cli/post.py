"""``fiq post``."""

from __future__ import annotations

import asyncio
import os
import shlex
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import typer

from fiq.client import AsyncClient, RetryPolicy
from fiq.errors import InvalidIdError
from fiq.event import check_consultation_id, event_id_from_key, new_event_id
from services.cli.console import bar
from services.cli.embedded.stack import DEFAULT_FOLDER, StackFolder
from services.cli.errors import CommandError, NotRunningError
from services.cli.posting import Checked, Checkpoint, Poster, Posting, Tally, check, is_regular, lines
from services.core.lifecycle import Stop, run_until_stopped, stop_on_signals

#: bad lines that are printed
_SHOWN = 20
#: one try of a batch, seconds
_ATTEMPT = 30.0
_DEFAULT_URL = "http://127.0.0.1:7001"
#: of the posting: what is behind it for each line must fit, too
_LONGEST_KEY = 200
#: exit codes of the two signals: 128 and their numbers
_STOPPED = {"SIGINT": 130, "SIGTERM": 143}


@dataclass(frozen=True, slots=True)
class _Options:
    """How it is sent."""

    url: str
    token: str | None
    ca_file: Path | None
    consultation: str | None
    concurrency: int
    batch: int
    patience: float
    exported: bool


def post(
    file: Annotated[Path, typer.Argument(help="NDJSON, an event a line; - for stdin.")],
    url: Annotated[
        str | None, typer.Option(help="Of the service; that of a running `fiq up` or http://127.0.0.1:7001 otherwise.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of that `fiq up`; ./.fiq otherwise.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token; FI_TOKEN otherwise.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="PEM file of the authority behind an https URL.")] = None,
    consultation: Annotated[str | None, typer.Option(help="Of lines that name no consultation_id.")] = None,
    key: Annotated[
        str | None, typer.Option(help="Of the posting; the file's SHA-256, or a new one for a pipe, otherwise.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Keeps how far it came; FILE.posting otherwise.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Batches on their way at the same time.")] = 4,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Events of a batch.")] = 500,
    patience: Annotated[float, typer.Option(min=1, max=86400, help="How long each batch is tried, seconds.")] = 60,
    exported: Annotated[bool, typer.Option("--exported", help="It is of `fiq export`: each keeps its id.")] = False,
) -> None:
    """Post the events of a file; a stopped post can continue.

    Every line is looked at before the first one is sent. Events of one consultation keep their order.
    """
    _check_ids(consultation, key)
    # the ids of exported events are not in their bodies, where a batch would look for them
    batch = 1 if exported else batch
    options = _Options(
        _url(url, folder), _token(token_file), ca_file, consultation, concurrency, batch, patience, exported
    )
    with _opened(file) as source:
        if not is_regular(source):
            _post(source, options, key or _new_key(), state, None)
            return
        found = _checked(source, consultation, exported=exported)
        source.seek(0)
        beside = None if str(file) == "-" else file.with_name(f"{file.name}.posting")
        _post(source, options, key or found.digest, state or beside, found)


def _post(source: IO[bytes], options: _Options, key: str, state: Path | None, found: Checked | None) -> None:
    checkpoint = Checkpoint(state, Posting(key, options.url, options.consultation))
    tally, stop, started = Tally(done=checkpoint.load()), Stop(), time.monotonic()

    async def run() -> int | None:
        stop_on_signals(stop)
        return await run_until_stopped(_send(source, options, key, found, tally, on_accepted), stop)

    with bar("posting") as show:

        def on_accepted() -> None:
            checkpoint.save(tally.done)
            show(tally.accepted / found.events if found else 0.0, f"{tally.accepted:,} events")

        try:
            retried = asyncio.run(run())
        except CommandError as error:
            checkpoint.save(tally.done, now=True)
            raise CommandError(f"{error}\n{_how_far(tally, key, found)}") from None
    if retried is None:
        checkpoint.save(tally.done, now=True)
        typer.echo(f"fiq: {stop.reason}: {_how_far(tally, key, found)}", err=True)
        raise typer.Exit(_STOPPED[stop.reason])
    checkpoint.clear()
    seconds = time.monotonic() - started
    typer.echo(
        f"accepted    {tally.accepted:>10}\nduplicates  {tally.duplicates:>10}\n"
        f"retried     {retried:>10}\nseconds     {seconds:>10.1f}"
    )


async def _send(
    source: IO[bytes],
    options: _Options,
    key: str,
    found: Checked | None,
    tally: Tally,
    on_accepted: Callable[[], None],
) -> int:
    """Send everything and return how many tries were made again."""
    context = None if options.ca_file is None else _context(options.ca_file)
    retry = RetryPolicy(deadline=options.patience, attempt_timeout=min(_ATTEMPT, options.patience))
    size = None if found is None else found.size
    async with (
        AsyncClient(
            options.url, options.token, retry=retry, connections=options.concurrency, context=context
        ) as client,
        aclosing(
            lines(source, options.consultation, exported=options.exported, behind=tally.done, size=size)
        ) as events,
    ):
        poster = Poster(client, key, tally, lanes=options.concurrency, batch=options.batch, on_accepted=on_accepted)
        await poster.run(events)
        return client.retries


def _checked(source: IO[bytes], consultation: str | None, *, exported: bool) -> Checked:
    with bar("checking") as show:
        found = check(source, consultation, show, exported=exported)
    if found.wrong:
        for number, reason in found.wrong[:_SHOWN]:
            typer.echo(f"line {number}: {reason}", err=True)
        more = f", {len(found.wrong) - _SHOWN} more than are shown" if len(found.wrong) > _SHOWN else ""
        raise CommandError(f"{len(found.wrong)} of {found.events} lines are no events{more}; nothing was sent")
    return found


def _new_key() -> str:
    """Make the key of a posting that has none, and say at once what it is: a process that is killed says no more."""
    key = str(new_event_id())
    typer.echo(f"fiq: if this is stopped, the same input with  --key {key}  repeats no line", err=True)
    return key


def _how_far(tally: Tally, key: str, found: Checked | None) -> str:
    far = f"{tally.accepted} lines were accepted in this run"
    if tally.done:
        far += f"; up to line {tally.done} all of them are"
    if found is None:
        command = ["fiq", *sys.argv[1:]]
        if key not in command and f"--key={key}" not in command:
            command += ["--key", key]
        return f"{far}; with the same input from its beginning, which repeats none, go on with:  {shlex.join(command)}"
    changed = "" if key != found.digest else f", after a change of the file with  --key {key}"
    return f"{far}; the same command goes on and repeats none{changed}"


# -- arguments --------------------------------------------------------------------------------------------------------


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
        raise CommandError(str(error)) from None
    if key is not None and (len(key) > _LONGEST_KEY or '"' in key):
        raise CommandError(f"--key is at most {_LONGEST_KEY} characters, without quotes")


def _url(url: str | None, folder: Path | None) -> str:
    if url is not None:
        return url
    try:
        return StackFolder(folder or DEFAULT_FOLDER).read().ingest_url
    except NotRunningError:
        if folder is not None:
            raise
        return _DEFAULT_URL


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("FI_TOKEN", "").strip() or None
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise CommandError(f"{file} holds no token") from None


def _context(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # of which SSLError is one
        raise CommandError(f"cannot read certificates from {ca_file}: {error.strerror or error}") from error
