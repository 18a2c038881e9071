"""``fiq repack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from services.cli import console
from services.cli.console import bar
from services.cli.errors import CommandError


def repack(
    path: Annotated[Path, typer.Argument(help="Data directory, or one partition file.")],
    output: Annotated[Path, typer.Argument(help="The directory, or the file, to make; must not exist.")],
) -> None:
    """Write a compact copy of a corpus for archiving, verified and compared with the original event by event.

    It has no journal: everything reads it, nothing writes it.
    """
    from services.corpus import CorpusError  # h5py is slow to import
    from services.corpus import repack as repack_corpus

    with bar("repacking") as show:
        try:
            done = repack_corpus(path, output, on_progress=lambda step, fraction: show(fraction, step))
        except CorpusError as error:
            raise CommandError(str(error)) from error
    table = console.table("file", ">consultations", ">events", ">before", ">after")
    for one in done:
        sizes = decimal(one.bytes_before), decimal(one.bytes_after)
        table.add_row(one.file, str(one.consultations), str(one.events), *sizes)
    console.out().print(table)
    before, after = sum(one.bytes_before for one in done), sum(one.bytes_after for one in done)
    typer.echo(f"{output}: {decimal(after)} instead of {decimal(before)} ({after / before:.0%}), equal to the original")
