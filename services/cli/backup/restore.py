"""``fiq restore``, and what to do when no backup helps: ``fiq give-up`` and ``fiq place``.

``restore`` puts a volume back from a backup:

1. The manifest and the sizes of the files are checked, and the target directory is locked against persisters.
2. The backup is compared with the cluster: what neither the backup nor the stream has would be lost (:class:`Gap`).
3. The partitions are placed again in higher epochs (*fence*), and the comparison is made once more.
4. The files are copied into a stage, checked against the manifest, given their epochs, and moved into place;
   ``volume.json`` last, because persisters refuse partition files without it.

An interrupted restore leaves a directory that persisters refuse; it can be run again.

``give-up``: a volume is lost and there is no backup. It begins anew with what the stream still has. ``place``: files
exist, but the keys of their partitions were deleted from the bucket ``fi-partitions``, so no persister may run them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from uuid import UUID, uuid5

import typer

from fiq.corpus import CorpusError, EventStore, Identity, StorageIO, open_corpus
from fiq.corpus.wal.storage import check_file_system, try_lock
from fiq.errors import ConfigurationError
from fiq.words import count
from services.cli.backup.backup import (
    MANIFEST_NAME,
    VOLUME_COPY,
    FileEntry,
    Manifest,
    OfflineOption,
    OnProgress,
    check_room,
    digest,
    print_contents,
    read_volume,
    sync_file,
)
from services.cli.backup.cluster import StoreView, fence, look, other_stores
from services.cli.console import JsonOption, bar, err
from services.cli.errors import BackupError, CommandError, RestoreRefusedError, UsageError
from services.cli.target import FolderOption, ServerOption, Target, connected, find_cluster_to_place, find_corpus
from services.core.settings import load
from services.log.errors import PlacementError
from services.log.jetstream.placement import BucketPlacements, parse_key, read_stores
from services.log.jetstream.stream import BUCKET, STREAM, placement_key
from services.log.partitions import partition_name
from services.log.protocol import EVENT_LOG
from services.log.settings import LogSettings
from services.log.status import Placement
from services.persister.volume import identity_document

_STAGE = ".restore"
#: what a volume without any partition may consist of
_EMPTY = frozenset({"volume.lock", "workers", "volume.json", "lost+found"})


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
    json: JsonOption = False,
) -> None:
    """Put a lost volume back from a backup.

    The backup is compared with the stream, which brings what came after the backup when persisters start. Directories
    left over elsewhere are shut out, and nothing that the backup lacks is trimmed any more. A ZeroMQ log has no stream,
    so what came after the backup does not come back. After an interruption run the command again.
    """
    if offline and as_store is not None:
        raise UsageError("--as-store places the partitions of the other store, so it cannot be --offline")
    manifest = Manifest.read(source)
    check_source(source, manifest)
    wanted = manifest if as_store is None else _of_store(manifest, as_store)
    target = None if offline else find_cluster_to_place(server, folder)
    owner = VolumeIdentity(wanted.volume, wanted.store, wanted.partitions, wanted.stream_created)
    with reserved(to):
        fit = Fit() if target is None else asyncio.run(_fenced(target, wanted, force=force))
        with bar("restoring") as show:
            try:
                put_back(source, manifest, to, fit, owner=owner, on_progress=show)
            except CorpusError as error:
                raise CommandError(f"{error}; nothing was restored") from error
    _print(to, wanted, fit, has_stream=manifest.has_stream, json=json)


def _of_store(manifest: Manifest, store: str) -> Manifest:
    """Return *manifest* for another store, with a volume id derived from the backup's: a second try has the same."""
    try:
        load(LogSettings, {"FI_STORE": store})
    except ConfigurationError:
        raise UsageError(f"--as-store {store}: a store has 1 to 32 lower-case letters and digits") from None
    if store == manifest.store:
        raise RestoreRefusedError(f"the backup is of store {store} itself: omit --as-store to put its volume back")
    return replace(manifest, store=store, volume=str(uuid5(UUID(manifest.volume), store)))


