"""``fiq show``."""

from __future__ import annotations

from typing import Annotated

import orjson
import typer

from services.cli import console
from services.cli.consultations import iso, opened
from services.cli.target import CorpusOption, FolderOption, find_corpus


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
