"""``corpus.h5``: one HDF5 file through which stock tools open the whole corpus of a data directory."""

from __future__ import annotations

import io as memory
from pathlib import Path
from typing import Any

import h5py

from services.corpus.errors import system_errors
from services.corpus.format import LIBVER
from services.corpus.reader import partition_files
from services.corpus.recovery import locked_directory, replace_file
from services.corpus.storage import StorageIO

#: name of the index in a data directory
INDEX_NAME = "corpus.h5"
#: what its attribute ``format`` says
INDEX_FORMAT = "fiq-corpus-index"
#: the group of its links
INDEX_GROUP = "partitions"


def write_index(directory: Path, io: StorageIO | None = None) -> None:
    """Write ``corpus.h5`` with an external link to every partition file, in one durable step; one that has them stays.

    Each ``<pp>.h5`` appears as ``/partitions/<pp>``, whose ``consultations/<id>`` holds ``events`` and ``payload``. The
    links are relative: the directory can be moved and copied. In Python::

        with h5py.File("corpus/corpus.h5") as corpus:
            for partition in corpus["partitions"].values():
                table = partition["consultations"][consultation]["events"][:]

    Raises:
        CorpusNotFoundError: there is no such directory.
        CorpusLockedError: another process creates files there.
        CorpusIOError: the system refused.
    """
    with locked_directory(directory), system_errors(f"write {INDEX_NAME}"):
        io = StorageIO() if io is None else io
        path, partitions = directory / INDEX_NAME, partition_files(directory)
        if _is_current(path, partitions):
            # it may have been put there by one whose sync of the directory failed
            io.sync_directory(directory)
        else:
            replace_file(path, _image(partitions), io)


def read_links(path: Path) -> dict[str, tuple[str, str] | str]:
    """Return what an index links, by name: file and path within it; of what is no external link, the kind.

    Raises:
        OSError, RuntimeError, ValueError, KeyError, TypeError: it is no index, or damaged.
    """
    with h5py.File(path, "r") as file:
        if file.attrs.get("format") != INDEX_FORMAT:
            raise ValueError("the attribute format is missing")
        group = file[INDEX_GROUP]
        return {name: _target(group.get(name, getlink=True)) for name in group}


def _is_current(path: Path, partitions: list[Path]) -> bool:
    try:
        return read_links(path) == {place.stem: (place.name, "/") for place in partitions}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return False


def _target(link: Any) -> tuple[str, str] | str:
    return (link.filename, link.path) if isinstance(link, h5py.ExternalLink) else type(link).__name__


def _image(paths: list[Path]) -> bytes:
    buffer = memory.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER) as file:
        file.attrs["format"] = INDEX_FORMAT
        links = file.create_group(INDEX_GROUP)
        for path in paths:
            links[path.stem] = h5py.ExternalLink(path.name, "/")
    return buffer.getvalue()
