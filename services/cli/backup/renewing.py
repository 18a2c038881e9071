"""Lets a lost volume begin anew, empty, under its old identity: for when there is no backup of it.

Its partitions stay placed on it, so nobody else has to take them, and no user needs the right to delete a consumer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson

from services.cli.backup.making import sync_file
from services.cli.backup.restoring import mark_unborn
from services.corpus import StorageIO
from services.corpus.filesystems import check_file_system
from services.persister.volume import FORMAT


def begin_anew(target: Path, volume: str, store: str, epochs: Mapping[int, int]) -> None:
    """Make *target*, which :func:`~services.cli.backup.restoring.reserved` holds, the directory of an empty volume.

    Args:
        target: the data directory.
        volume: UUID of the volume that is lost.
        store: its store.
        epochs: of the partitions that live on it: persisters make new files for them, which say these.

    Raises:
        OSError, CorpusError: the system refused; persisters do not take the directory for the volume.
    """
    check_file_system(target)
    io = StorageIO()
    mark_unborn(target, volume, epochs)
    temporary = target / "volume.json.new"
    temporary.write_bytes(orjson.dumps({"format": FORMAT, "volume": volume, "store": store}) + b"\n")
    temporary.chmod(0o640)
    sync_file(temporary, io)
    # the last: from now on persisters take the directory for the volume
    io.rename(temporary, target / "volume.json")
    io.sync_directory(target)
