"""``fiq place``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from services.cli.backup.cluster import ClusterView, look
from services.cli.errors import CommandError
from services.cli.target import FolderOption, ServerOption, Target, connected, find_cluster, find_corpus
from services.log.errors import PlacementError
from services.log.jetstream.placement import Placements, parse_key, read_stores
from services.log.jetstream.stream import BUCKET, STREAM, placement_key
from services.log.partitions import partition_name
from services.log.status import Placement


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
        typer.Option("--force", help="Place files, too, that may lack what is gone from the stream."),
    ] = False,
) -> None:
    """Restore deleted placement keys from partition files.

    For keys of the bucket fi-partitions that were deleted. Persisters may run; they go on within 30 s.
    """
    from fiq.corpus import CorpusError, open_corpus
    from services.cli.backup.making import read_volume  # h5py is slow to import

    directory = find_corpus(corpus, folder)
    volume, store = read_volume(directory / "volume.json")
    try:
        with open_corpus(directory) as opened:
            infos = opened.partitions
    except CorpusError as error:
        raise CommandError(f"{error}; nothing was placed") from error
    for info in infos:
        if (info.identity.volume, info.identity.store) != (volume, store):
            raise CommandError(f"{info.path.name} is of another volume than volume.json: move it back where it belongs")
    held = {
        info.identity.partition: Placement(
            info.identity.partition, volume, info.identity.epoch, info.committed, info.begins, 0
        )
        for info in infos
    }
    created = {info.identity.stream_created for info in infos}
    target = find_cluster(server, folder)
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
    async with connected(target.settings) as connection:
        placements = Placements(connection, replace(target.settings, partitions=seen.partitions))
        if others is not None:
            await placements.name_stores(others)
        try:
            await read_stores(connection, every=True)
        except PlacementError as error:
            raise CommandError(str(error)) from error
        for partition in sorted(lost & held.keys()):
            found = await placements.place(held[partition])
            where = f"lives on volume {found.volume}, epoch {found.epoch}, committed {found.committed}"
            typer.echo(f"partition {partition_name(partition)} {where}")
    if not lost:
        typer.echo(f"every partition of store {store} has its key in bucket {BUCKET}: there is nothing to place")
    if away := sorted(lost - held.keys()):
        names = ", ".join(partition_name(partition) for partition in away)
        typer.echo(
            f"partition {names} has no key either, and no file here: run this on the data directory that has it, or "
            "`fiq restore` a backup of it"
        )


def _check(seen: ClusterView, store: str, wanted: Placement, *, force: bool) -> None:
    """Refuse a file that is a stale copy, and without *force* one that may lack what was trimmed.

    Raises CommandError: it is one.
    """
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
        problem = f"the key has no history, and trim has deleted {seen.holes} events in the middle of stream {STREAM}"
    if problem and not force:
        raise CommandError(
            f"{name}.h5 ends at sequence {wanted.committed}, but {problem}: it may be an old copy that lacks events "
            "which are gone from the stream. Nothing was placed. Use the data directory that has the newest file, or "
            "`fiq restore` a newer backup; --force places it all the same, and what it lacks is given up for good"
        )
