"""Puts a backup back: checked file by file beside its place, then moved there, the volume's identity last.

Whoever looks into the directory meanwhile finds partition files without an identity, which persisters refuse; and the
claim lock is held, so none can start.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fiq.corpus import EventStore, Identity, StorageIO, open_corpus
from fiq.corpus.wal.storage import check_file_system, try_lock
from services.cli.backup.fitting import Fit
from services.cli.backup.making import OnProgress, read_volume, sync_file
from services.cli.backup.manifest import MANIFEST_NAME, VOLUME_COPY, FileEntry, Manifest
from services.cli.errors import BackupError, CommandError, RestoreRefusedError
from services.log.jetstream.stream import STREAM
from services.log.partitions import partition_name
from services.log.status import Placement
from services.persister.volume import stated

_STAGE = ".restore"
#: what a volume without any partition may consist of; anything else is data, or somebody's
_EMPTY = frozenset({"volume.lock", "workers", "volume.json", "lost+found"})
_PIECE_BYTES = 4 << 20
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose files are put somewhere.

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
    """Keep persisters out of *target*, which becomes an empty directory if it is none yet.

    Raises:
        RestoreRefusedError: it holds something, or a persister uses it.
        OSError: it cannot be made or written.
    """
    made = not target.exists()
    target.mkdir(mode=0o750, parents=True, exist_ok=True)
    lock = target / "volume.lock"
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        if not try_lock(fd, exclusive=True):
            raise RestoreRefusedError(f"a persister is just starting in {target}: stop it first")
        _check_unused(target)
        yield
    except BaseException:
        if made:
            shutil.rmtree(target, ignore_errors=True)
        raise
    finally:
        os.close(fd)


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
    source: Path,
    manifest: Manifest,
    target: Path,
    fit: Fit,
    *,
    owner: Owner,
    on_progress: OnProgress,
) -> None:
    """Copy the backup in *source* to *target*, which :func:`reserved` holds.

    Args:
        source: the backup.
        manifest: of the backup.
        target: the data directory.
        fit: what the cluster makes of it: partitions go on behind their gaps, say the epochs that they get, and begin
            anew where the backup has none.
        owner: whose the files are from now on.
        on_progress: called with the fraction that is done, and with what.

    Raises:
        BackupError: a file is not what the manifest says; nothing was put there.
        OSError, CorpusError: the system refused; nothing was put there.
    """
    check_file_system(target)
    _check_room(manifest, target)
    stage = target / f"{_STAGE}-{os.getpid()}"
    try:
        stage.mkdir(mode=0o750)
        _copy(source, manifest, stage, on_progress)
        _check_contents(stage, manifest)
        for entry in manifest.contents:
            _adapt(stage / entry.file, entry.partition, fit, owner)
        for place in fit.places:
            if place.partition in fit.unborn:
                make_empty(stage, place, owner)
        _move(stage, target, owner)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def make_empty(directory: Path, place: Placement, owner: Owner) -> None:
    """Make the file of a partition that begins anew in *directory*.

    Raises:
        OSError, CorpusError: the system refused.
    """
    identity = Identity(
        store=owner.store,
        volume=place.volume,
        epoch=place.epoch,
        partition=place.partition,
        partitions=owner.partitions,
        stream=STREAM,
        stream_created=owner.stream_created,
    )
    path = directory / f"{partition_name(place.partition)}.h5"
    EventStore.create(path, identity, begins=place.begins).close()


def write_identity(target: Path, owner: Owner) -> None:
    """Write ``volume.json``, as the last file: from now on persisters take the directory for the volume."""
    io = StorageIO()
    io.sync_directory(target)
    temporary = target / "volume.json.new"
    temporary.write_text(stated(owner.volume, owner.store), encoding="utf-8")
    temporary.chmod(0o640)
    sync_file(temporary, io)
    io.rename(temporary, target / "volume.json")
    io.sync_directory(target)


def _check_unused(target: Path) -> None:
    for path in (target / "workers").glob("*.lock"):
        if _is_locked(path):
            raise RestoreRefusedError(f"a persister runs in {target}: stop all of its processes first")
    found = sorted(path.name for path in target.iterdir() if path.name not in _EMPTY)
    if any(name.startswith(_STAGE) for name in found):
        raise RestoreRefusedError(
            f"an earlier restore into {target} was interrupted: remove everything in it, then try again"
        )
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise RestoreRefusedError(f"{target} is not empty ({found[0]}{more}): move what is there away first")


def _is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return not try_lock(fd, exclusive=True)
    finally:
        os.close(fd)


def _check_room(manifest: Manifest, target: Path) -> None:
    needed = sum(entry.bytes for entry in manifest.files) + _SPARE_BYTES
    free = shutil.disk_usage(target).free
    if free < needed:
        raise CommandError(f"{target} has {free} bytes free, the backup needs {needed}")


def _copy(source: Path, manifest: Manifest, stage: Path, on_progress: OnProgress) -> None:
    total = sum(entry.bytes for entry in manifest.files) or 1
    done = 0
    for entry in manifest.files:

        def tell(count: int, name: str = entry.name) -> None:
            nonlocal done
            done += count
            on_progress(done / total, f"copying {name}")

        _copy_file(source / entry.name, stage / entry.name, entry, tell)


def _copy_file(source: Path, target: Path, entry: FileEntry, tell: Callable[[int], None]) -> None:
    made = hashlib.sha256()
    with source.open("rb") as file, target.open("xb") as copy:
        os.fchmod(copy.fileno(), 0o640)
        while piece := file.read(_PIECE_BYTES):
            made.update(piece)
            copy.write(piece)
            tell(len(piece))
        copy.flush()
        os.fsync(copy.fileno())
    if made.hexdigest() != entry.sha256:
        raise BackupError(
            f"{source} is not what the manifest says (SHA-256 differs): it is damaged; take another backup"
        )


def _check_contents(stage: Path, manifest: Manifest) -> None:
    """Compare what the files say of themselves: the manifest may be the one of another backup."""
    volume, store = read_volume(stage / VOLUME_COPY)
    expected = {
        (e.file, e.partition, e.epoch, e.begins, e.committed, e.consultations, e.events) for e in manifest.contents
    }
    found = set()
    if manifest.contents:
        with open_corpus(stage) as corpus:
            for info in corpus.partitions:
                own = info.identity
                sequences = info.begins, info.committed
                found.add((info.path.name, own.partition, own.epoch, *sequences, info.consultations, info.events))
                stated = (own.volume, own.store, own.partitions, own.stream, own.stream_created)
                if stated != (volume, store, manifest.partitions, manifest.stream, manifest.stream_created):
                    raise BackupError(f"{info.path.name} is of another volume or stream than the manifest says")
    if (volume, store) != (manifest.volume, manifest.store) or found != expected:
        raise BackupError("the manifest does not describe these files: it was changed, or is of another backup")


def _adapt(path: Path, partition: int, fit: Fit, owner: Owner) -> None:
    """Let the partition go on behind its gap, although it has not got what comes before, and say whose it is now."""
    behind = [gap.last for gap in fit.gaps if gap.partition == partition and not gap.partly]
    epoch = fit.epochs.get(partition)
    if not behind and epoch is None:
        return
    with EventStore.open(path, expected=None) as store:
        if behind:
            store.commit(max(behind))
        if epoch is not None:
            store.place(epoch, store=owner.store, volume=owner.volume)


def _move(stage: Path, target: Path, owner: Owner) -> None:
    io = StorageIO()
    (target / "volume.json").unlink(missing_ok=True)  # of an empty volume; what follows is none of its
    (stage / VOLUME_COPY).unlink()
    for path in sorted(stage.iterdir()):
        io.rename(path, target / path.name)
    write_identity(target, owner)