async def _fenced(target: Target, manifest: Manifest, *, force: bool) -> Fit:
    seen = await look(target, manifest.store)
    fit = _checked(manifest, seen, force=force)
    if seen is None or not fit.placements:
        return fit
    await fence(target, manifest.store, fit.placements, seen)
    # the stream may have been trimmed between the look and the fence; the keys now are as this fit has them
    again = _checked(manifest, await look(target, manifest.store), force=force)
    return replace(again, placements=fit.placements, remarks=fit.remarks)


def _checked(manifest: Manifest, seen: StoreView | None, *, force: bool) -> Fit:
    fit = compare(manifest, seen)
    if fit.fatal:
        raise RestoreRefusedError("\n  ".join(fit.fatal))
    if fit.problems and not force:
        raise RestoreRefusedError("\n  ".join((*fit.problems, "Nothing was restored; --force restores nevertheless.")))
    return fit


def _print(to: Path, manifest: Manifest, fit: Fit, *, has_stream: bool, json: bool) -> None:
    print_contents(manifest, json=json)
    for remark in fit.remarks:
        err().print(f"fiq: {remark}", soft_wrap=True)
    for problem in fit.problems:
        err().print(f"fiq: restored although {problem}", soft_wrap=True)
    for gap in fit.gaps:
        err().print(f"fiq: given up: {gap}", soft_wrap=True)
    if fit.new:
        err().print(f"fiq: partition {_names(fit.new)} was placed after the backup and begins anew", soft_wrap=True)
    then = ". Start the persisters: the stream brings what came since"
    if not has_stream:
        then = ", without the events that came since: a ZeroMQ log has no other copy of them. Start the persisters"
    typer.echo(f"{to}: restored as of {manifest.made}{then}", err=json)


def _names(partitions: Sequence[int]) -> str:
    return ", ".join(map(partition_name, partitions))


# -- Whether the backup fits the cluster -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gap:
    """Sequences of one partition that neither the backup nor the stream has, both ends included.

    With *partly* the stream may still have some of them: trim deleted others, and does not say which.
    """

    partition: int
    first: int
    last: int
    partly: bool = False

    def __str__(self) -> str:
        tail = ", as far as the stream lacks them" if self.partly else ""
        return f"partition {partition_name(self.partition)}, sequences {self.first} to {self.last}{tail}"


@dataclass(frozen=True, slots=True)
class Fit:
    """What a comparison of a backup with the cluster found.

    Attributes:
        fatal: why nothing may be restored, not even with --force.
        problems: why nothing is restored without --force.
        gaps: what is lost for good with --force.
        new: partitions that are placed on this volume and have no file in the backup: they begin anew.
        placements: the new ones of this volume's partitions, so that files elsewhere are refused, and nothing is
            trimmed that the restored ones lack.
        remarks: what an operator should know in any case.
    """

    fatal: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()
    new: tuple[int, ...] = ()
    placements: tuple[Placement, ...] = ()
    remarks: tuple[str, ...] = ()


def compare(manifest: Manifest, seen: StoreView | None) -> Fit:
    """Compare a backup with the store in the cluster; None means that the cluster has no stream."""
    if seen is None:
        problem = (
            f"the cluster has no stream {EVENT_LOG}, so it cannot bring what the backup lacks. Is this the cluster? "
            "If the stream is lost: docs/operations.md, `A lost stream`"
        )
        return Fit(problems=(problem,))
    fatal = seen.alive_on(manifest.volume)
    if seen.created != manifest.stream_created:
        return Fit(fatal, (_another_stream(manifest, seen),))
    held = {entry.partition for entry in manifest.contents}
    new = tuple(partition for partition in seen.placed_on(manifest.volume) if partition not in held)
    gaps = tuple(_gaps(manifest, new, seen))
    problems = [*_misplaced(manifest, seen), *_ahead(manifest, seen)]
    if gaps:
        problems.append(_trimmed(gaps, seen))
    placements = tuple(_placements(manifest, new, seen))
    return Fit(fatal, tuple(problems), gaps, new, placements, tuple(_remarks(manifest, seen)))


def _placements(manifest: Manifest, new: Sequence[int], seen: StoreView) -> Iterator[Placement]:
    for entry in manifest.contents:
        known = seen.placed.get(entry.partition)
        if known is None or known.volume == manifest.volume:
            epoch = max(entry.epoch, seen.highest_epoch(entry.partition)) + 1
            yield Placement(entry.partition, manifest.volume, epoch, entry.committed, entry.begins, 0)
    yield from begun_anew(new, seen)


