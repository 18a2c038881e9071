"""Settings of the persister, and how they shrink to fit into the memory of a container."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from services.core.logs import level
from services.core.settings import boolean, integer, nested, number, port, seconds, setting, size, text
from services.core.watchdog import WATCHDOG_SECONDS
from services.log.settings import LogSettings

#: memory of a process with empty buffers: interpreter, libraries, HDF5's own caches, bytes
BASE_BYTES = 128 * 2**20
#: a message is held as it came and, while its batch is written, a second time
_COPIES = 2
_CONSULTATION_BYTES = 35 * 2**10
_KNOWN_ID_BYTES = 12
#: bounds that limit memory: variable, and the value below which a process makes hardly any progress
_BOUNDS = {
    "buffer_bytes": ("FI_BUFFER_BYTES", 2**21),
    "batch_bytes": ("FI_BATCH_BYTES", 2**20),
    "open_consultations": ("FI_OPEN_CONSULTATIONS", 64),
    "known_ids": ("FI_KNOWN_IDS", 100_000),
}


@dataclass(frozen=True, slots=True)
class PersisterSettings:
    """Where the corpus is, and how much a process takes at once and holds."""

    data_dir: Path = setting(
        "FI_DATA_DIR",
        Path("corpus"),
        parse=Path,
        doc="The volume: a local disk's directory, shared by the host's processes.",
    )
    allow_ephemeral: bool = setting(
        "FI_ALLOW_EPHEMERAL",
        False,
        parse=boolean,
        doc="Accept tmpfs, ramfs or overlay, whose files a restart loses.",
    )
    disk_reserve: float = setting(
        "FI_DISK_RESERVE",
        5.0,
        parse=number(0, 90),
        doc="Percent of the file system to leave free.",
    )
    volumes: int = setting(
        "FI_VOLUMES",
        1,
        parse=integer(1, 100),
        doc="Volumes of the store, the same everywhere, with equal shares of the partitions.",
    )
    host: str = setting(
        "FI_PERSISTER_HOST",
        "127.0.0.1",
        parse=text,
        doc="Address of /healthz, /readyz, /metrics (no token): loopback or inner network.",
    )
    port: int = setting(
        "FI_PERSISTER_PORT",
        7002,
        parse=port,
        doc="TCP port of FI_PERSISTER_HOST, plus i for worker i; 0: a free one.",
    )
    batch_events: int = setting(
        "FI_BATCH_EVENTS",
        8192,
        parse=integer(1, 65536),
        doc="Most events that a process commits per round.",
    )
    batch_bytes: int = setting(
        "FI_BATCH_BYTES",
        16 * 2**20,
        parse=size(2**16, 2**28),
        doc="The same in bytes, approximately.",
    )
    buffer_events: int = setting(
        "FI_BUFFER_EVENTS",
        32768,
        parse=integer(64, 2**20),
        doc="Most events that a process holds; partitions share a quarter, busy ones get the rest.",
    )
    buffer_bytes: int = setting(
        "FI_BUFFER_BYTES",
        64 * 2**20,
        parse=size(2**20, 2**32),
        doc="The same in bytes; each partition has room for two of the largest messages.",
    )
    open_consultations: int = setting(
        "FI_OPEN_CONSULTATIONS",
        1000,
        parse=integer(16, 10**6),
        doc="Consultations kept open in HDF5, 35 KB each; more is faster if many are active.",
    )
    known_ids: int = setting(
        "FI_KNOWN_IDS",
        4_000_000,
        parse=integer(1000, 10**8),
        doc="Event ids in memory to drop retries, 12 bytes each; others are reread.",
    )
    poison_streak: int = setting(
        "FI_POISON_STREAK",
        100,
        parse=integer(0, 10**6),
        doc="Bad messages in a row that stop a partition; a tenth of the last 1,000 does too. 0: no limit.",
    )
    retention: float = setting(
        "FI_RETENTION",
        86400.0,
        parse=seconds(0, 10 * 365 * 86400),
        doc="How long the stream, while below 70 % full, keeps committed events.",
    )
    watchdog: float = setting(
        "FI_WATCHDOG",
        WATCHDOG_SECONDS,
        parse=seconds(0, 86400),
        doc="A process that hangs so long ends itself; 0: never.",
    )
    log_level: str = setting(
        "FI_LOG_LEVEL",
        "info",
        parse=level,
        doc="debug, info (a line per request and batch), warning or error.",
    )
    log: LogSettings = nested(LogSettings)


def needed_bytes(settings: PersisterSettings) -> int:
    """Return about how much memory a process needs when every bound of *settings* is reached, in bytes."""
    return BASE_BYTES + _bounded_bytes(settings)


def fit_memory(settings: PersisterSettings, limit: int | None) -> PersisterSettings:
    """Return *settings* with bounds lowered by one factor so that they fit into *limit* bytes; None is no limit."""
    if limit is None or needed_bytes(settings) <= limit:
        return settings
    factor = max(0.0, (limit - BASE_BYTES) / _bounded_bytes(settings))
    lower = {}
    for name, (_, least) in _BOUNDS.items():
        value = getattr(settings, name)
        lower[name] = min(value, max(least, int(value * factor)))
    return dataclasses.replace(settings, **lower)


def bounds(settings: PersisterSettings) -> dict[str, str]:
    """Return the bounds of *settings* as environment variables for a worker."""
    return {variable: str(getattr(settings, name)) for name, (variable, _) in _BOUNDS.items()}


def _bounded_bytes(settings: PersisterSettings) -> int:
    messages = (settings.buffer_bytes + settings.batch_bytes) * _COPIES
    return messages + settings.open_consultations * _CONSULTATION_BYTES + settings.known_ids * _KNOWN_ID_BYTES
