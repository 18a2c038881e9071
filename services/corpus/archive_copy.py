"""Writes consultations into an archive, and compares an archive with its original."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from h5py import h5d, h5g, h5p, h5s, h5t

from services.corpus.events import Consultation
from services.corpus.format import EVENT_DTYPE, EVENTS, PAYLOAD
from services.corpus.reader import Corpus

#: largest chunk of ``events``, rows; a shorter consultation is one chunk
_EVENTS_CHUNK = 2048
#: largest chunk of ``payload``, bytes
_PAYLOAD_CHUNK = 256 << 10
#: what is copied at once: whole chunks
_ROWS, _BYTES = 4 * _EVENTS_CHUNK, 32 * _PAYLOAD_CHUNK
#: level of gzip: higher ones take much longer and save little
_LEVEL = 6


class ArchiveWriter:
    """Copies consultations into a group.

    Args:
        group: low-level id of the group that takes them.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._row_type = h5t.py_create(EVENT_DTYPE)

    def add(self, consultation: Consultation) -> None:
        """Copy one consultation, slice by slice."""
        group = h5g.create(self._group, consultation.id.encode())
        # the bytes of a field beside those of the same field in the next row: numbers that rise slowly compress well
        _write(group, EVENTS, self._row_type, len(consultation), _EVENTS_CHUNK, _tables(consultation), shuffle=True)
        _write(group, PAYLOAD, h5t.STD_U8LE, consultation.payload_bytes, _PAYLOAD_CHUNK, _lines(consultation))


def first_difference(original: Corpus, copy: Corpus, tell: Callable[[float], None]) -> str | None:
    """Return what differs first between two corpora of one partition file each; None when they hold the same."""
    ours, theirs = original.partitions[0], copy.partitions[0]
    for field in ("identity", "committed", "committed_id", "consultations", "events", "conflicts"):
        if getattr(ours, field) != getattr(theirs, field):
            return f"{field} is {getattr(theirs, field)}, not {getattr(ours, field)}"
    for number, consultation in enumerate(original.values(), 1):
        if consultation.id not in copy:
            return f"{consultation.id} is missing"
        if not _equal(consultation, copy[consultation.id]):
            return f"{consultation.id} has other events"
        tell(number / ours.consultations)
    for kept, copied in zip(original.conflicts(), copy.conflicts(), strict=True):
        if kept.id != copied.id or not _equal(kept, copied):
            return f"{kept.id} has other conflicts"
    return None


def _equal(first: Consultation, second: Consultation) -> bool:
    if (len(first), first.payload_bytes) != (len(second), second.payload_bytes):
        return False
    tables = zip(_tables(first), _tables(second), strict=True)
    lines = zip(_lines(first), _lines(second), strict=True)
    return all(one.tobytes() == other.tobytes() for one, other in tables) and all(
        np.array_equal(one, other) for one, other in lines
    )


def _tables(consultation: Consultation) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, len(consultation), _ROWS):
        yield consultation.table(start, start + _ROWS)


def _lines(consultation: Consultation) -> Iterator[npt.NDArray[Any]]:
    length = consultation.payload_bytes
    for start in range(0, length, _BYTES):
        yield consultation.lines(start, min(start + _BYTES, length))


def _write(
    group: Any,
    name: str,
    kind: Any,
    length: int,
    chunk: int,
    pieces: Iterator[npt.NDArray[Any]],
    *,
    shuffle: bool = False,
) -> None:
    space = h5s.create_simple((length,))
    dataset = h5d.create(group, name.encode(), kind, space, _plan(max(1, min(length, chunk)), shuffle=shuffle))
    place = 0
    for piece in pieces:
        space.select_hyperslab((place,), (len(piece),))
        dataset.write(h5s.create_simple((len(piece),)), space, piece, kind)
        place += len(piece)


def _plan(chunk: int, *, shuffle: bool) -> Any:
    plan = h5p.create(h5p.DATASET_CREATE)
    plan.set_chunk((chunk,))
    if shuffle:
        plan.set_shuffle()
    plan.set_deflate(_LEVEL)
    plan.set_fill_time(h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)
    return plan
