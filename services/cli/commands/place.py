"""``fiq place``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from services.cli.backup.cluster import look
from services.cli.errors import CommandError
from services.cli.target import FolderOption, ServerOption, Target, connected, find_cluster, find_corpus
from services.eventlog.jetstream.names import BUCKET, STREAM, placement_key
from services.eventlog.jetstream.placement import Placement, Placements
from services.eventlog.partitions import partition_name


def place(
    corpus: Annotated[
        Path | None, typer.Option(help="Data directory of the volume; else FI_DATA_DIR, ./.fiq/corpus or ./corpus.")
    ] = None,
    server: ServerOption = None,
    folder: FolderOption = None,
) -> None:
    """Say that partitions whose keys got lost live in this data directory: its files are their newest.

    For keys of the bucket fi-partitions that were deleted. Persisters may run; they go on within 30 s.
    """
    from services.cli.backup.making import read_volume  # h5py is slow to import
    from services.corpus import CorpusError, open_corpus

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
    asyncio.run(_place(replace(target, settings=replace(target.settings, store=store)), held, created))


async def _place(target: Target, held: dict[int, Placement], created: set[str]) -> None:
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
    if not lost:
        typer.echo(f"every partition of store {store} has its key in bucket {BUCKET}: there is nothing to place")
        return
    async with connected(target.settings) as connection:
        placements = Placements(connection, replace(target.settings, partitions=seen.partitions))
        for partition in sorted(lost & held.keys()):
            typer.echo(await _placed(placements, store, held[partition]))
    if away := sorted(lost - held.keys()):
        names = ", ".join(partition_name(partition) for partition in away)
        typer.echo(
            f"partition {names} has no key either, and no file here: run this on the data directory that has it, or "
            "`fiq restore` a backup of it"
        )


async def _placed(placements: Placements, store: str, wanted: Placement) -> str:
    name, key = partition_name(wanted.partition), placement_key(store, wanted.partition)
    highest = await placements.highest_epoch(wanted.partition)
    if highest > wanted.epoch:
        raise CommandError(
            f"{name}.h5 is of epoch {wanted.epoch}, and `nats kv history {BUCKET} {key}` shows epoch {highest}: this "
            "is a stale copy. Use the data directory that has the newer file"
        )
    found = await placements.place(wanted)
    return f"partition {name} lives on volume {found.volume}, epoch {found.epoch}, committed {found.committed}"
