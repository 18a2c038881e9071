"""``fiq backup``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from services.cli import console
from services.cli.backup.cluster import ClusterView, look
from services.cli.backup.manifest import Manifest
from services.cli.console import bar
from services.cli.errors import BackupError
from services.cli.target import FolderOption, ServerOption, find_cluster, find_corpus

OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Do not ask the cluster; see the manual for what that means.")
]


def backup(
    dest: Annotated[Path, typer.Argument(help="The directory to make; must not exist.")],
    corpus: Annotated[
        Path | None, typer.Option(help="Data directory of the volume; else FI_DATA_DIR, ./.fiq/corpus or ./corpus.")
    ] = None,
    server: ServerOption = None,
    folder: FolderOption = None,
    offline: OfflineOption = False,
) -> None:
    """Copy a volume while persisters write, and verify it.

    The copy is a corpus that every reader opens. It appears under its name only when it is complete and good.
    """
    from fiq.corpus import CorpusError
    from services.cli.backup.making import make_backup, read_volume  # h5py is slow to import
    from services.persister.volume import note_backup

    source = find_corpus(corpus, folder)
    _, store = read_volume(source / "volume.json")
    seen = None if offline else _look(server, folder, store)
    with bar("backing up") as show:
        try:
            manifest = make_backup(source, dest, seen, show)
        except CorpusError as error:
            raise BackupError(f"{error}; no backup was made") from error
    _print(dest, manifest)
    try:
        note_backup(source, manifest.made)
    except OSError as error:
        console.err().print(
            f"fiq: the backup is good, but {source} cannot note it ({error.strerror}): `fiq doctor` and the alert "
            "FiqBackupOld do not know of it. Run fiq backup as the user of the persisters",
            soft_wrap=True,
        )


def _look(server: str | None, folder: Path | None, store: str) -> ClusterView:
    seen = asyncio.run(look(find_cluster(server, folder), store))
    if seen is None:
        raise BackupError("the cluster has no stream of events: is it the right one? Add --offline not to ask it")
    return seen


def _print(dest: Path, manifest: Manifest) -> None:
    print_contents(manifest)
    size = sum(entry.bytes for entry in manifest.files)
    events = sum(entry.events for entry in manifest.contents)
    needed = min((entry.committed for entry in manifest.contents), default=0) + 1
    typer.echo(
        f"{dest}: volume {manifest.volume}, {events} events, {decimal(size)}, verified. To be restored without a loss, "
        f"the stream must still begin at sequence {needed} or before: see FI_RETENTION"
    )


def print_contents(manifest: Manifest) -> None:
    """Print a table of the partition files."""
    sizes = {entry.name: entry.bytes for entry in manifest.files}
    table = console.table("file", ">committed", ">consultations", ">events", ">size")
    for entry in manifest.contents:
        numbers = str(entry.committed), str(entry.consultations), str(entry.events)
        table.add_row(entry.file, *numbers, decimal(sizes[entry.file]))
    console.out().print(table)
