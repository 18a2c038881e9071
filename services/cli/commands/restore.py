"""``fiq restore``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from services.cli.backup.cluster import ClusterView, hold_trim, look, renew_places
from services.cli.backup.fitting import Fit, compare
from services.cli.backup.manifest import Manifest
from services.cli.commands.backup import OfflineOption, print_contents
from services.cli.console import err
from services.cli.errors import CommandError, RestoreRefusedError
from services.cli.progress import bar
from services.cli.target import FolderOption, ServerOption, Target, find_cluster
from services.eventlog.partitions import partition_name


def restore(
    source: Annotated[Path, typer.Argument(help="A directory that `fiq backup` made.")],
    to: Annotated[Path, typer.Option("--to", help="Data directory of the volume, the FI_DATA_DIR of its persisters.")],
    server: ServerOption = None,
    folder: FolderOption = None,
    offline: OfflineOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Restore although the cluster does not fit; what that means is printed.")
    ] = False,
) -> None:
    """Put a volume back after its loss. The stream brings what came after the backup, when persisters start.

    Every file is compared with the manifest, and the backup with the stream, before anything is put in place.
    """
    from services.cli.backup.restoring import check_source, put_back, reserved  # h5py is slow to import
    from services.corpus import CorpusError

    manifest = Manifest.read(source)
    check_source(source, manifest)
    target = None if offline else find_cluster(server, folder)

    def shut_out() -> None:
        if target is not None and fit.epochs:
            asyncio.run(renew_places(target, manifest.store, manifest.volume, fit.epochs))

    with reserved(to):
        fit = Fit() if target is None else asyncio.run(_fitted(target, manifest, force=force))
        with bar("restoring") as show:
            try:
                put_back(source, manifest, to, fit, before_move=shut_out, on_progress=show)
            except CorpusError as error:
                raise CommandError(f"{error}; nothing was restored") from error
    _print(to, manifest, fit)


async def _fitted(target: Target, manifest: Manifest, *, force: bool) -> Fit:
    """Compare the backup with the cluster, and keep the stream from being trimmed any further."""
    seen = await look(target, manifest.store)
    fit = _checked(manifest, seen, force=force)
    if seen is None or seen.created != manifest.stream_created:
        return fit
    reached = {entry.partition: entry.committed for entry in manifest.contents}
    await hold_trim(target, manifest.store, manifest.volume, reached, seen)
    # it may have been trimmed between the look and the hold
    return _checked(manifest, await look(target, manifest.store), force=force)


def _checked(manifest: Manifest, seen: ClusterView | None, *, force: bool) -> Fit:
    fit = compare(manifest, seen)
    if fit.fatal:
        raise RestoreRefusedError("\n  ".join(fit.fatal))
    if fit.problems and not force:
        raise RestoreRefusedError("\n  ".join((*fit.problems, "Nothing was restored; --force restores all the same.")))
    return fit


def _print(to: Path, manifest: Manifest, fit: Fit) -> None:
    print_contents(manifest)
    for remark in fit.remarks:
        err().print(f"fiq: {remark}", soft_wrap=True)
    for problem in fit.problems:
        err().print(f"fiq: restored although {problem}", soft_wrap=True)
    for gap in fit.gaps:
        name = partition_name(gap.partition)
        err().print(f"fiq: given up: partition {name}, sequences {gap.first} to {gap.last}", soft_wrap=True)
    if fit.unborn:
        names = ", ".join(partition_name(partition) for partition in fit.unborn)
        err().print(f"fiq: partition {names} was placed after the backup and begins anew", soft_wrap=True)
    typer.echo(f"{to}: restored as of {manifest.made}. Start the persisters: the stream brings what came since")