def begun_anew(partitions: Sequence[int], seen: StoreView) -> Iterator[Placement]:
    """Yield the new placements of placed *partitions* whose files will be empty: they begin where the stream does."""
    for partition in partitions:
        known = seen.placed[partition]
        yield Placement(partition, known.volume, known.epoch + 1, seen.first - 1, seen.first, 0)


def _another_stream(manifest: Manifest, seen: StoreView) -> str:
    return (
        f"the backup belongs to the stream created at {manifest.stream_created}, but the cluster's {EVENT_LOG} was "
        f"created at {seen.created}: it was deleted and created again, or restored from its own backup, which makes it "
        "a new one too. Its sequences may mean other events, so persisters refuse these files. Read the backup where "
        "it is (`fiq show ID --corpus BACKUP`), and start a new data directory for the new stream: docs/operations.md, "
        "`A lost stream`"
    )


def _misplaced(manifest: Manifest, seen: StoreView) -> Iterator[str]:
    for entry in manifest.contents:
        known = seen.placed.get(entry.partition)
        if known is not None and known.volume != manifest.volume:
            yield (
                f"partition {partition_name(entry.partition)} is now on volume {known.volume}, epoch {known.epoch}; "
                f"the backup has it of volume {manifest.volume}, epoch {entry.epoch}: it is a stale copy, which "
                "persisters refuse"
            )


def _ahead(manifest: Manifest, seen: StoreView) -> Iterator[str]:
    most = max((entry.committed for entry in manifest.contents), default=0)
    if most > seen.last:
        yield (
            f"the backup holds sequence {most} but stream {EVENT_LOG} ends at {seen.last}: it lost events, or was "
            "restored from an older backup than this one. Persisters refuse that; take an older backup of the corpus, "
            "or start a new data directory"
        )


def _gaps(manifest: Manifest, new: Sequence[int], seen: StoreView) -> Iterator[Gap]:
    held = [(entry.partition, entry.epoch, entry.committed) for entry in manifest.contents]
    for partition, epoch, committed in sorted([*held, *((partition, 0, 0) for partition in new)]):
        if committed < seen.first - 1:
            yield Gap(partition, committed + 1, seen.first - 1)
        start, reached = max(committed, seen.first - 1), min(seen.last, seen.reached(partition, since=epoch))
        if seen.holes and start < reached:
            yield Gap(partition, start + 1, reached, partly=True)


def _trimmed(gaps: Sequence[Gap], seen: StoreView) -> str:
    return (
        f"the stream now begins at sequence {seen.first} and lacks {count(seen.holes, 'event')} after that; "
        "what is gone was "
        f"trimmed, because every store had committed it. The backup lacks it ({'; '.join(map(str, gaps))}). Take a "
        "newer backup, or recover the files of the lost volume, or copy the consultations from another store. With "
        "--force these sequences are given up for good"
    )


def _remarks(manifest: Manifest, seen: StoreView) -> Iterator[str]:
    partitions = [(entry.partition, entry.epoch) for entry in manifest.contents]
    if unplaced := [partition for partition, _ in partitions if partition not in seen.placed]:
        yield f"partition {_names(unplaced)} had no key in the bucket: it was placed on this volume"
    # a restore or giving up since the backup is part of one history: the backup and the stream decide what is lost
    if renewed := [p for p, epoch in partitions if p in seen.placed and seen.placed[p].epoch != epoch]:
        yield (
            f"the volume was restored or given up since the backup: what it then had of partition {_names(renewed)} "
            "is replaced by what the backup and the stream have"
        )


# -- The files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VolumeIdentity:
    """The volume that restored files belong to.

    Attributes:
        volume: UUID of the volume.
        store: name of its store.
        partitions: how many the stream has.
        stream_created: when the stream was created, as the broker states it.
    """

    volume: str
    store: str
    partitions: int
    stream_created: str


