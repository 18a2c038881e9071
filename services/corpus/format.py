"""The HDF5 layout of a partition file: names, types, attributes. docs/corpus-format.md is its description.

::

    /                                attributes: format, format_version, the identity, journal,
                                     begins_at_sequence, committed_sequence, committed_message_id,
                                     committed_events, committed_conflicts
    /consultations/<id>/events       table of EVENT_DTYPE, one row an event, in stream order
    /consultations/<id>/payload      u1: the events' bodies, each followed by a line feed
    /conflicts/<id>/{events,payload} the same for events under an id that the consultation holds with another body
"""

from __future__ import annotations

import re
import struct
from dataclasses import fields
from typing import Any

import numpy as np

from services.corpus.errors import CorpusFormatError
from services.corpus.records import Identity

#: what the attribute ``format`` says
FORMAT_NAME = "fiq-corpus"
#: rises when a program that knows only the older layout would misread the newer
FORMAT_VERSION = 3
#: oldest HDF5 release whose tools must read the files; ``latest`` would shut out h5dump 1.10
LIBVER = ("v110", "v110")

CONSULTATIONS = "consultations"
CONFLICTS = "conflicts"
EVENTS = "events"
PAYLOAD = "payload"
#: first stream sequence that the file may hold: above 1 for a store that began after the stream was trimmed
BEGINS = "begins_at_sequence"
COMMITTED = "committed_sequence"
#: message id of the stream's message at the committed sequence; empty when it had none
COMMITTED_ID = "committed_message_id"
COMMITTED_EVENTS = "committed_events"
COMMITTED_CONFLICTS = "committed_conflicts"
#: length of the fixed string in which :data:`COMMITTED_ID` is kept, bytes
MESSAGE_ID_BYTES = 200
#: attribute that only an archive has: when it was made
ARCHIVED = "archived"

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
    ]
)
#: the row without its chain value, for packing: seq, received_ns, offset, length, flags, event_id
EVENT_HEAD = struct.Struct("<QqQII16s")
#: rows a chunk of ``events``
EVENTS_CHUNK = 32
#: bytes a chunk of ``payload``
PAYLOAD_CHUNK = 4096
#: largest body, since ``length`` has 32 bits
MAX_BODY_BYTES = 2**32 - 1

_CONSULTATION = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_NUMBERS = ("epoch", "partition", "partitions")
_COUNTERS = (BEGINS, COMMITTED, COMMITTED_ID, COMMITTED_EVENTS, COMMITTED_CONFLICTS)


def is_consultation_id(value: str) -> bool:
    """Return whether *value* can name a consultation's group."""
    return _CONSULTATION.fullmatch(value) is not None


def write_attributes(root: Any, identity: Identity, journal: str, *, begins: int) -> None:
    """Write what a new file says of itself.

    Args:
        root: the root group, open in h5py for writing.
        journal: UUID that the file shares with its journal.
        begins: first stream sequence that it may hold.
    """
    root.attrs["format"] = FORMAT_NAME
    root.attrs["format_version"] = np.uint32(FORMAT_VERSION)
    for field in fields(Identity):
        value = getattr(identity, field.name)
        root.attrs[field.name] = np.uint32(value) if field.name in _NUMBERS else value
    root.attrs[BEGINS] = np.uint64(begins)
    root.attrs[COMMITTED] = np.uint64(begins - 1)
    root.attrs.create(COMMITTED_ID, b"", dtype=f"S{MESSAGE_ID_BYTES}")
    root.attrs[COMMITTED_EVENTS] = np.uint64(0)
    root.attrs[COMMITTED_CONFLICTS] = np.uint64(0)
    root.attrs["journal"] = journal


def read_identity(root: Any, name: str) -> Identity:
    """Return the identity that a file states.

    Args:
        root: the root group, open in h5py.
        name: the file's name, for messages.

    Raises:
        CorpusFormatError: it is no partition file, of another version, or an attribute is missing.
    """
    if root.attrs.get("format") != FORMAT_NAME:
        raise CorpusFormatError(f"{name}: the attribute format is not {FORMAT_NAME!r}: it is no partition file")
    version = int(root.attrs.get("format_version", 0))
    if version != FORMAT_VERSION:
        by = "an earlier" if version < FORMAT_VERSION else "a later"
        raise CorpusFormatError(
            f"{name} has format_version {version}, written by {by} version of fiq; this one reads {FORMAT_VERSION} "
            "only: use that version, or write a new corpus from the stream"
        )
    expected = [*(field.name for field in fields(Identity)), *_COUNTERS]
    missing = [attribute for attribute in expected if attribute not in root.attrs]
    if missing:
        raise CorpusFormatError(f"{name} lacks the attribute {missing[0]}")
    values = root.attrs
    return Identity(
        store=str(values["store"]),
        volume=str(values["volume"]),
        epoch=int(values["epoch"]),
        partition=int(values["partition"]),
        partitions=int(values["partitions"]),
        stream=str(values["stream"]),
        stream_created=str(values["stream_created"]),
    )
