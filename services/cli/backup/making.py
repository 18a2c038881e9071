"""Makes a backup: every partition as of a commit of its own, verified, and under its name only when it is good."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import orjson

from fiq.corpus import StorageIO, open_corpus, verify_corpus, write_index
from fiq.corpus.reader import PartitionInfo, partition_files
from fiq.corpus.tools.copy import copy_pair
from services.cli.backup.cluster import ClusterView
from services.cli.backup.manifest import (
    VOLUME_COPY,
    FileEntry,
    Manifest,
    PartitionEntry,
    PlaceEntry,
    digest,
)
from services.cli.errors import BackupError
from services.core.command import product_version
from services.log.jetstream.stream import STREAM
from services.log.partitions import partition_name

_DIRECTORY_MODE = 0o750
#: share of the time that each step takes
_COPYING, _VERIFYING, _DIGESTING = 0.35, 0.5, 0.15
#: what must be free behind the copy, bytes
_SPARE_BYTES = 16 << 20

OnProgress = Callable[[float, str], None]


def make_backup(corpus: Path, target: Path, seen: ClusterView | None, on_progress: OnProgress) -> Manifest:
    """Copy the data directory *corpus*, at which persisters may be at work, to the new directory *target*.

    Args:
        corpus: a volume's data directory.
        target: the directory to make.
        seen: what the cluster says; None takes the files' word for everything.
        on_progress: called with the fraction that is done, and with what.

    Raises:
        BackupError: there is something at *target* already, no room, or a file that is missing or damaged.
        CorpusError: a partition file cannot be read.
        OSError: the system refused.
    """
    made = datetime.now(UTC).isoformat(timespec="seconds")
    volume, store = read_volume(corpus / "volume.json")
    if os.path.lexists(target):
        raise BackupError(f"{target} exists: a backup is never written over anything; name a new directory")
    if not target.parent.is_dir():
        raise BackupError(f"there is no directory {target.parent}")
    paths = partition_files(corpus)
    if not paths:
        raise BackupError(f"there are no partition files (<pp>.h5) in {corpus}: nothing to back up")
    if seen is not None:
        _check_complete(corpus, volume, seen)
    _check_room(paths, target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        temporary.mkdir(_DIRECTORY_MODE)
        _copy(corpus, paths, temporary, on_progress)
        infos = _verified(temporary, on_progress)
        _check_identities(infos, volume, store, seen)
        manifest = _manifest(temporary, infos, made, seen, on_progress)
        _publish(manifest, temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def read_volume(path: Path) -> tuple[str, str]:
    """Return the UUID and the store that a ``volume.json`` states.

    Raises BackupError: there is none, or it is damaged.
    """
    try:
        stated = orjson.loads(path.read_bytes())
        return str(stated["volume"]), str(stated["store"])
    except FileNotFoundError:
        raise BackupError(
            f"there is no {path}: a backup is made of a volume, the FI_DATA_DIR of persisters; name it with --corpus"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BackupError(f"{path} is damaged: restore it; `nats kv get fi-partitions` names the volume") from error


def _check_complete(corpus: Path, volume: str, seen: ClusterView) -> None:
    """Refuse to call a backup good that lacks a partition which lives here."""
    here = [p for p, placement in sorted(seen.placed.items()) if placement.volume == volume]
    names = {partition: partition_name(partition) for partition in here}
    gone = [name for name in names.values() if not (corpus / f"{name}.h5").exists()]
    if gone:
        raise BackupError(
            f"partition {', '.join(gone)} lives on this volume but its file is not in {corpus}: restore it first, or "
            "add --offline to save what is there"
        )


def _check_room(paths: list[Path], directory: Path) -> None:
    needed = sum(path.stat().st_size for path in paths) + _SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise BackupError(f"{directory} has {free} bytes free, the backup needs about {needed}")


def _copy(corpus: Path, paths: list[Path], target: Path, on_progress: OnProgress) -> None:
    total = sum(path.stat().st_size for path in paths) or 1
    behind = 0
    for path in paths:
        size = path.stat().st_size

        def tell(fraction: float, name: str = path.name, size: int = size, behind: int = behind) -> None:
            on_progress(_COPYING * (behind + fraction * size) / total, f"copying {name}")

        copy_pair(path, target / path.name, on_progress=tell)
        behind += size
    shutil.copyfile(corpus / "volume.json", target / VOLUME_COPY)
    (target / VOLUME_COPY).chmod(0o640)
    write_index(target)


def _verified(directory: Path, on_progress: OnProgress) -> tuple[PartitionInfo, ...]:
    report = verify_corpus(
        directory,
        on_progress=lambda now: on_progress(_COPYING + _VERIFYING * now.fraction, f"verifying {now.file}"),
    )
    if not report.clean:
        raise BackupError(
            f"the corpus is damaged, so no backup was made: {report.problems[0]}; `fiq verify` shows all "
            f"({len(report.problems)})"
        )
    with open_corpus(directory) as corpus:
        return corpus.partitions


def _check_identities(infos: tuple[PartitionInfo, ...], volume: str, store: str, seen: ClusterView | None) -> None:
    for info in infos:
        found = info.identity
        if (found.volume, found.store) != (volume, store):
            raise BackupError(
                f"{info.path.name} belongs to volume {found.volume} of store {found.store}, volume.json says {volume} "
                f"of {store}: the file is of another volume"
            )
        if seen is None:
            continue
        if found.stream_created != seen.created:
            raise BackupError(
                f"{info.path.name} was written from the stream created at {found.stream_created}, the cluster's "
                f"{STREAM} was created at {seen.created}: add --offline to back the old history up"
            )
        placement = seen.placed.get(found.partition)
        if placement is not None and (placement.volume, placement.epoch) != (volume, found.epoch):
            raise BackupError(
                f"{info.path.name} is not where the cluster has the partition: volume {placement.volume}, epoch "
                f"{placement.epoch}; the file says volume {volume}, epoch {found.epoch}. Add --offline to back it up "
                "all the same"
            )


def _manifest(
    directory: Path, infos: tuple[PartitionInfo, ...], made: str, seen: ClusterView | None, on_progress: OnProgress
) -> Manifest:
    names = sorted(path.name for path in directory.iterdir())
    total = sum((directory / name).stat().st_size for name in names)
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        on_progress(_COPYING + _VERIFYING + _DIGESTING * done / total, "computing checksums")

    entries = [FileEntry(name, (directory / name).stat().st_size, digest(directory / name, tell)) for name in names]
    identity = infos[0].identity
    return Manifest(
        fiq=product_version(),
        made=made,
        volume=identity.volume,
        store=identity.store,
        partitions=identity.partitions,
        stream=identity.stream,
        stream_created=identity.stream_created,
        placement=None
        if seen is None
        else tuple(PlaceEntry(p, place.volume, place.epoch) for p, place in sorted(seen.placed.items())),
        files=tuple(entries),
        contents=tuple(
            PartitionEntry(
                info.path.name,
                info.identity.partition,
                info.identity.epoch,
                info.begins,
                info.committed,
                info.consultations,
                info.events,
            )
            for info in infos
        ),
    )


def _publish(manifest: Manifest, temporary: Path, target: Path) -> None:
    io = StorageIO()
    for path in (temporary / VOLUME_COPY, manifest.write(temporary)):
        sync_file(path, io)
    io.sync_directory(temporary)
    try:
        temporary.rename(target)  # refused when anything but an empty directory appeared there meanwhile
    except OSError as error:
        raise BackupError(f"{target} appeared while the backup was made: {error.strerror}") from error
    io.sync_directory(target.parent)


def sync_file(path: Path, io: StorageIO) -> None:
    """Make the content of *path* durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        io.fsync(fd)
    finally:
        os.close(fd)
