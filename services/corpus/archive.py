"""Archives: compact copies of partition files that ``fiq repack`` makes. Read like any other, never written again."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

from services.corpus.errors import ArchivedFileError, system_errors
from services.corpus.pair import USER_BLOCK, new_user_block

#: place of the mark in the user block
_MARK_AT = 256
_MARK = b"FIQARCHV"
_NOTE_AT, _NOTE_END = 512, 4096
_NOTE = (
    b"fiq corpus archive. Its HDF5 content starts at byte 16384: open it read-only, with any HDF5 tool.\n"
    b"It is complete: there is no journal beside it.\n"
)


def archive_user_block(uuid: UUID) -> bytes:
    """Return the user block of an archive: that of a new file, with a mark and another note."""
    block = bytearray(new_user_block(uuid))
    block[_MARK_AT : _MARK_AT + len(_MARK)] = _MARK
    block[_NOTE_AT:_NOTE_END] = _NOTE.ljust(_NOTE_END - _NOTE_AT, b"\0")
    assert len(block) == USER_BLOCK
    return bytes(block)


def refuse_archive(path: Path) -> None:
    """Refuse to write a file that is an archive; what is wrong with any other is for others to say.

    Raises:
        ArchivedFileError: it is one.
        CorpusIOError: the system refused.
    """
    with system_errors(f"open {path.name}"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            mark = os.pread(fd, len(_MARK), _MARK_AT)
        finally:
            os.close(fd)
    if mark == _MARK:
        raise ArchivedFileError(
            f"{path.name} is an archive that `fiq repack` made: it can be read, not written; "
            "put the partition file and its journal back that it was made from"
        )
