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
    from fiq.corpus import Report


def verify(
    path: Annotated[
        Path | None,
        typer.Argument(help="Data directory, or one partition file; else FI_DATA_DIR, ./.fiq/corpus or ./corpus."),
    ] = None,
    folder: FolderOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Problems to print; the rest is counted.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document with every problem.")] = False,
) -> None:
    """Check every row, body, chain and journal of a corpus.

    Changes nothing; writers may work on.

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
    from fiq.corpus import CorpusError, verify_corpus  # h5py is slow to import

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


def recover(
    path: Annotated[Path, typer.Argument(help="Data directory, or one partition file.")],
) -> None:
    """Apply journals to their partition files.

    A persister does the same when it starts. The exit code is 1 when a file could not be recovered.
    """
    from fiq.corpus import CorpusError, CorpusLockedError, open_corpus, recover_partition  # h5py is slow to import

    table = console.table("file", ">committed", ">replayed", ">torn", "")
    failures: list[str] = []
    locked: dict[str, list[tuple[str, str]]] = {}  # what differs by the file's name only is told once
    try:
        paths = open_corpus(path).paths
    except CorpusError as error:
        raise CommandError(str(error)) from error
    with bar("recovering") as show:
        for number, file in enumerate(paths):
            show(number / len(paths), file.name)
            try:
                done = recover_partition(file)
            except CorpusLockedError as error:
                locked.setdefault(str(error).replace(file.name, ""), []).append((file.name, str(error)))
            except CorpusError as error:
                failures.append(str(error))
            else:
                state = f"still in the journal: {done.held_back}" if done.held_back else "complete"
                table.add_row(done.file, str(done.committed), str(done.replayed), str(done.torn), state)
                if done.held_back:
                    failures.append(f"{done.file}: {done.held_back}; nothing is lost, try again later")
    if table.row_count:
        console.out().print(table)
    for (_, reason), *others in locked.values():
        too = f" (and so for {', '.join(name for name, _ in others)})" if others else ""
        failures.append(f"{reason}{too}; a writer that lives has recovered its files, there is nothing to do")
    if failures:
        raise CommandError("\n  ".join(failures))


def repack(
    path: Annotated[Path, typer.Argument(help="Data directory, or one partition file.")],
    output: Annotated[Path, typer.Argument(help="The directory, or the file, to make; must not exist.")],
) -> None:
    """Write a compact, verified copy of a corpus.

    It has no journal: everything reads it, nothing writes it.
    """
    from fiq.corpus import CorpusError  # h5py is slow to import
    from fiq.corpus import repack as repack_corpus

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
