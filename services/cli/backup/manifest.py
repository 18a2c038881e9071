"""``manifest.json``: what a backup holds and where it belongs. A directory without one is no finished backup."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from services.cli.errors import BackupError

MANIFEST_NAME = "manifest.json"
#: the volume's identity under a name that no persister takes for one: a backup must never run as a second volume
VOLUME_COPY = "volume.json.saved"
#: rises when an older fiq would misread a manifest
FORMAT = 1
KIND = "fiq-backup"

#: everything that a backup may hold besides its manifest; a name from a manifest becomes a path
_NAME = re.compile(rf"[0-9]{{2}}\.h5(?:\.wal)?|corpus\.h5|{re.escape(VOLUME_COPY)}", re.ASCII)
_PIECE_BYTES = 4 << 20


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
class PlaceEntry:
    """Where the bucket said a partition lives, when the backup was begun."""

    partition: int
    volume: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds.

    Attributes:
        fiq: version of the program that made it.
        made: when it was begun, ISO 8601 in UTC.
        volume: UUID of the volume.
        store: name of the store.
        partitions: how many the stream has.
        stream: name of the stream.
        stream_created: when the stream was created, as the broker states it.
        placement: of every placed partition of the store, those on other volumes too; None when the cluster was not
            asked.
        files: everything but the manifest.
        contents: the partition files, by number.
    """

    fiq: str
    made: str
    volume: str
    store: str
    partitions: int
    stream: str
    stream_created: str
    placement: tuple[PlaceEntry, ...] | None
    files: tuple[FileEntry, ...]
    contents: tuple[PartitionEntry, ...]

    def write(self, directory: Path) -> Path:
        """Write the manifest of the backup in *directory* and return its path; the caller makes it durable."""
        path = directory / MANIFEST_NAME
        document = {"kind": KIND, "format": FORMAT, **asdict(self)}
        path.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
        path.chmod(0o640)
        return path

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of the backup in *directory*.

        Raises BackupError: there is none, or it is of another version, or damaged.
        """
        path = directory / MANIFEST_NAME
        try:
            found = orjson.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise BackupError(
                f"{directory} is no backup: it has no {MANIFEST_NAME}, which `fiq backup` writes last, when all is good"
            ) from None
        except orjson.JSONDecodeError:
            raise BackupError(f"{path} is damaged: it is no JSON; take another backup") from None
        if not isinstance(found, dict) or found.pop("kind", None) != KIND:
            raise BackupError(f"{path} is no manifest of a fiq backup")
        if (version := found.pop("format", None)) != FORMAT:
            raise BackupError(f"{path} has format {version!r}, this fiq reads {FORMAT}: use the version that made it")
        try:
            return cls._of(found)
        except (TypeError, ValueError, KeyError) as error:
            raise BackupError(f"{path} is damaged: {error}; take another backup") from error

    @classmethod
    def _of(cls, found: dict[str, Any]) -> Manifest:
        placement = found.pop("placement")
        files = tuple(FileEntry(**entry) for entry in found.pop("files"))
        contents = tuple(PartitionEntry(**entry) for entry in found.pop("contents"))
        names = [entry.name for entry in files]
        for name in names:
            if _NAME.fullmatch(name) is None:
                raise ValueError(f"no backup holds a file {name!a}")
        if len(set(names)) != len(names):
            raise ValueError("a file is listed twice")
        if missing := {f for entry in contents for f in (entry.file, f"{entry.file}.wal")} - set(names):
            raise ValueError(f"{min(missing)} is not listed")
        if VOLUME_COPY not in names:
            raise ValueError(f"{VOLUME_COPY} is not listed")
        places = None if placement is None else tuple(PlaceEntry(**entry) for entry in placement)
        return cls(**found, placement=places, files=files, contents=contents)


def digest(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """Return the SHA-256 of the file at *path* in hexadecimal; *on_bytes* is told how many more were read.

    Raises OSError: it cannot be read.
    """
    made = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            made.update(piece)
            on_bytes(len(piece))
    return made.hexdigest()
