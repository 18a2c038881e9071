"""The head of a partition file, which ties it to its journal.

HDF5 leaves the first 16 KiB (the *user block*) of the file to us; the HDF5 content starts behind it and stock tools
find it there. All integers are little-endian::

    0      identity   magic, CRC, version, UUID of the pair; written once. From 512 on, a note in plain text
    4096   state A    magic, CRC, link, turn, absorbed, target
    8192   state B    the same; the one with the higher turn counts, they are written in turn

*absorbed* is the number of journal records that the file holds completely. While a checkpoint copies the next ones,
*target* is ahead of *absorbed*, and the content is of use only together with the journal.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from fiq.corpus.errors import ArchivedFileError, CorpusFormatError, system_errors
from fiq.corpus.wal.storage import StorageIO, read_exactly, write_all

#: place of the mark in the user block
_MARK_AT = 256
_MARK = b"FIQARCHV"
_NOTE_AT, _NOTE_END = 512, 4096
_ARCHIVE_NOTE = (
    b"fiq corpus archive. Its HDF5 content starts at byte 16384: open it read-only, with any HDF5 tool.\n"
    b"It is complete: there is no journal beside it.\n"
)
#: size of the user block: three blocks of a disk with large sectors and one to spare (HDF5 wants a power of two)
USER_BLOCK = 16384
#: version of the pair: user block and journal
PAIR_VERSION = 2

_BLOCK = 4096
_MAGIC = b"FIQHDF5\0"
_IDENTITY = struct.Struct("<8sII16s")  # magic, CRC-32 of what follows it, version, UUID
_STATE = struct.Struct("<8sIIQQQ")  # magic, CRC-32 of what follows it, link, turn, absorbed, target
_STATE_MAGIC = b"FIQSTATE"
_CRC_END = 12
_NOTE = (
    b"fiq corpus partition file. Its HDF5 content starts at byte 16384: open it read-only, with any HDF5 tool.\n"
    b"The newest commits may still be in the journal beside it (.h5.wal): keep the two together.\n"
)


@dataclass(frozen=True, slots=True)
class State:
    """How far the file has absorbed its journal.

    Attributes:
        turn: counts the states written; odd ones lie in slot B.
        absorbed: number of journal records that the content holds.
        target: number that it will hold when the checkpoint under way is done; equal to *absorbed* when none is.
        link: header CRC of the last absorbed record (0: none yet), so that histories that diverged are told apart.
    """

    turn: int
    absorbed: int
    target: int
    link: int

    def pack(self) -> bytes:
        """Return the bytes of a state slot."""
        return _sealed(_STATE.pack(_STATE_MAGIC, 0, self.link, self.turn, self.absorbed, self.target))


#: the state of a new file
FIRST_STATE = State(turn=0, absorbed=0, target=0, link=0)


def new_user_block(uuid: UUID) -> bytes:
    """Return the user block of a new file."""
    block = bytearray(USER_BLOCK)
    block[: _IDENTITY.size] = _sealed(_IDENTITY.pack(_MAGIC, 0, PAIR_VERSION, uuid.bytes))
    block[512 : 512 + len(_NOTE)] = _NOTE
    block[_BLOCK : _BLOCK + _STATE.size] = FIRST_STATE.pack()
    return bytes(block)


def read_uuid(fd: int, name: str) -> UUID:
    """Return the UUID of the pair that the file belongs to.

    Raises CorpusFormatError: it is no partition file, or one of a later version.
    """
    head = read_exactly(fd, _IDENTITY.size, 0)
    magic, crc, version, uuid = _IDENTITY.unpack(head)
    if magic != _MAGIC or crc != zlib.crc32(head[_CRC_END:]):
        raise CorpusFormatError(f"{name} is no partition file of a fiq corpus: its first 32 bytes do not say so")
    if version != PAIR_VERSION:
        raise CorpusFormatError(f"{name} has version {version} of the format, this program reads {PAIR_VERSION}")
    return UUID(bytes=uuid)


def read_state(fd: int, name: str) -> State:
    """Return the newest state of the file. Raises CorpusFormatError: neither slot is readable."""
    states = [state for slot in (0, 1) if (state := _unpack(read_exactly(fd, _STATE.size, _BLOCK * (1 + slot))))]
    if not states:
        raise CorpusFormatError(f"{name}: both state slots of the user block are damaged; restore the file")
    return max(states, key=lambda state: state.turn)


def write_state(io: StorageIO, fd: int, state: State) -> None:
    """Write *state* into its slot; the caller syncs."""
    write_all(io, fd, state.pack(), _BLOCK * (1 + state.turn % 2))


def _sealed(packed: bytes) -> bytes:
    return packed[:8] + struct.pack("<I", zlib.crc32(packed[_CRC_END:])) + packed[_CRC_END:]


def _unpack(raw: bytes) -> State | None:
    magic, crc, link, turn, absorbed, target = _STATE.unpack(raw)
    if magic != _STATE_MAGIC or crc != zlib.crc32(raw[_CRC_END:]):
        return None
    return State(turn, absorbed, target, link)


def archive_user_block(uuid: UUID) -> bytes:
    """Return the user block of an archive: that of a new file, with a mark and another note."""
    block = bytearray(new_user_block(uuid))
    block[_MARK_AT : _MARK_AT + len(_MARK)] = _MARK
    block[_NOTE_AT:_NOTE_END] = _ARCHIVE_NOTE.ljust(_NOTE_END - _NOTE_AT, b"\0")
    assert len(block) == USER_BLOCK
    return bytes(block)


def refuse_archive(path: Path) -> None:
    """Refuse to write a file that is an archive; what is wrong with any other is for others to say.

    Raises ArchivedFileError: it is one; CorpusIOError: the system refused.
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
