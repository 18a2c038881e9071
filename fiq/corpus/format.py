"""The HDF5 layout of a partition file: names, types, attributes. docs/corpus-format.md describes it.

::

    /                                attributes: format, format_version, the identity, journal,
                                     begins_at_sequence, committed_sequence, committed_message_id,
                                     committed_events, committed_conflicts
    /consultations/<id>/events       table of EVENT_DTYPE, one row an event, in stream order
    /consultations/<id>/payload      u1: the events' bodies, each followed by a line feed
    /conflicts/<id>/{events,payload} the same, for events that came under a used id with another body
    /names                           the sorted ids of /consultations, see :mod:`fiq.corpus.names`
    /active                          table of ACTIVE_DTYPE: the consultations with the newest events
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass, field, fields
from functools import lru_cache
from hashlib import sha256
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from fiq.corpus.errors import CorpusFormatError, IdentityMismatchError
from fiq.corpus.names import create_names
from fiq.corpus.wal.journal import USER_BLOCK

#: bytes of an event id
EVENT_ID_BYTES = 16
#: bytes of a chain value
CHAIN_BYTES = 32

_PREFIX = "fiq-chain-1"
#: slots of a dataset's chunk cache: whole chunks are written directly and read in slices, and HDF5 2.0's default takes
#: 88 KB each
CHUNK_SLOTS = 17
#: metadata of a file that is read which stays in memory, bytes as they are in the file
READER_METADATA_BYTES = 2 << 20
#: what the attribute ``format`` says
FORMAT_NAME = "fiq-corpus"
#: rises when a program that knows only the older layout would misread the newer
FORMAT_VERSION = 5
#: oldest HDF5 release whose tools must read the files; ``latest`` would shut out h5dump 1.10
LIBVER = ("v110", "v110")
#: that of archives for old and small readers
PORTABLE_LIBVER = ("v108", "v108")

CONSULTATIONS = "consultations"
CONFLICTS = "conflicts"
EVENTS = "events"
PAYLOAD = "payload"
NAMES = "names"
ACTIVE = "active"
#: the attributes that every commit writes: see :func:`commit_values`
COMMIT_ATTRIBUTES = ("committed_sequence", "committed_message_id", "committed_events", "committed_conflicts")
#: length of the fixed string in which a message id is kept, bytes
_MESSAGE_ID_BYTES = 200

#: one row of ``events``; an opaque id keeps all 16 bytes in numpy (a string type would cut trailing zeros)
EVENT_DTYPE = np.dtype(
    [
        ("seq", "<u8"),
        ("received_ns", "<i8"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("flags", "<u4"),
        ("event_id", "V16"),
        ("chain", "V32"),
        ("written_ns", "<i8"),
    ]
)
#: the same bytes in an archive for small readers, which know no opaque types
PORTABLE_EVENT_DTYPE = np.dtype(
    [
        (name, f"S{kind.itemsize}" if kind.kind == "V" else kind)
        for name, (kind, *_) in (EVENT_DTYPE.fields or {}).items()
    ]
)
#: what the chain covers of a row, for packing: seq, received_ns, offset, length, flags, event_id
EVENT_HEAD = struct.Struct("<QqQII16s")
#: the rest, for packing: chain, written_ns
EVENT_TAIL = struct.Struct("<32sq")
#: a whole row, for unpacking
EVENT_ROW = struct.Struct(EVENT_HEAD.format + EVENT_TAIL.format.removeprefix("<"))
#: rows a chunk of ``events``
EVENTS_CHUNK = 16
#: one row of ``active``: when the last event of a consultation was accepted, and its id
ACTIVE_DTYPE = np.dtype([("received_ns", "<i8"), ("consultation", "S128")])
#: rows of ``active``, at most, and rows of its chunks
MOST_ACTIVE, ACTIVE_CHUNK = 1000, 50
#: bytes a chunk of ``payload``: of a consultation that begins with little, so that many such take little room, and of
#: others, which are written faster
SHORT_PAYLOAD_CHUNK, PAYLOAD_CHUNK = 1024, 4096
#: largest body, since ``length`` has 32 bits
MAX_BODY_BYTES = 2**32 - 1

_CONSULTATION = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_NUMBERS = ("epoch", "partition", "partitions")


@dataclass(frozen=True, slots=True)
class Record:
    """One event to append. Its ``repr`` leaves the body out: bodies are medical data."""

    sequence: int  #: in the stream; rises within a consultation
    received_ns: int  #: when it was accepted, nanoseconds since the Unix epoch
    written_ns: int  #: when it is written, nanoseconds since the Unix epoch
    event_id: bytes  #: 16 bytes, unique within the consultation
    body: bytes = field(repr=False)  #: one JSON text in UTF-8 without line breaks


@dataclass(frozen=True, slots=True)
class Identity:
    """What a partition file states about itself; every field is compared when it is opened."""

    store: str  #: name of the full copy of the corpus that the file is part of
    volume: str  #: UUID of the data directory that the file belongs to
    epoch: int  #: how often the partition has been placed
    partition: int  #: its number, from 0
    partitions: int  #: number of partitions of the stream, fixed at its creation
    stream: str  #: name of the stream that the sequences count
    stream_created: str  #: when the broker created that stream: a re-created one counts from 1 again


_REMEDIES = {
    "store": "point FI_STORE or FI_DATA_DIR at the store that the file belongs to",
    "volume": "put the file back into the data directory of its own volume; one copied elsewhere must not be written",
    "epoch": (
        "the partition was placed anew since (by `fiq give-up` or `fiq restore`), so this is a stale copy: stop the "
        "persisters of this directory and keep it for reading; docs/operations.md, `A lost disk comes back`"
    ),
    "partition": "the file was renamed or copied over another one; put the right file back",
    "partitions": "use the partition count that the stream was created with; it cannot change",
    "stream": "point the service at the stream that the file was written from, or use another data directory",
    "stream_created": (
        "the stream was deleted and created anew, so its sequences no longer match the file; "
        "use a new data directory for the new stream and keep this one as it is"
    ),
}


def check_identity(name: str, expected: Identity, found: Identity) -> None:
    """Compare the identity that a file states with the one that is expected of it.

    Args:
        name: the file's name, for the message.

    Raises IdentityMismatchError: a field differs; the message names it, both values, and what to do.
    """
    for part in fields(Identity):
        wanted, stated = getattr(expected, part.name), getattr(found, part.name)
        if wanted != stated:
            raise IdentityMismatchError(
                f"{name}: {part.name} is {stated!r} in the file but {wanted!r} is expected: {_REMEDIES[part.name]}",
                field=part.name,
                expected=wanted,
                found=stated,
            )


def is_consultation_id(value: str) -> bool:
    """Return whether *value* can name a consultation's group."""
    return _CONSULTATION.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of a partition file."""

    identity: Identity
    journal: str  #: UUID that the file shares with its journal
    begins: int  #: first stream sequence that it may hold: above 1 for a store that began after the stream was trimmed
    committed: int  #: stream sequence of the last commit
    committed_id: str = ""  #: message id of the stream's message there; empty when it had none
    events: int = 0  #: in all consultations, as of the last commit
    conflicts: int = 0  #: events that came under a used id with another body
    archived: str = ""  #: when ``fiq repack`` made the file; empty for all others


def commit_values(sequence: int, message_id: str, events: int, conflicts: int) -> tuple[npt.NDArray[Any], ...]:
    """Return the values of :data:`COMMIT_ATTRIBUTES`."""
    identifier = np.array(message_id.encode("ascii"), f"S{_MESSAGE_ID_BYTES}")
    return np.array(sequence, np.uint64), identifier, np.array(events, np.uint64), np.array(conflicts, np.uint64)


def write_attributes(root: Any, attributes: Attributes) -> None:
    """Write the attributes of a new file into the *root* group, open in h5py."""
    own, values = attributes, root.attrs
    values["format"] = FORMAT_NAME
    values["format_version"] = np.uint32(FORMAT_VERSION)
    for part in fields(Identity):
        value = getattr(own.identity, part.name)
        values[part.name] = np.uint32(value) if part.name in _NUMBERS else value
    values["begins_at_sequence"] = np.uint64(own.begins)
    committed = commit_values(own.committed, own.committed_id, own.events, own.conflicts)
    for name, array in zip(COMMIT_ATTRIBUTES, committed, strict=True):
        values[name] = array
    values["journal"] = own.journal
    if own.archived:
        values["archived"] = own.archived


def read_attributes(root: Any, name: str) -> Attributes:
    """Return the attributes of the file *name* from its *root* group, open in h5py.

    Raises CorpusFormatError: it is no partition file, of another version, or an attribute is missing.
    """
    values = root.attrs
    if values.get("format") != FORMAT_NAME:
        raise CorpusFormatError(f"{name}: the attribute format is not {FORMAT_NAME!r}: it is no partition file")
    version = int(values.get("format_version", 0))
    if version != FORMAT_VERSION:
        by = "an earlier" if version < FORMAT_VERSION else "a later"
        raise CorpusFormatError(
            f"{name} has format_version {version}, written by {by} version of fiq; this one reads {FORMAT_VERSION} "
            "only: use that version, or write a new corpus from the stream"
        )
    expected = [*(part.name for part in fields(Identity)), "begins_at_sequence", *COMMIT_ATTRIBUTES, "journal"]
    missing = [attribute for attribute in expected if attribute not in values]
    if missing:
        raise CorpusFormatError(f"{name} lacks the attribute {missing[0]}")
    identity: dict[str, Any] = {
        part.name: (int if part.name in _NUMBERS else str)(values[part.name]) for part in fields(Identity)
    }
    committed, committed_id, events, conflicts = (values[attribute] for attribute in COMMIT_ATTRIBUTES)
    return Attributes(
        identity=Identity(**identity),
        journal=str(values["journal"]),
        begins=int(values["begins_at_sequence"]),
        committed=int(committed),
        committed_id=bytes(committed_id).decode("ascii"),
        events=int(events),
        conflicts=int(conflicts),
        archived=str(values.get("archived", "")),
    )


def empty_file(identity: Identity, journal: str, *, begins: int) -> bytes:
    """Return the whole content of a partition file without events; its user block is empty."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER, userblock_size=USER_BLOCK) as file:
        write_attributes(file, Attributes(identity, journal, begins, committed=begins - 1))
        file.create_group(CONSULTATIONS)
        file.create_group(CONFLICTS)
        create_names(file.id, NAMES.encode())
        file.create_dataset(ACTIVE, (0,), ACTIVE_DTYPE, chunks=(ACTIVE_CHUNK,), maxshape=(MOST_ACTIVE,))
    return buffer.getvalue()


