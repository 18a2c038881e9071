"""Checks what the files of a data directory say of each other: one volume, one stream, links that lead somewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from services.corpus.index import INDEX_NAME, read_links
from services.corpus.journal_scan import RECORDS_START
from services.corpus.reader import PartitionInfo, partition_files
from services.corpus.report import Problem

#: who the volume is; the persister writes it, and the corpus only compares
VOLUME_NAME = "volume.json"
_JOURNALS = "*.h5.wal"
#: what is equal in all partition files of a data directory
_SHARED = ("store", "volume", "partitions", "stream", "stream_created")


def check_volume(directory: Path, infos: Sequence[PartitionInfo]) -> Iterator[Problem]:
    """Compare the identities of the partition files with each other, and with ``volume.json`` where there is one."""
    for info in infos[1:]:
        for field in _SHARED:
            found, wanted = getattr(info.identity, field), getattr(infos[0].identity, field)
            if found != wanted:
                message = (
                    f"{field} is {found!r} but {infos[0].path.name} says {wanted!r}: the file is of another corpus"
                )
                yield Problem("identity", message, info.path.name)
    path = directory / VOLUME_NAME
    if not path.exists() or any(info.archived for info in infos):
        return
    try:
        stated = json.loads(path.read_bytes())
        wanted = {"volume": str(stated["volume"]), "store": str(stated["store"])}
    except (OSError, ValueError, KeyError, TypeError):
        yield Problem("volume", "it is no JSON object with volume and store: restore it", VOLUME_NAME)
        return
    for info in infos:
        for field, value in wanted.items():
            found = getattr(info.identity, field)
            if found != value:
                message = f"{field} is {found!r} but {VOLUME_NAME} says {value!r}: the file is of another volume"
                yield Problem("identity", message, info.path.name)


def check_index(directory: Path, paths: Sequence[Path]) -> Iterator[Problem]:
    """Check that ``corpus.h5`` links exactly the partition files; a directory without one is complete as well.

    Partitions may be created meanwhile: only *paths*, those that were there long before, must have a link, and a link
    may lead to any that is there by now.
    """
    path = directory / INDEX_NAME
    if not path.exists():
        return
    try:
        links = read_links(path)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        yield Problem("index", f"it cannot be read: {error}; write_index() makes it anew", INDEX_NAME)
        return
    before = {place.stem for place in paths}
    wanted = {place.stem: (place.name, "/") for place in partition_files(directory)}
    for name in sorted(wanted.keys() | links.keys()):
        found = links.get(name)
        if found is None and name in before:
            yield Problem("index", f"it has no link to {wanted[name][0]}; write_index() makes it anew", INDEX_NAME)
        elif found is not None and found != wanted.get(name):
            yield Problem("index", f"the link {name!a} leads nowhere or astray: {found!r}", INDEX_NAME)


def check_journals(directory: Path) -> Iterator[Problem]:
    """Find journals with commits whose partition file is gone."""
    for journal in sorted(directory.glob(_JOURNALS)):
        file = journal.with_suffix("")
        # creation writes the journal first: an empty one alone is what a crash leaves. One with commits had its file
        # beside it before them, so the file is looked for after the journal
        if journal.stat().st_size > RECORDS_START and not file.exists():
            yield Problem("journal", f"it holds commits but {file.name} is missing: restore the file", journal.name)
