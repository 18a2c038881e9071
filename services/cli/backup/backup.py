"""``fiq backup``: a copy of a volume, made while persisters write, and its manifest.

Each partition is copied as of one of its commits, into a hidden directory. The copy is verified and compared with the
cluster, then the manifest is written, and the directory gets its name last. So a directory under that name is complete,
and one without a manifest is not a backup.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import orjson
import typer
from rich.filesize import decimal

from fiq.corpus import CorpusError, StorageIO, open_corpus, verify_corpus, write_index
from fiq.corpus.reader import PartitionInfo, partition_files
from fiq.corpus.tools.copy import copy_pair
from fiq.words import count
from services.cli import console
from services.cli.backup.cluster import StoreView, look
from services.cli.console import JsonOption, bar
from services.cli.errors import BackupError
from services.cli.target import FolderOption, ServerOption, find_cluster, find_corpus
from services.core.command import product_version
from services.log.partitions import partition_name
from services.log.protocol import EVENT_LOG
from services.persister.volume import note_backup

MANIFEST_NAME = "manifest.json"
#: the volume's identity, under a name that no persister accepts: a backup must never run as a second volume
VOLUME_COPY = "volume.json.saved"
#: rises when an older fiq would misread a manifest
FORMAT = 1
KIND = "fiq-backup"

#: the files that a backup may hold besides its manifest; a name from a manifest becomes a path
_NAME = re.compile(rf"[0-9]{{2}}\.h5(?:\.wal)?|corpus\.h5|{re.escape(VOLUME_COPY)}", re.ASCII)
_DIRECTORY_MODE = 0o750
#: share of the time that each step takes
_COPYING, _VERIFYING, _DIGESTING = 0.35, 0.5, 0.15
#: what must stay free after the copy, bytes
SPARE_BYTES = 16 << 20
_PIECE_BYTES = 4 << 20

#: called with the fraction that is done, and with the current step
OnProgress = Callable[[float, str], None]

OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Do not ask the cluster; docs/cli.md says what that means.")
]


def backup(
    dest: Annotated[Path, typer.Argument(help="The directory to make; must not exist.")],
    corpus: Annotated[
        Path | None, typer.Option(help="Data directory of the volume; else FI_DATA_DIR, ./.fiq/corpus or ./corpus.")
    ] = None,
    server: ServerOption = None,
    folder: FolderOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Copy a volume while persisters write, and verify it.

    Each partition is copied as of one of its commits. The copy is a corpus that every reader opens. It gets its name
    only when it is complete and verified.
    """
    source = find_corpus(corpus, folder)
    _, store = read_volume(source / "volume.json")
    seen = None
    target = None if offline else find_cluster(server, folder)
    without_broker = target is not None and target.settings.uses_zeromq
    if target is not None and not without_broker and (seen := asyncio.run(look(target, store))) is None:
        raise BackupError("the cluster has no stream of events: is it the right one? Add --offline not to ask it")
    with bar("backing up") as show:
        try:
            manifest = make_backup(source, dest, seen, show)
        except CorpusError as error:
            raise BackupError(f"{error}; no backup was made") from error
    print_contents(manifest, json=json)
    size = sum(entry.bytes for entry in manifest.files)
    events = sum(entry.events for entry in manifest.contents)
    needed = min((entry.committed for entry in manifest.contents), default=0) + 1
    lost = f"To restore it without a loss, the stream must still begin at sequence {needed} or before: see FI_RETENTION"
    if not manifest.has_stream:
        lost = "Events that are accepted from now on are not in it, and nowhere else but in the volume"
    typer.echo(
        f"{dest}: volume {manifest.volume}, {count(events, 'event')}, {decimal(size)}, verified. {lost}", err=json
    )
    try:
        note_backup(source, manifest.made)
    except OSError as error:
        console.err().print(
            f"fiq: the backup is good, but {source} cannot note it ({error.strerror}): `fiq doctor` and the alert "
            "FiqBackupOld do not know of it. Run fiq backup as the user of the persisters",
            soft_wrap=True,
        )


# -- The manifest ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the backup: its name, size in bytes, and SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PartitionEntry:
    """A partition file of the backup.

    Attributes:
        file: its name.
        partition: its number.
        epoch: of its placement.
        begins: first stream sequence that it may hold.
        committed: stream sequence up to which it holds everything.
        consultations: how many it holds.
        events: how many it holds.
    """

    file: str
    partition: int
    epoch: int
    begins: int
    committed: int
    consultations: int
    events: int


