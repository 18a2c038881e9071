"""Bounds of what HDF5 keeps in memory for an open file."""

from __future__ import annotations

from typing import Any

#: slots of a dataset's chunk cache: whole chunks are written directly and read in slices, and HDF5 2.0's default takes
#: 88 KB each
CHUNK_SLOTS = 17
#: metadata of a file that is read which stays in memory, bytes as they are in the file
READER_METADATA_BYTES = 2 << 20


def bound_metadata(file: Any, size: int) -> None:
    """Fix the size of a file's metadata cache.

    Left alone it grows to 32 MB of metadata, half a gigabyte of memory, when many consultations are read or written one
    after another, and does not get any faster by that: HDF5 keeps some 10 KB for an object header of a few hundred
    bytes.

    Args:
        file: an open h5py ``File``.
        size: bytes as they are in the file; unpacked they take fifteen to twenty times as much.
    """
    config = file.id.get_mdc_config()
    config.set_initial_size = True
    config.initial_size = config.min_size = config.max_size = size
    config.incr_mode = config.flash_incr_mode = config.decr_mode = 0
    file.id.set_mdc_config(config)
