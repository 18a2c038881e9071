"""``fiq recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli import console
from services.cli.console import bar
from services.cli.errors import CommandError


def recover(
    path: Annotated[Path, typer.Argument(help="Data directory, or one partition file.")],
) -> None:
    """Copy what journals hold into their partition files, without the service.

    A persister does the same when it starts. The exit code is 1 when a file could not be recovered.
    """
    from services.corpus import CorpusError, CorpusLockedError, open_corpus, recover_partition  # h5py is slow to import

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
