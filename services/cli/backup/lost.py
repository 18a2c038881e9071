"""``fiq give-up`` and ``fiq place``: what to do when no backup helps.

``give-up``: a volume is lost and there is no backup. It begins anew with what the stream still has. ``place``: files
exist, but the keys of their partitions were deleted from the bucket ``fi-partitions``, so no persister may run them.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fiq.corpus import CorpusError, open_corpus
from fiq.words import count
from services.cli.backup.backup import read_volume
from services.cli.backup.cluster import StoreView, fence, look, other_stores
from services.cli.backup.restore import VolumeIdentity, begun_anew, make_empty, reserved, write_identity
from services.cli.errors import CommandError, RestoreRefusedError
from services.cli.target import FolderOption, ServerOption, Target, connected, find_cluster_to_place, find_corpus
from services.log.errors import PlacementError
from services.log.jetstream.placement import BucketPlacements, parse_key, read_stores
from services.log.jetstream.stream import BUCKET, STREAM, placement_key
from services.log.partitions import partition_name
from services.log.status import Placement

# -- fiq give-up -----------------------------------------------------------------------------------------------------


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

    The stream brings what it still has when persisters start. What was trimmed is gone from this store for good.
    """
    target = find_cluster_to_place(server, folder)
    seen = asyncio.run(_lost(target, volume))
    kept = f"the stream has {seen.first} to {seen.last}" if seen.first <= seen.last else "the stream is empty"
    for partition in seen.placed_on(volume):
        typer.echo(f"fiq: partition {partition_name(partition)}{_losses(seen)}; {kept}", err=True)
    if others := asyncio.run(other_stores(target)):
        names = ", ".join(others)
        typer.echo(f"fiq: store {names} has copies of its own: what is given up here may be read there", err=True)
    if not yes:
        raise RestoreRefusedError("nothing was changed; --yes gives these sequences up for good")
    with reserved(to):
        seen, placements = asyncio.run(_fenced(target, volume, seen))
        owner = VolumeIdentity(volume, target.settings.store, seen.partitions, seen.created)
        try:
            for placement in placements:
                make_empty(to, placement, owner)
            write_identity(to, owner)
        except CorpusError as error:
            raise CommandError(f"{error}; empty {to} and run the command again") from error
    typer.echo(f"{to}: volume {volume} begins anew{_losses(seen)}. Start its persisters: the stream brings what it has")


async def _lost(target: Target, volume: str) -> StoreView:
    """Look at the cluster. Raises RestoreRefusedError: the volume lives or has no partition, or there is no stream."""
    store = target.settings.store
    seen = await look(target, store)
    if seen is None:
        raise RestoreRefusedError(f"the cluster has no stream {STREAM}: see docs/operations.md, `A lost stream`")
    if alive := seen.alive_on(volume):
        raise RestoreRefusedError("\n  ".join(alive))
    if not seen.placed_on(volume):
        known = ", ".join(sorted({placement.volume for placement in seen.placed.values()})) or "none"
        raise RestoreRefusedError(
            f"no partition of store {store} is placed on volume {volume}; volumes with partitions: {known}"
        )
    return seen


async def _fenced(target: Target, volume: str, seen: StoreView) -> tuple[StoreView, list[Placement]]:
    """Place the partitions again, beginning where the stream does; return the cluster and the placements after that."""
    while True:
        placements = list(begun_anew(seen.placed_on(volume), seen))
        await fence(target, target.settings.store, placements, seen)
        before, seen = seen, await _lost(target, volume)
        if before.first == seen.first:  # otherwise it was trimmed between the look and the fence
            return seen, placements


def _losses(seen: StoreView) -> str:
    lost = [f"its events of sequences 1 to {seen.first - 1}"] if seen.first > 1 else []
    lost += [f"its part of {count(seen.holes, 'event')} trimmed after that"] if seen.holes else []
    return f" loses {' and '.join(lost) or 'nothing'}"


# -- fiq place -------------------------------------------------------------------------------------------------------


