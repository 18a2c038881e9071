"""Settings of the persister."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.core.logs import level
from services.core.settings import integer, nested, port, seconds, setting, size, text
from services.log.settings import LogSettings


@dataclass(frozen=True, slots=True)
class PersisterSettings:
    """Where the corpus lives, how much is taken at once, how long things may take."""

    data_dir: Path = setting(
        "FI_DATA_DIR",
        Path("corpus"),
        parse=Path,
        doc="The volume: one directory on a local disk with partition files, shared by the processes of this host.",
    )
    volumes: int = setting(
        "FI_VOLUMES",
        1,
        parse=integer(1, 100),
        doc="Volumes that the store is meant to have, the same everywhere; each takes an equal share of partitions.",
    )
    host: str = setting(
        "FI_PERSISTER_HOST",
        "127.0.0.1",
        parse=text,
        doc="Address of /healthz, /readyz and /metrics, which have no authentication: loopback or an inner network.",
    )
    port: int = setting(
        "FI_PERSISTER_PORT",
        7002,
        parse=port,
        doc="TCP port of /healthz, /readyz and /metrics; worker i of `--workers N` takes port + i. 0 takes a free one.",
    )
    batch_events: int = setting(
        "FI_BATCH_EVENTS",
        8192,
        parse=integer(1, 65536),
        doc="Events of all partitions of a process that one round commits, at most.",
    )
    batch_bytes: int = setting(
        "FI_BATCH_BYTES",
        16 * 2**20,
        parse=size(2**16, 2**28),
        doc="Bytes of the events of one round, about, at most.",
    )
    buffer_events: int = setting(
        "FI_BUFFER_EVENTS",
        32768,
        parse=integer(64, 2**20),
        doc="Events that a process fetches and holds in all; a quarter is divided, the rest goes to busy partitions.",
    )
    buffer_bytes: int = setting(
        "FI_BUFFER_BYTES",
        64 * 2**20,
        parse=size(2**20, 2**32),
        doc="The same in bytes; each partition has room for two of the largest messages at least.",
    )
    open_consultations: int = setting(
        "FI_OPEN_CONSULTATIONS",
        1000,
        parse=integer(16, 10**6),
        doc="Consultations that a process keeps open in HDF5, about 35 KB each; more is faster when many are active.",
    )
    known_ids: int = setting(
        "FI_KNOWN_IDS",
        4_000_000,
        parse=integer(1000, 10**8),
        doc="Event ids that a process keeps in memory to drop retries, 12 bytes each; others are read again.",
    )
    poison_streak: int = setting(
        "FI_POISON_STREAK",
        100,
        parse=integer(0, 10**6),
        doc="Bad messages in a row that stop a partition, as does a tenth of the last 1,000. 0 sets all of them aside.",
    )
    retention: float = setting(
        "FI_RETENTION",
        86400.0,
        parse=seconds(0, 10 * 365 * 86400),
        doc="How long committed events stay readable in the stream while it is less than 70 % full.",
    )
    log_level: str = setting(
        "FI_LOG_LEVEL",
        "info",
        parse=level,
        doc="debug, info, warning or error; info has one line for each request and each batch.",
    )
    log: LogSettings = nested(LogSettings)
