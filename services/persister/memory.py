"""Bounds that follow the memory of the container: what is held in memory shrinks where the limit is small."""

from __future__ import annotations

import dataclasses

from services.persister.settings import PersisterSettings

#: a process with empty buffers: the interpreter, its libraries, HDF5's own caches, bytes
BASE_BYTES = 128 * 2**20
#: a message is held as it came and, while its batch is written, once more
_COPIES = 2
_CONSULTATION_BYTES = 35 * 2**10
_KNOWN_ID_BYTES = 12
#: below these a process makes hardly any progress
_LEAST = {"buffer_bytes": 2**21, "batch_bytes": 2**20, "open_consultations": 64, "known_ids": 100_000}
_VARIABLES = {
    "buffer_bytes": "FI_BUFFER_BYTES",
    "batch_bytes": "FI_BATCH_BYTES",
    "open_consultations": "FI_OPEN_CONSULTATIONS",
    "known_ids": "FI_KNOWN_IDS",
}


def needed_bytes(settings: PersisterSettings) -> int:
    """Return what a process takes at most when every bound of *settings* is reached, about, in bytes."""
    return BASE_BYTES + _flexible(settings)


def within(settings: PersisterSettings, limit: int | None) -> PersisterSettings:
    """Return *settings* with bounds that fit into *limit* bytes, all made smaller by one factor; None is no limit."""
    if limit is None or needed_bytes(settings) <= limit:
        return settings
    factor = max(0.0, (limit - BASE_BYTES) / _flexible(settings))
    smaller = {
        name: min(getattr(settings, name), max(least, int(getattr(settings, name) * factor)))
        for name, least in _LEAST.items()
    }
    return dataclasses.replace(settings, **smaller)


def variables(settings: PersisterSettings) -> dict[str, str]:
    """Return the bounds as the environment of a worker has them."""
    return {variable: str(getattr(settings, name)) for name, variable in _VARIABLES.items()}


def _flexible(settings: PersisterSettings) -> int:
    messages = (settings.buffer_bytes + settings.batch_bytes) * _COPIES
    return messages + settings.open_consultations * _CONSULTATION_BYTES + settings.known_ids * _KNOWN_ID_BYTES
