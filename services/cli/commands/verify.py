"""``fiq verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.filesize import decimal

from services.cli import console
from services.cli.console import bar
from services.cli.errors import CommandError
from services.cli.target import FolderOption, find_corpus

#: what it means that a file does not begin with the stream
SEED = "earlier events are only in other stores; docs/operations.md, `A store that begins late`, says how to get them"

if TYPE_CHECKING:
    from services.corpus import Report


def verify(
    path: Annotated[
        Path | None,
        typer.Argument(help="Data directory, or one partition file; else FI_DATA_DIR, ./.fiq/corpus or ./corpus."),
    ] = None,
    folder: FolderOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Problems to print; the rest is counted.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document with every problem.")] = False,
) -> None:
    """Check every row, body and chain of a corpus, its journals and its index. Changes nothing; writers may work on.

    The exit code is 1 when anything is wrong.
    """
    report = _verified(find_corpus(path, folder))
    if json:
        typer.echo(orjson.dumps(report.to_dict(), option=orjson.OPT_INDENT_2))
    else:
        _print(report, limit)
    if not report.clean:
        raise typer.Exit(1)


def _verified(path: Path) -> Report:
    from services.corpus import CorpusError, verify_corpus  # h5py is slow to import

    with bar("verifying") as show:
        try:
            return verify_corpus(path, on_progress=lambda now: show(now.fraction, f"{now.events:,} events, {now.file}"))
        except CorpusError as error:
            raise CommandError(str(error)) from error


def _print(report: Report, limit: int) -> None:
    table = console.table("file", ">committed", ">consultations", ">events", ">payload", ">in the journal", ">problems")
    for one in report.partitions:
        table.add_row(
            one.file,
            str(one.committed),
            str(one.consultations),
            str(one.events),
            decimal(one.payload_bytes),
            "archive" if one.archived else f"{one.journal_records} commits",
            str(one.problems),
        )
    console.out().print(table)
    for begins, files in late(report):
        typer.echo(f"{files} begins at sequence {begins}: {SEED}")
    for problem in report.problems[:limit]:
        typer.echo(console.printable(str(problem)))
    more = len(report.problems) - limit
    if more > 0 and limit:
        typer.echo(f"and {more} more; --json has all")
    verdict = "clean" if report.clean else _count(len(report.problems), "problem")
    typer.echo(
        f"{verdict}: {_count(report.events, 'event')} of {_count(report.consultations, 'consultation')} in "
        f"{_count(len(report.partitions), 'file')}, "
        f"{report.seconds:.1f} s, {report.events_per_second:,.0f} events/s"
    )


def late(report: Report) -> list[tuple[int, str]]:
    """Return where files begin that do not begin with the stream, and the names of those files."""
    found: dict[int, list[str]] = {}
    for one in report.partitions:
        if one.begins > 1:
            found.setdefault(one.begins, []).append(one.file)
    return [(begins, ", ".join(files)) for begins, files in sorted(found.items())]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