def bound_metadata(file: Any, size: int) -> None:
    """Fix the size of a file's metadata cache.

    By default it grows to 32 MB of metadata, half a gigabyte of memory, when many consultations are read or written one
    after another, and gets no faster: HDF5 keeps some 10 KB for an object header of a few hundred bytes.

    Args:
        file: an open h5py ``File``.
        size: bytes as they are in the file; unpacked they take fifteen to twenty times as much.
    """
    config = file.id.get_mdc_config()
    config.set_initial_size = True
    config.initial_size = config.min_size = config.max_size = size
    config.incr_mode = config.flash_incr_mode = config.decr_mode = 0
    file.id.set_mdc_config(config)


# -- The chain of a consultation: each row carries a hash of its event and of the row before it ----------------------
#
# An event that is changed, removed or moved no longer fits the next row. The chain finds damage and mistakes; it is not
# a signature, since a program that rewrites all later rows goes unnoticed. Events cut off at the end break no chain:
# the partition's ``committed_events`` shows that they are missing. ``written_ns`` is not covered: each store writes an
# event at its own time, and two stores have equal chains.


def chain_start(identity: Identity, consultation: str, *, of: str = CONSULTATIONS) -> bytes:
    """Return what the first row of a consultation is chained to, or that of its conflicts (with *of*).

    It leaves out store, volume and epoch: they change when a partition moves, and differ between two stores.
    """
    # a consultation's id has no slash: the names of the two groups never collide
    name = consultation if of == CONSULTATIONS else f"{of}/{consultation}"
    return sha256(_partition_name(identity) + name.encode()).digest()


def chain_next(before: bytes, row: bytes, body: bytes) -> bytes:
    """Return the chain value of an event.

    Args:
        before: that of the row before it, or :func:`chain_start`.
        row: the row's first 48 bytes, :data:`EVENT_HEAD`.
        body: the body without its line feed.
    """
    return sha256(b"".join((before, row, body))).digest()


@lru_cache(64)
def _partition_name(identity: Identity) -> bytes:
    numbers = (str(identity.partition), str(identity.partitions))
    return "\0".join([_PREFIX, identity.stream, identity.stream_created, *numbers, ""]).encode()