def place(
    corpus: Annotated[
        Path | None, typer.Option(help="Data directory of the volume; else FI_DATA_DIR, ./.fiq/corpus or ./corpus.")
    ] = None,
    server: ServerOption = None,
    folder: FolderOption = None,
    stores: Annotated[
        str | None,
        typer.Option(help="Names of all stores of the cluster, separated by commas: when the whole bucket was lost."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Place also files that may lack what is gone from the stream."),
    ] = False,
) -> None:
    """Restore deleted placement keys from partition files.

    Places the partitions in this data directory whose keys are gone from the bucket fi-partitions; its files must be
    their newest. Persisters may run; they continue within 30 s.
    """
    directory = find_corpus(corpus, folder)
    volume, store = read_volume(directory / "volume.json")
    try:
        with open_corpus(directory, strict=True) as opened:
            infos = opened.partitions
    except CorpusError as error:
        raise CommandError(f"{error}; nothing was placed") from error
    held: dict[int, Placement] = {}
    for info in infos:
        own = info.identity
        if (own.volume, own.store) != (volume, store):
            raise CommandError(f"{info.path.name} is of another volume than volume.json: move it back to its volume")
        held[own.partition] = Placement(own.partition, volume, own.epoch, info.committed, info.begins, 0)
    created = {info.identity.stream_created for info in infos}
    target = find_cluster_to_place(server, folder)
    target = replace(target, settings=replace(target.settings, store=store))
    asyncio.run(_place(target, held, created, _others(stores, store), force=force))


def _others(stores: str | None, store: str) -> frozenset[str] | None:
    if stores is None:
        return None
    named = frozenset(name.strip() for name in stores.split(","))
    if store not in named or any(parse_key(name) != (name, None) for name in named):
        raise CommandError(f"--stores names all stores, that of this directory too: {store}")
    return named - {store}


async def _place(
    target: Target, held: dict[int, Placement], created: set[str], others: frozenset[str] | None, *, force: bool
) -> None:
    store = target.settings.store
    seen = await look(target, store)
    if seen is None:
        raise CommandError(f"the cluster has no stream {STREAM}: see docs/operations.md, `A lost stream`")
    if created - {seen.created}:
        raise CommandError(
            f"the files belong to the stream created at {min(created)}, and {STREAM} was created at {seen.created}: "
            "see docs/operations.md, `A lost stream`"
        )
    lost = set(range(seen.partitions)) - seen.placed.keys()
    for partition in sorted(lost & held.keys()):
        _check(seen, store, held[partition], force=force)
    async with connected(target.settings, target.role) as connection:
        placements = BucketPlacements(connection, replace(target.settings, partitions=seen.partitions))
        if others is not None:
            await placements.name_stores(others)
        try:
            await read_stores(connection, every=True)
        except PlacementError as error:
            raise CommandError(str(error)) from error
        for partition in sorted(lost & held.keys()):
            found = await placements.place(held[partition])
            where = f"is placed on volume {found.volume}, epoch {found.epoch}, committed {found.committed}"
            typer.echo(f"partition {partition_name(partition)} {where}")
    if not lost:
        typer.echo(f"every partition of store {store} has its key in bucket {BUCKET}: there is nothing to place")
    if away := sorted(lost - held.keys()):
        names = ", ".join(partition_name(partition) for partition in away)
        typer.echo(
            f"partition {names} has no key either, and no file here: run this on the data directory that has it, or "
            "`fiq restore` a backup of it"
        )


def _check(seen: StoreView, store: str, wanted: Placement, *, force: bool) -> None:
    """Raise CommandError for a file that is a stale copy, and without *force* for one that may lack trimmed events."""
    name = partition_name(wanted.partition)
    history = f"`nats kv history {BUCKET} {placement_key(store, wanted.partition)}`"
    if (highest := seen.highest_epoch(wanted.partition)) > wanted.epoch:
        raise CommandError(
            f"{name}.h5 is of epoch {wanted.epoch}, and {history} shows epoch {highest}: this is a stale copy. Use the "
            "data directory that has the newer file"
        )
    reached = seen.reached(wanted.partition, since=wanted.epoch)
    problem = ""
    if wanted.committed < seen.first - 1:
        problem = f"stream {STREAM} begins at {seen.first}"
    elif wanted.committed < reached:
        problem = f"{history} shows that the partition had reached {reached}"
    elif not reached and seen.holes and wanted.committed < seen.last:
        holes = count(seen.holes, "event")
        problem = f"the key has no history, and trim has deleted {holes} in the middle of stream {STREAM}"
    if problem and not force:
        raise CommandError(
            f"{name}.h5 ends at sequence {wanted.committed}, but {problem}: it may be an old copy that lacks events "
            "which are gone from the stream. Nothing was placed. Use the data directory that has the newest file, or "
            "`fiq restore` a newer backup; --force places it nevertheless, and what it lacks is given up for good"
        )