@contextmanager
def reserved(target: Path) -> Iterator[None]:
    """Lock persisters out of *target*, which is made if it is missing.

    Raises:
        RestoreRefusedError: it is not empty, or a persister uses it.
        OSError: it cannot be made or written.
    """
    made = not target.exists()
    target.mkdir(mode=0o750, parents=True, exist_ok=True)
    fd = os.open(target / "volume.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        if not try_lock(fd, exclusive=True):
            raise RestoreRefusedError(f"a persister is starting in {target}: stop it first")
        _check_unused(target)
        yield
    except BaseException:
        if made:
            shutil.rmtree(target, ignore_errors=True)
        raise
    finally:
        os.close(fd)


def _check_unused(target: Path) -> None:
    for path in (target / "workers").glob("*.lock"):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not try_lock(fd, exclusive=True):
                raise RestoreRefusedError(f"a persister runs in {target}: stop all of its processes first")
        finally:
            os.close(fd)
    found = sorted(path.name for path in target.iterdir() if path.name not in _EMPTY)
    if any(name.startswith(_STAGE) for name in found):
        raise RestoreRefusedError(
            f"an earlier restore into {target} was interrupted: remove everything in it, then try again"
        )
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise RestoreRefusedError(f"{target} is not empty ({found[0]}{more}): move its content away first")


def check_source(source: Path, manifest: Manifest) -> None:
    """Compare the names and sizes of the backup's files with its manifest; :func:`put_back` compares the contents.

    Raises BackupError: a file is missing, was added, or has another size.
    """
    listed = {entry.name: entry.bytes for entry in manifest.files}
    found = {path.name: path.stat().st_size for path in source.iterdir() if path.name != MANIFEST_NAME}
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            raise BackupError(f"{source} lacks {name}, which its manifest lists: take another backup")
        if name not in listed:
            raise BackupError(
                f"{source} has {name}, which its manifest does not list: remove it, or take another backup"
            )
        if listed[name] != found[name]:
            raise BackupError(
                f"{source / name} has {found[name]} bytes, the manifest says {listed[name]}: it is damaged"
            )


def put_back(
    source: Path, manifest: Manifest, target: Path, fit: Fit, *, owner: VolumeIdentity, on_progress: OnProgress
) -> None:
    """Copy the backup in *source* to *target*, which :func:`reserved` holds.

    Args:
        source: the backup.
        manifest: of the backup.
        target: the data directory.
        fit: of the backup in the cluster: gaps to skip, new epochs, and partitions that begin anew.
        owner: of the files from now on.
        on_progress: of the copy.

    Raises:
        BackupError: a file differs from the manifest; nothing was restored.
        OSError, CorpusError: the system refused; nothing was restored.
    """
    check_file_system(target)
    check_room(target, sum(entry.bytes for entry in manifest.files))
    stage = target / f"{_STAGE}-{os.getpid()}"
    try:
        stage.mkdir(mode=0o750)
        _copy(source, manifest, stage, on_progress)
        _check_contents(stage, manifest)
        for entry in manifest.contents:
            _adapt(stage / entry.file, entry.partition, fit, owner)
        for placement in fit.placements:
            if placement.partition in fit.new:
                make_empty(stage, placement, owner)
        _move(stage, target, owner)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _copy(source: Path, manifest: Manifest, stage: Path, on_progress: OnProgress) -> None:
    total = sum(entry.bytes for entry in manifest.files) or 1
    done = 0
    for entry in manifest.files:

        def on_bytes(count: int, name: str = entry.name) -> None:
            nonlocal done
            done += count
            on_progress(done / total, f"copying {name}")

        _copy_file(source / entry.name, stage / entry.name, entry, on_bytes)


def _copy_file(source: Path, target: Path, entry: FileEntry, on_bytes: Callable[[int], None]) -> None:
    with target.open("xb") as copy:
        os.fchmod(copy.fileno(), 0o640)
        found = digest(source, on_bytes, copy)
        copy.flush()
        os.fsync(copy.fileno())
    if found != entry.sha256:
        raise BackupError(f"{source} differs from the manifest (SHA-256): it is damaged; take another backup")


def _check_contents(stage: Path, manifest: Manifest) -> None:
    """Compare the files' own identities with the manifest, which may be of another backup."""
    volume, store = read_volume(stage / VOLUME_COPY)
    expected = {
        (e.file, e.partition, e.epoch, e.begins, e.committed, e.consultations, e.events) for e in manifest.contents
    }
    found = set()
    if manifest.contents:
        with open_corpus(stage, strict=True) as corpus:
            for info in corpus.partitions:
                own = info.identity
                sequences = info.begins, info.committed
                found.add((info.path.name, own.partition, own.epoch, *sequences, info.consultations, info.events))
                identity = (own.volume, own.store, own.partitions, own.stream, own.stream_created)
                if identity != (volume, store, manifest.partitions, manifest.stream, manifest.stream_created):
                    raise BackupError(f"{info.path.name} is of another volume or stream than the manifest says")
    if (volume, store) != (manifest.volume, manifest.store) or found != expected:
        raise BackupError("the manifest does not describe these files: it was changed, or is of another backup")


def _adapt(path: Path, partition: int, fit: Fit, owner: VolumeIdentity) -> None:
    """Move the committed sequence past the partition's gap, and write the new epoch and owner into the file."""
    ends = [gap.last for gap in fit.gaps if gap.partition == partition and not gap.partly]
    epoch = next((one.epoch for one in fit.placements if one.partition == partition), None)
    if not ends and epoch is None:
        return
    with EventStore.open(path, expected=None) as store:
        if ends:
            store.commit(max(ends))
        if epoch is not None:
            store.place(epoch, store=owner.store, volume=owner.volume)


def make_empty(directory: Path, placement: Placement, owner: VolumeIdentity) -> None:
    """Create the empty file of a partition that begins anew. Raises OSError, CorpusError: the system refused."""
    identity = Identity(
        store=owner.store,
        volume=placement.volume,
        epoch=placement.epoch,
        partition=placement.partition,
        partitions=owner.partitions,
        stream=EVENT_LOG,
        stream_created=owner.stream_created,
    )
    path = directory / f"{partition_name(placement.partition)}.h5"
    EventStore.create(path, identity, begins=placement.begins).close()


def _move(stage: Path, target: Path, owner: VolumeIdentity) -> None:
    io = StorageIO()
    (target / "volume.json").unlink(missing_ok=True)  # of an empty volume, whose identity does not apply any more
    (stage / VOLUME_COPY).unlink()
    for path in sorted(stage.iterdir()):
        io.rename(path, target / path.name)
    write_identity(target, owner)


def write_identity(target: Path, owner: VolumeIdentity) -> None:
    """Write ``volume.json``, the last file: from now on persisters accept the directory as the volume."""
    io = StorageIO()
    io.sync_directory(target)
    temporary = target / "volume.json.new"
    temporary.write_text(identity_document(owner.volume, owner.store), encoding="utf-8")
    temporary.chmod(0o640)
    sync_file(temporary, io)
    io.rename(temporary, target / "volume.json")
    io.sync_directory(target)


# -- fiq give-up ------------------------------------------------------------------------------------------------------


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
        typer.echo(f"fiq: partition {partition_name(partition)} {_losses(seen)}; {kept}", err=True)
    if others := asyncio.run(other_stores(target)):
        names = ", ".join(others)
        typer.echo(f"fiq: store {names} has copies of its own: what is given up here may be read there", err=True)
    if not yes:
        raise RestoreRefusedError("nothing was changed; --yes gives these sequences up for good")
    with reserved(to):
        seen, placements = asyncio.run(_fenced_anew(target, volume, seen))
        owner = VolumeIdentity(volume, target.settings.store, seen.partitions, seen.created)
        try:
            for placement in placements:
                make_empty(to, placement, owner)
            write_identity(to, owner)
        except CorpusError as error:
            raise CommandError(f"{error}; empty {to} and run the command again") from error
    done = f"volume {volume} begins anew and {_losses(seen)}"
    typer.echo(f"{to}: {done}. Start its persisters: the stream brings what it has")


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


async def _fenced_anew(target: Target, volume: str, seen: StoreView) -> tuple[StoreView, list[Placement]]:
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
    return f"loses {' and '.join(lost) or 'nothing'}"


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
    if any(parse_key(name) != (name, None) for name in named):
        raise UsageError("--stores: names of stores, 1 to 32 lower-case letters and digits each, separated by commas")
    if store not in named:
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
