"""Appends to HDF5 the usual way: high-level h5py, the same two datasets a consultation, plain flushes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from fiq.corpus.format import EVENT_DTYPE, EVENTS, EVENTS_CHUNK, PAYLOAD, PAYLOAD_CHUNK


class PlainFile:
    """An HDF5 file with a group for each consultation, as one would write it without thinking of crashes.

    Groups and datasets are looked up by name for each event: plain code keeps no handles of thousands of consultations.
    """

    def __init__(self, path: Path) -> None:
        self._file = h5py.File(path, "w")
        self._sequence = 0

    def append(self, consultation: str, events: Sequence[tuple[int, bytes, bytes]]) -> None:
        """Append events of one consultation: when each was received, its id, its body."""
        name = f"consultations/{consultation}"
        group = self._file[name] if name in self._file else self.create(consultation)
        table, payload = group[EVENTS], group[PAYLOAD]
        offset, row = payload.shape[0], table.shape[0]
        rows, lines = [], b""
        for received_ns, event_id, body in events:
            self._sequence += 1
            place = offset + len(lines)
            rows.append((self._sequence, received_ns, place, len(body), 0, np.void(event_id), np.void(bytes(32))))
            lines += body + b"\n"
        payload.resize((offset + len(lines),))
        payload[offset:] = np.frombuffer(lines, np.uint8)
        table.resize((row + len(rows),))
        table[row:] = np.array(rows, EVENT_DTYPE)

    def create(self, consultation: str) -> Any:
        """Create the group of a consultation with its two datasets and return it."""
        group = self._file.create_group(f"consultations/{consultation}")
        group.create_dataset(EVENTS, (0,), EVENT_DTYPE, maxshape=(None,), chunks=(EVENTS_CHUNK,))
        group.create_dataset(PAYLOAD, (0,), np.uint8, maxshape=(None,), chunks=(PAYLOAD_CHUNK,))
        return group

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Flush, and wait until it is on the disk."""
        self._file.flush()
        os.fsync(self._file.id.get_vfd_handle())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> PlainFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
