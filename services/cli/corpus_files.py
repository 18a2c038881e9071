"""The commands about the files of a corpus: ``fiq verify``, ``recover`` and ``repack``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.filesize import decimal

from fiq import corpus as library
from fiq.corpus import (
    CorpusError,
    CorpusLockedError,
    Recovered,
    Report,
    open_corpus,
    recover_partition,
    verify_corpus,
)
from fiq.words import count
from services.cli import console
from services.cli.console import JsonOption, bar
from services.cli.errors import CommandError
from services.cli.target import FolderOption, find_corpus
from services.log.status import Verified
from services.persister.volume import is_volume, note_verified

#: what it means that a file does not begin with the stream
_SEED = "earlier events are only in other stores; docs/operations.md, `A store that begins late`, says how to get them"


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

    Checks the index too, while persisters keep writing. Changes no data; of a volume it records the result for metrics
    and GET /pipeline. The exit code is 1 if anything is wrong.
    """
    found = find_corpus(path, folder, how="as PATH")
    report = _verified(found)
    _record(found, report)
    if json:
        typer.echo(orjson.dumps(report.to_dict(), option=orjson.OPT_INDENT_2))
    else:
        _print(report, limit)
    if not report.clean:
        raise typer.Exit(1)


def _verified(path: Path) -> Report:
    with bar("verifying") as show:
        try:
            return verify_corpus(
                path, on_progress=lambda now: show(now.fraction, f"events: {now.events:,}, {now.file}")
            )
        except CorpusError as error:
            raise CommandError(str(error)) from error


def _record(path: Path, report: Report) -> None:
    """Write down when the volume at *path* was verified and what was found; a copy or one file is no volume."""
    if not is_volume(path):
        return
    at = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        note_verified(path, Verified(at, report.events, len(report.problems)))
    except OSError as error:
        typer.echo(f"fiq: the result is not recorded: {error.filename or path}: {error.strerror}", err=True)


def _print(report: Report, limit: int) -> None:
    table = console.table("file", ">committed", ">consultations", ">events", ">payload", ">in the journal", ">problems")
    for one in report.partitions:
        table.add_row(
            one.file,
            str(one.committed),
            str(one.consultations),
            str(one.events),
            decimal(one.payload_bytes),
            "archive" if one.archived else count(one.journal_records, "commit"),
            str(one.problems),
        )
    console.show(table)
    for begins, files in _late(report):
        typer.echo(f"{files} begins at sequence {begins}: {_SEED}")
    for problem in report.problems[:limit]:
        typer.echo(console.printable(str(problem)))
    more = len(report.problems) - limit
    if more > 0 and limit:
        typer.echo(f"and {more} more; --json has all")
    verdict = "clean" if report.clean else count(len(report.problems), "problem")
    events, consultations = count(report.events, "event"), count(report.consultations, "consultation")
    typer.echo(
        f"{verdict}: {events} of {consultations} in {count(len(report.partitions), 'file')}, "
        f"{report.seconds:.1f} s, {report.events_per_second:,.0f} events/s"
    )


def _late(report: Report) -> list[tuple[int, str]]:
    """Return the first sequences of files that do not begin with the stream, and the names of those files."""
    found: dict[int, list[str]] = {}
    for one in report.partitions:
        if one.begins > 1:
            found.setdefault(one.begins, []).append(one.file)
    return [(begins, ", ".join(files)) for begins, files in sorted(found.items())]


def recover(
    path: Annotated[Path, typer.Argument(help="Data directory, or one partition file.")],
    names: Annotated[bool, typer.Option("--names", help="Write the indexes of names anew.")] = False,
    json: JsonOption = False,
) -> None:
    """Apply journals to their partition files.

    A persister does the same when it starts. The exit code is 1 if a file could not be recovered.
    """
    recovered: list[Recovered] = []
    failures: list[str] = []
    locked: dict[str, list[tuple[str, str]]] = {}  # messages that differ only by the file's name are shown once
    try:
        paths = open_corpus(path).paths
    except CorpusError as error:
        raise CommandError(str(error)) from error
    with bar("recovering") as show:
        for number, file in enumerate(paths):
            show(number / len(paths), file.name)
            try:
                done = recover_partition(file, names=names)
            except CorpusLockedError as error:
                locked.setdefault(str(error).replace(file.name, ""), []).append((file.name, str(error)))
            except CorpusError as error:
                failures.append(str(error))
            else:
                recovered.append(done)
                if done.held_back:
                    failures.append(f"{done.file}: {done.held_back}; nothing is lost, try again later")
    if json:
        typer.echo(orjson.dumps([asdict(done) for done in recovered], option=orjson.OPT_INDENT_2))
    elif recovered:
        table = console.table("file", ">committed", ">replayed", ">torn", "")
        for done in recovered:
            state = f"still in the journal: {done.held_back}" if done.held_back else "complete"
            table.add_row(done.file, str(done.committed), str(done.replayed), str(done.torn), state)
        console.show(table)
    for (_, reason), *others in locked.values():
        too = f" (and so for {', '.join(name for name, _ in others)})" if others else ""
        failures.append(f"{reason}{too}; its writer has recovered it, there is nothing to do")
    if failures:
        raise CommandError("\n  ".join(failures))


class HDF5Format(StrEnum):
    """The release of HDF5 that can read an archive."""

    V110 = "1.10"
    V108 = "1.8"


def repack(
    path: Annotated[Path, typer.Argument(help="Data directory, or one partition file.")],
    output: Annotated[Path, typer.Argument(help="Directory or file to create; must not exist.")],
    form: Annotated[HDF5Format, typer.Option("--format", help="1.8 for old and small readers.")] = HDF5Format.V110,
    json: JsonOption = False,
) -> None:
    """Write a compact, verified copy of a corpus.

    Every reader opens the copy. It has no journal and is read-only. Persisters may keep writing the original.
    """
    with bar("repacking") as show:
        try:
            portable = form is HDF5Format.V108
            done = library.repack(path, output, portable=portable, on_progress=lambda step, part: show(part, step))
        except CorpusError as error:
            raise CommandError(str(error)) from error
    if json:
        typer.echo(orjson.dumps([asdict(one) for one in done], option=orjson.OPT_INDENT_2))
        return
    table = console.table("file", ">consultations", ">events", ">before", ">after")
    for one in done:
        sizes = decimal(one.bytes_before), decimal(one.bytes_after)
        table.add_row(one.file, str(one.consultations), str(one.events), *sizes)
    console.show(table)
    before, after = sum(one.bytes_before for one in done), sum(one.bytes_after for one in done)
    typer.echo(f"{output}: {decimal(after)} instead of {decimal(before)} ({after / before:.0%}), equal to the original")
