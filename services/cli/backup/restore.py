"""``fiq restore``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from uuid import UUID, uuid5

import typer

from fiq.errors import ConfigurationError
from services.cli.backup.backup import OfflineOption, print_contents
from services.cli.backup.cluster import ClusterView, fence, look
from services.cli.backup.fitting import Fit, compare
from services.cli.backup.manifest import Manifest
from services.cli.console import bar, err
from services.cli.errors import CommandError, RestoreRefusedError
from services.cli.target import FolderOption, ServerOption, Target, find_cluster
from services.core.settings import load
from services.log.partitions import partition_name
from services.log.settings import LogSettings


def restore(
    source: Annotated[Path, typer.Argument(help="A directory that `fiq backup` made.")],
    to: Annotated[Path, typer.Option("--to", help="Data directory of the volume, the FI_DATA_DIR of its persisters.")],
    server: ServerOption = None,
    folder: FolderOption = None,
    offline: OfflineOption = False,
    as_store: Annotated[
        str | None,
        typer.Option("--as-store", help="Begin this other store with the copy, instead of putting the volume back."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Restore although the cluster does not fit; what that means is printed.")
    ] = False,
) -> None:
    """Put a lost volume back from a backup.

    The stream brings what came after the backup, when persisters start.

    The backup is compared with the stream. Then what is left of the volume elsewhere is shut out, and nothing that the
    backup lacks is trimmed any more. Then the files are copied, checked and put in place. After an interruption run it
    again.
    """
    from fiq.corpus import CorpusError
    from services.cli.backup.restoring import Owner, check_source, put_back, reserved  # h5py is slow to import

    manifest = Manifest.read(source)
    check_source(source, manifest)
    if offline and as_store is not None:
        raise RestoreRefusedError("--as-store places the partitions of the other store, so it cannot be --offline")
    target = None if offline else find_cluster(server, folder)
    wanted = manifest if as_store is None else _of_store(manifest, as_store)
    owner = Owner(wanted.volume, wanted.store, wanted.partitions, wanted.stream_created)
    with reserved(to):
        fit = Fit() if target is None else asyncio.run(_fenced(target, wanted, force=force))
        with bar("restoring") as show:
            try:
                put_back(source, manifest, to, fit, owner=owner, on_progress=show)
            except CorpusError as error:
                raise CommandError(f"{error}; nothing was restored") from error
    _print(to, wanted, fit)


def _of_store(manifest: Manifest, store: str) -> Manifest:
    """Return *manifest* as that of a volume of another store; the same one each time, so that it can be tried again.

    Raises RestoreRefusedError: no store can have that name, or it is the backup's own.
    """
    try:
        load(LogSettings, {"FI_STORE": store})
    except ConfigurationError:
        raise RestoreRefusedError(f"--as-store {store}: a store has 1 to 32 lower-case letters and digits") from None
    if store == manifest.store:
        raise RestoreRefusedError(f"the backup is of store {store} itself: leave --as-store out to put its volume back")
    return replace(manifest, store=store, volume=str(uuid5(UUID(manifest.volume), store)))


async def _fenced(target: Target, manifest: Manifest, *, force: bool) -> Fit:
    """Compare the backup with the cluster, shut the old directory out, and keep what the backup lacks in the stream."""
    seen = await look(target, manifest.store)
    fit = _checked(manifest, seen, force=force)
    if seen is None or not fit.places:
        return fit
    await fence(target, manifest.store, fit.places, seen)
    # the stream may have been trimmed between the look and the fence; what the keys say is as this fit has it
    again = _checked(manifest, await look(target, manifest.store), force=force)
    return replace(again, places=fit.places, remarks=fit.remarks)


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
        err().print(f"fiq: given up: {gap}", soft_wrap=True)
    if fit.unborn:
        names = ", ".join(partition_name(partition) for partition in fit.unborn)
        err().print(f"fiq: partition {names} was placed after the backup and begins anew", soft_wrap=True)
    typer.echo(f"{to}: restored as of {manifest.made}. Start the persisters: the stream brings what came since")
