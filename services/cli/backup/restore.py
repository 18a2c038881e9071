"""``fiq restore``: put a volume back from a backup.

1. The manifest and the sizes of the files are checked, and the target directory is locked against persisters.
2. The backup is compared with the cluster: what neither the backup nor the stream has would be lost (:class:`Gap`).
3. The partitions are placed again in higher epochs (*fence*), and the comparison is made once more.
4. The files are copied into a stage, checked against the manifest, given their epochs, and moved into place;
   ``volume.json`` last, because persisters refuse partition files without it.

An interrupted restore leaves a directory that persisters refuse; it can be run again.
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
from services.cli.backup.cluster import StoreView, fence, look
from services.cli.console import JsonOption, bar, err
from services.cli.errors import BackupError, CommandError, RestoreRefusedError
from services.cli.target import FolderOption, ServerOption, Target, find_cluster_to_place
from services.core.settings import load
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
    left over elsewhere are shut out, and nothing that the backup lacks is trimmed any more. After an interruption run
    the command again.
    """
    manifest = Manifest.read(source)
    check_source(source, manifest)
    if offline and as_store is not None:
        raise RestoreRefusedError("--as-store places the partitions of the other store, so it cannot be --offline")
    target = None if offline else find_cluster_to_place(server, folder)
    wanted = manifest if as_store is None else _of_store(manifest, as_store)
    owner = VolumeIdentity(wanted.volume, wanted.store, wanted.partitions, wanted.stream_created)
    with reserved(to):
        fit = Fit() if target is None else asyncio.run(_fenced(target, wanted, force=force))
        with bar("restoring") as show:
            try:
                put_back(source, manifest, to, fit, owner=owner, on_progress=show)
            except CorpusError as error:
                raise CommandError(f"{error}; nothing was restored") from error
    _print(to, wanted, fit, json=json)


def _of_store(manifest: Manifest, store: str) -> Manifest:
    """Return *manifest* for another store, with a volume id derived from the backup's: a second try has the same."""
    try:
        load(LogSettings, {"FI_STORE": store})
    except ConfigurationError:
        raise RestoreRefusedError(f"--as-store {store}: a store has 1 to 32 lower-case letters and digits") from None
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


def _print(to: Path, manifest: Manifest, fit: Fit, *, json: bool) -> None:
    print_contents(manifest, json=json)
    for remark in fit.remarks:
        err().print(f"fiq: {remark}", soft_wrap=True)
    for problem in fit.problems:
        err().print(f"fiq: restored although {problem}", soft_wrap=True)
    for gap in fit.gaps:
        err().print(f"fiq: given up: {gap}", soft_wrap=True)
    if fit.new:
        err().print(f"fiq: partition {_names(fit.new)} was placed after the backup and begins anew", soft_wrap=True)
    typer.echo(
        f"{to}: restored as of {manifest.made}. Start the persisters: the stream brings what came since", err=json
    )


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