@dataclass(frozen=True, slots=True)
class PlacementEntry:
    """The placement of a partition when the backup was begun."""

    partition: int
    volume: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """``manifest.json``: what a backup holds and where it belongs.

    Attributes:
        fiq: version of the program that made it.
        made: when it was begun, ISO 8601 in UTC.
        volume: UUID of the volume.
        store: name of the store.
        partitions: how many the stream has.
        stream: name of the stream.
        stream_created: when the stream was created, as the broker states it; of a log without a broker the volume.
        placement: of every placed partition of the store, on all volumes; None when the cluster was not asked.
        files: every file except the manifest.
        contents: the partition files, by number.
    """

    fiq: str
    made: str
    volume: str
    store: str
    partitions: int
    stream: str
    stream_created: str
    placement: tuple[PlacementEntry, ...] | None
    files: tuple[FileEntry, ...]
    contents: tuple[PartitionEntry, ...]

    @property
    def has_stream(self) -> bool:
        """Whether the log is a stream, which may hold what the backup lacks; a ZeroMQ log is in its volume only."""
        return self.stream_created != self.volume

    def write(self, directory: Path) -> Path:
        """Write the manifest of the backup in *directory* and return its path; the caller syncs it."""
        path = directory / MANIFEST_NAME
        document = {"kind": KIND, "format": FORMAT, **asdict(self)}
        path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
        path.chmod(0o640)
        return path

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of the backup in *directory*.

        Raises BackupError: there is none, or it has another format, or is damaged.
        """
        path = directory / MANIFEST_NAME
        try:
            found = orjson.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise BackupError(
                f"{directory} is not a backup: it has no {MANIFEST_NAME}, which `fiq backup` writes last"
            ) from None
        except orjson.JSONDecodeError:
            raise BackupError(f"{path} is damaged: it is not JSON; take another backup") from None
        if not isinstance(found, dict) or found.pop("kind", None) != KIND:
            raise BackupError(f"{path} is not the manifest of a fiq backup")
        if (version := found.pop("format", None)) != FORMAT:
            raise BackupError(f"{path} has format {version!r}, this fiq reads {FORMAT}: use the version that made it")
        try:
            return cls._of(found)
        except ValueError as error:
            raise BackupError(f"{path} is damaged: {error}; take another backup") from error
        except (TypeError, KeyError) as error:  # whose texts are Python's
            raise BackupError(f"{path} is damaged: a member is missing or malformed; take another backup") from error

    @classmethod
    def _of(cls, found: dict[str, Any]) -> Manifest:
        placement = found.pop("placement")
        files = tuple(FileEntry(**entry) for entry in found.pop("files"))
        contents = tuple(PartitionEntry(**entry) for entry in found.pop("contents"))
        names = [entry.name for entry in files]
        for name in names:
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"a backup cannot hold a file {name!a}")
        if len(set(names)) != len(names):
            raise ValueError("a file is listed twice")
        needed = {VOLUME_COPY, *(name for entry in contents for name in (entry.file, f"{entry.file}.wal"))}
        if missing := needed - set(names):
            raise ValueError(f"{min(missing)} is not listed")
        entries = None if placement is None else tuple(PlacementEntry(**entry) for entry in placement)
        return cls(**found, placement=entries, files=files, contents=contents)


def print_contents(manifest: Manifest, *, json: bool) -> None:
    """Print a table of the partition files, or everything as JSON."""
    if json:
        typer.echo(orjson.dumps(asdict(manifest), option=orjson.OPT_INDENT_2))
        return
    sizes = {entry.name: entry.bytes for entry in manifest.files}
    table = console.table("file", ">committed", ">consultations", ">events", ">size")
    for entry in manifest.contents:
        numbers = str(entry.committed), str(entry.consultations), str(entry.events)
        table.add_row(entry.file, *numbers, decimal(sizes[entry.file]))
    console.show(table)


def digest(path: Path, on_bytes: Callable[[int], None], copy: BinaryIO | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal, and write what was read to *copy*.

    *on_bytes* is called with the size of each piece.
    """
    made = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            made.update(piece)
            if copy is not None:
                copy.write(piece)
            on_bytes(len(piece))
    return made.hexdigest()


# -- The copy --------------------------------------------------------------------------------------------------------


