"""Settings of the HTTP edge."""

from __future__ import annotations

from dataclasses import dataclass

from services.contract.logs import level
from services.contract.settings import integer, nested, port, seconds, setting, size, text
from services.eventlog.settings import LogSettings


@dataclass(frozen=True, slots=True)
class Settings:
    """What one ingest process listens on, and how much it takes."""

    host: str = setting(
        "FI_HOST",
        "127.0.0.1",
        parse=text,
        doc="Address to listen on. Anything but loopback lets everybody who reaches it post events.",
    )
    port: int = setting("FI_PORT", 7001, parse=port, doc="TCP port to listen on; 0 takes a free one and logs it.")
    publish_deadline: float = setting(
        "FI_PUBLISH_DEADLINE",
        5.0,
        parse=seconds(0.1, 300),
        doc="How long one event may take to be stored, retries included, before its client gets 503.",
    )
    max_in_flight: int = setting(
        "FI_MAX_IN_FLIGHT",
        1000,
        parse=integer(1, 1_000_000),
        doc="Events that this process stores at the same time; a client beyond it gets 429.",
    )
    max_in_flight_bytes: int = setting(
        "FI_MAX_IN_FLIGHT_BYTES",
        256 * 2**20,
        parse=size(2**20, 2**40),
        doc="Bytes of bodies that are read or stored at the same time; beyond it 429. Less in a small container.",
    )
    max_event_bytes: int = setting(
        "FI_MAX_EVENT_BYTES",
        2**20,
        parse=size(1, 64 * 2**20),
        doc="Largest body; a larger one gets 413. The broker's max_payload must be at least 1 KiB larger.",
    )
    body_timeout: float = setting(
        "FI_BODY_TIMEOUT",
        30.0,
        parse=seconds(0.1, 3600),
        doc="How long a client may take to send a body before it gets 408.",
    )
    retry_after: float = setting(
        "FI_RETRY_AFTER",
        2.0,
        parse=seconds(1, 3600),
        doc="What Retry-After says in 409, 429 and 503, rounded up to whole seconds.",
    )
    max_followers: int = setting(
        "FI_MAX_FOLLOWERS",
        100,
        parse=integer(0, 100_000),
        doc="Clients that follow consultations through this process; one more gets 429. Each takes 2 MiB at most.",
    )
    follow_interval: float = setting(
        "FI_FOLLOW_INTERVAL",
        0.25,
        parse=seconds(0.01, 60),
        doc="How often the log is asked for news of each consultation that is followed: one cheap request.",
    )
    shutdown_grace: float = setting(
        "FI_SHUTDOWN_GRACE",
        10.0,
        parse=seconds(0, 3600),
        doc="How long requests in flight may take after SIGTERM; keep it above FI_PUBLISH_DEADLINE.",
    )
    log_level: str = setting(
        "FI_LOG_LEVEL",
        "info",
        parse=level,
        doc="debug, info, warning or error; info has one line for each request and each batch.",
    )
    log: LogSettings = nested(LogSettings)
