"""``fiq export``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import orjson
import typer

from services.cli import console
from services.cli.consultations import Format, iso, lines, opened, opened_corpus
from services.cli.errors import CommandError
from services.cli.target import CorpusOption, FolderOption, find_corpus

if TYPE_CHECKING:
    from services.corpus import EventRecord


def export(
    consultation: Annotated[
        str | None, typer.Argument(help="Id of the consultation; all of them, one after the other, with --after.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", "-f", help="ndjson and json carry each event byte for byte.")] = (
        Format.NDJSON
    ),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, complete or not at all; stdout otherwise.")
    ] = None,
    after: Annotated[int | None, typer.Option(min=0, help="Only events after this sequence of the stream.")] = None,
    corpus: CorpusOption = None,
    folder: FolderOption = None,
) -> None:
    """Write a consultation's events in stream order, one at a time, however many there are."""
    with _events(find_corpus(corpus, folder), consultation, after) as found, _target(output) as file:
        for piece in lines(found, form):
            file.write(piece)


@contextlib.contextmanager
def _events(path: Path, consultation: str | None, after: int | None) -> Iterator[Iterator[EventRecord]]:
    if consultation is not None:
        with opened(path, consultation) as found:
            yield (event for event in found if event.sequence > (after or 0))
        return
    if after is None:
        raise CommandError("name a consultation, or with --after a sequence: then all of them are written")
    with opened_corpus(path) as corpus:
        yield (
            event
            for name in corpus.consultations()
            if len(events := corpus[name]) and events.table(len(events) - 1)["seq"][0] > after
            for event in events
            if event.sequence > after
        )


@contextlib.contextmanager
def _target(output: Path | None) -> Iterator[BinaryIO]:
    if output is None or str(output) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with _file(output) as file:
            yield file
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error


@contextlib.contextmanager
def _file(output: Path) -> Iterator[BinaryIO]:
    if output.exists() and not output.is_file():  # a pipe or a device cannot be replaced
        with output.open("wb") as file:
            yield file
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        # medical data: for the owner only
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            yield file
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def show(
    consultation: Annotated[str, typer.Argument(help="Id of the consultation.")],
    corpus: CorpusOption = None,
    folder: FolderOption = None,
) -> None:
    """Print a consultation's events, one line each: sequence, time, type, payload.

    Sees everything that is committed, also while persisters write.
    """
    with opened(find_corpus(corpus, folder), consultation) as found:
        typer.echo(f"{found.id}: {len(found)} event{'' if len(found) == 1 else 's'}")
        for event in found:
            payload = orjson.dumps(event.payload).decode("utf-8")
            line = f"{event.sequence:>10}  {iso(event.received_ns)}  {event.event_type}  {payload}"
            typer.echo(console.printable(line))