def make_backup(corpus: Path, target: Path, seen: StoreView | None, on_progress: OnProgress) -> Manifest:
    """Copy the data directory *corpus*, which persisters may be writing, to the new directory *target*.

    Args:
        corpus: a volume's data directory.
        target: the directory to make.
        seen: the store in the cluster; None trusts the files.
        on_progress: of the copy, the verification and the checksums.

    Raises:
        BackupError: *target* exists, there is no room, or a file is missing or damaged.
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
    check_room(target.parent, sum(path.stat().st_size for path in paths))
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
    """Return UUID and store from a volume's ``volume.json``. Raises BackupError: there is none, or it is damaged."""
    try:
        found = orjson.loads(path.read_bytes())
        return str(found["volume"]), str(found["store"])
    except FileNotFoundError:
        raise BackupError(f"there is no {path}: name a volume, the FI_DATA_DIR of persisters, with --corpus") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BackupError(f"{path} is damaged: restore it; `nats kv get fi-partitions` names the volume") from error


def check_room(directory: Path, size: int) -> None:
    """Raise BackupError unless *directory* has room for *size* bytes."""
    needed, free = size + SPARE_BYTES, shutil.disk_usage(directory).free
    if free < needed:
        raise BackupError(f"{directory} has {free} bytes free, the backup needs about {needed}: make room")


def _check_complete(corpus: Path, volume: str, seen: StoreView) -> None:
    names = (partition_name(partition) for partition in seen.placed_on(volume))
    if gone := [name for name in names if not (corpus / f"{name}.h5").exists()]:
        raise BackupError(
            f"partition {', '.join(gone)} is placed on this volume but its file is not in {corpus}: restore it first, "
            "or add --offline to save what is there"
        )


def _copy(corpus: Path, paths: list[Path], target: Path, on_progress: OnProgress) -> None:
    total = sum(path.stat().st_size for path in paths) or 1
    done = 0
    for path in paths:
        size = path.stat().st_size

        def on_fraction(fraction: float, name: str = path.name, size: int = size, done: int = done) -> None:
            on_progress(_COPYING * (done + fraction * size) / total, f"copying {name}")

        copy_pair(path, target / path.name, on_progress=on_fraction)
        done += size
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
    with open_corpus(directory, strict=True) as corpus:
        return corpus.partitions


def _check_identities(infos: tuple[PartitionInfo, ...], volume: str, store: str, seen: StoreView | None) -> None:
    for info in infos:
        found = info.identity
        if (found.volume, found.store) != (volume, store):
            raise BackupError(
                f"{info.path.name} belongs to volume {found.volume} of store {found.store}, volume.json says {volume} "
                f"of {store}: move the file back to its volume"
            )
        if seen is None:
            continue
        if found.stream_created != seen.created:
            raise BackupError(
                f"{info.path.name} was written from the stream created at {found.stream_created}, the cluster's "
                f"{EVENT_LOG} was created at {seen.created}: add --offline to back up the old history"
            )
        placement = seen.placed.get(found.partition)
        if placement is not None and (placement.volume, placement.epoch) != (volume, found.epoch):
            raise BackupError(
                f"{info.path.name} is not where the cluster has the partition: volume {placement.volume}, epoch "
                f"{placement.epoch}; the file says volume {volume}, epoch {found.epoch}. Add --offline to back it up "
                "nevertheless"
            )


def _manifest(
    directory: Path, infos: tuple[PartitionInfo, ...], made: str, seen: StoreView | None, on_progress: OnProgress
) -> Manifest:
    names = sorted(path.name for path in directory.iterdir())
    total = sum((directory / name).stat().st_size for name in names)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(_COPYING + _VERIFYING + _DIGESTING * done / total, "computing checksums")

    files = [FileEntry(name, (directory / name).stat().st_size, digest(directory / name, on_bytes)) for name in names]
    placement = (
        None
        if seen is None
        else tuple(PlacementEntry(p, one.volume, one.epoch) for p, one in sorted(seen.placed.items()))
    )
    identity = infos[0].identity
    contents = tuple(
        PartitionEntry(
            file=info.path.name,
            partition=info.identity.partition,
            epoch=info.identity.epoch,
            begins=info.begins,
            committed=info.committed,
            consultations=info.consultations,
            events=info.events,
        )
        for info in infos
    )
    return Manifest(
        fiq=product_version(),
        made=made,
        volume=identity.volume,
        store=identity.store,
        partitions=identity.partitions,
        stream=identity.stream,
        stream_created=identity.stream_created,
        placement=placement,
        files=tuple(files),
        contents=contents,
    )


def _publish(manifest: Manifest, temporary: Path, target: Path) -> None:
    io = StorageIO()
    for path in (temporary / VOLUME_COPY, manifest.write(temporary)):
        sync_file(path, io)
    io.sync_directory(temporary)
    try:
        temporary.rename(target)  # fails if anything but an empty directory has appeared there
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
