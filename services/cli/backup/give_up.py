"""``fiq give-up``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from services.cli.backup.cluster import ClusterView, fence, look, other_stores
from services.cli.backup.fitting import begun_anew
from services.cli.errors import CommandError, RestoreRefusedError
from services.cli.target import FolderOption, ServerOption, Target, find_cluster
from services.log.jetstream.stream import STREAM
from services.log.partitions import partition_name
from services.log.status import Placement


def give_up(
    volume: Annotated[str, typer.Argument(help="UUID of the volume that is lost, as `fiq status` shows it.")],
    to: Annotated[Path, typer.Option("--to", help="Data directory of its persisters from now on; empty.")],
    server: ServerOption = None,
    folder: FolderOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do it. Without this the command only says what would be given up.")
    ] = False,
) -> None:
    """Start a lost volume again without a backup.

    The stream brings what it still holds when persisters start. What was trimmed is gone from this store for good.
    """
    from fiq.corpus import CorpusError
    from services.cli.backup.restoring import Owner, make_empty, reserved, write_identity  # h5py is slow to import

    target = find_cluster(server, folder)
    seen = asyncio.run(_checked(target, volume))
    _tell(target, volume, seen)
    if not yes:
        raise RestoreRefusedError("nothing was changed; --yes gives these sequences up for good")
    with reserved(to):
        seen, places = asyncio.run(_fenced(target, volume, seen))
        owner = Owner(volume, target.settings.store, seen.partitions, seen.created)
        try:
            for place in places:
                make_empty(to, place, owner)
            write_identity(to, owner)
        except CorpusError as error:
            raise CommandError(f"{error}; empty {to} and run the command again") from error
    typer.echo(
        f"{to}: volume {volume} begins anew{_given_up(seen)}. Start its persisters: they fetch what the stream has"
    )


async def _checked(target: Target, volume: str) -> ClusterView:
    """Look at the cluster.

    Raises RestoreRefusedError: the volume lives, or has nothing, or there is no stream.
    """
    store = target.settings.store
    seen = await look(target, store)
    if seen is None:
        raise RestoreRefusedError(f"the cluster has no stream {STREAM}: see docs/operations.md, `A lost stream`")
    if alive := seen.alive_on(volume):
        raise RestoreRefusedError("\n  ".join(alive))
    if not seen.placed_on(volume):
        known = ", ".join(sorted({place.volume for place in seen.placed.values()})) or "none"
        raise RestoreRefusedError(
            f"no partition of store {store} lives on volume {volume}; volumes that have some: {known}"
        )
    return seen


async def _fenced(target: Target, volume: str, seen: ClusterView) -> tuple[ClusterView, list[Placement]]:
    """Shut out what is left of the volume, and keep the stream from being trimmed any further.

    Returns:
        the cluster, and where the partitions live from now on: they begin where the stream does.
    """
    while True:
        places = list(begun_anew(seen.placed_on(volume), seen))
        await fence(target, target.settings.store, places, seen)
        before, seen = seen, await _checked(target, volume)
        if before.first == seen.first:  # else it was trimmed between the look and the fence
            return seen, places


def _tell(target: Target, volume: str, seen: ClusterView) -> None:
    for partition in seen.placed_on(volume):
        typer.echo(f"fiq: partition {partition_name(partition)}{_given_up(seen)}; {_kept(seen)}", err=True)
    if others := asyncio.run(other_stores(target)):
        typer.echo(
            f"fiq: store {', '.join(others)} has partitions of its own: what is given up here may be read there",
            err=True,
        )


def _given_up(seen: ClusterView) -> str:
    lost = [f"its events of sequences 1 to {seen.first - 1}"] if seen.first > 1 else []
    lost += [f"what is its own of {seen.holes} that were trimmed after that"] if seen.holes else []
    return f" loses {' and '.join(lost) or 'nothing'}"


def _kept(seen: ClusterView) -> str:
    return f"the stream has {seen.first} to {seen.last}" if seen.first <= seen.last else "the stream is empty"
