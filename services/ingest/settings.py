"""Settings of the HTTP edge."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network

from aiohttp import web

from services.core.logs import level
from services.core.settings import boolean, integer, nested, number, seconds, setting, size, text
from services.core.settings import port as tcp_port
from services.core.watchdog import WATCHDOG_SECONDS
from services.log.settings import LogSettings


def _hosts(value: str) -> tuple[str, ...]:
    """Parse names and addresses as they are in ``Host``, without a port."""
    names = [name.strip().lower() for name in value.split(",")]
    names = [f"[{name}]" if name.count(":") > 1 and name[0] != "[" else name for name in names]
    if not all(re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", name) for name in names):
        raise ValueError("names or addresses without a port, such as fiq.example,192.168.1.5")
    return tuple(names)


def _networks(value: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Parse addresses and networks."""
    try:
        return tuple(ip_network(one.strip()) for one in value.split(","))
    except ValueError:
        raise ValueError("addresses or networks, such as 10.0.0.5,172.16.0.0/12") from None


@dataclass(frozen=True, slots=True)
class Settings:
    """Addresses and limits of one ingest process."""

    host: str = setting(
        "FI_HOST",
        "127.0.0.1",
        parse=text,
        doc="Listening address; beyond loopback needs FI_TOKEN_FILE or FI_ALLOW_ANONYMOUS.",
    )
    port: int = setting("FI_PORT", 7001, parse=tcp_port, doc="TCP port; 0: a free one, logged.")
    management_host: str = setting(
        "FI_MANAGEMENT_HOST",
        "127.0.0.1",
        parse=text,
        doc="Address of /healthz, /readyz, /metrics (no token): loopback or inner network.",
    )
    management_port: int = setting(
        "FI_MANAGEMENT_PORT",
        7101,
        parse=tcp_port,
        doc="TCP port of FI_MANAGEMENT_HOST; 0: a free one, logged.",
    )
    token_file: str = setting(
        "FI_TOKEN_FILE",
        "",
        parse=text,
        doc="File of `fiq token`, reread on change; empty: no token needed.",
    )
    allow_anonymous: bool = setting(
        "FI_ALLOW_ANONYMOUS",
        False,
        parse=boolean,
        doc="Listen beyond loopback without FI_TOKEN_FILE: every client may post and read.",
    )
    allowed_hosts: tuple[str, ...] = setting(
        "FI_ALLOWED_HOSTS",
        (),
        parse=_hosts,
        doc="Names in `Host` accepted without tokens, besides localhost and loopback addresses.",
    )
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = setting(
        "FI_TRUSTED_PROXIES",
        (),
        parse=_networks,
        doc="Proxies whose X-Forwarded-For is believed: 10.0.0.5,172.16.0.0/12.",
    )
    tls_cert: str = setting(
        "FI_TLS_CERT",
        "",
        parse=text,
        doc="PEM file: certificate and chain, reread on change; empty: plain HTTP.",
    )
    tls_key: str = setting(
        "FI_TLS_KEY",
        "",
        parse=text,
        doc="PEM file: key of FI_TLS_CERT, without password.",
    )
    rate: float = setting(
        "FI_RATE",
        0.0,
        parse=number(0, 1_000_000),
        doc="Requests and events per second of a token; beyond: 429. 0: no limit.",
    )
    rate_burst: int = setting(
        "FI_RATE_BURST",
        1000,
        parse=integer(1, 1_000_000),
        doc="Requests and events of a token at once. A larger batch needs it unused.",
    )
    new_consultations_rate: float = setting(
        "FI_NEW_CONSULTATIONS_RATE",
        20.0,
        parse=number(0, 1_000_000),
        doc="New consultations per second of a token; beyond: 429. 0: no limit.",
    )
    new_consultations_burst: int = setting(
        "FI_NEW_CONSULTATIONS_BURST",
        10_000,
        parse=integer(1, 10**9),
        doc="New consultations of a token at once, 4 KB each in HDF5.",
    )
    publish_deadline: float = setting(
        "FI_PUBLISH_DEADLINE",
        5.0,
        parse=seconds(0.1, 300),
        doc="Time to store an event, retries included; then 503.",
    )
    max_in_flight: int = setting(
        "FI_MAX_IN_FLIGHT",
        1000,
        parse=integer(1, 1_000_000),
        doc="Events that a process stores concurrently; beyond: 429.",
    )
    max_connections: int = setting(
        "FI_MAX_CONNECTIONS",
        2000,
        parse=integer(1, 1_000_000),
        doc="Connections of a process; at it the oldest idle one without valid token is closed, else 503.",
    )
    max_in_flight_bytes: int = setting(
        "FI_MAX_IN_FLIGHT_BYTES",
        256 * 2**20,
        parse=size(2**20, 2**40),
        doc="Bytes of bodies and long headers in memory; beyond: 429. Lower it in small containers.",
    )
    max_event_bytes: int = setting(
        "FI_MAX_EVENT_BYTES",
        2**20,
        parse=size(1, 64 * 2**20),
        doc="Largest event; beyond: 413. The broker's max_payload must be 1 KiB larger.",
    )
    max_batch_bytes: int = setting(
        "FI_MAX_BATCH_BYTES",
        8 * 2**20,
        parse=size(1, 256 * 2**20),
        doc="Largest batch; beyond: 413.",
    )
    max_batched_events: int = setting(
        "FI_MAX_BATCHED_EVENTS",
        8000,
        parse=integer(1000, 1_000_000),
        doc="Batches' events stored concurrently, besides FI_MAX_IN_FLIGHT; beyond: 429.",
    )
    key_lookup_wait: float = setting(
        "FI_KEY_LOOKUP_WAIT",
        0.1,
        parse=seconds(0, 10),
        doc="Time for asking the corpus about a key; 0: never.",
    )
    max_json_depth: int = setting(
        "FI_MAX_JSON_DEPTH",
        100,
        parse=integer(1, 1024),
        doc="Nesting levels of a body; beyond: 422.",
    )
    max_backlog: int = setting(
        "FI_MAX_BACKLOG",
        100_000,
        parse=integer(0, 10**12),
        doc="Events waiting for persisters; beyond: 503. Stalled partitions share half. 0: only the log's limit.",
    )
    max_window_events: int = setting(
        "FI_MAX_WINDOW_EVENTS",
        1_000_000,
        parse=integer(0, 10**12),
        doc="Events within FI_DUPLICATE_WINDOW; beyond: 503. Each: 0.5 KB of every node's memory. 0: no limit.",
    )
    header_timeout: float = setting(
        "FI_HEADER_TIMEOUT",
        10.0,
        parse=seconds(0.1, 3600),
        doc="Time to send headers, at first from the connection on; then 408.",
    )
    body_timeout: float = setting(
        "FI_BODY_TIMEOUT",
        30.0,
        parse=seconds(0.1, 3600),
        doc="Time to send a body; then 408.",
    )
    answer_timeout: float = setting(
        "FI_ANSWER_TIMEOUT",
        30.0,
        parse=seconds(0.1, 3600),
        doc="Time to read an answer (followers: 10 s); then disconnected.",
    )
    retry_after: float = setting(
        "FI_RETRY_AFTER",
        2.0,
        parse=seconds(1, 3600),
        doc="Retry-After of 409, 429 and 503, unless a measured rate gives a better value.",
    )
    max_followers: int = setting(
        "FI_MAX_FOLLOWERS",
        100,
        parse=integer(0, 100_000),
        doc="Followers of a process, up to 2 MiB each; beyond: 429.",
    )
    follow_interval: float = setting(
        "FI_FOLLOW_INTERVAL",
        0.25,
        parse=seconds(0.01, 60),
        doc="How often the log is asked for followers' events.",
    )
    ui_masked: bool = setting(
        "FI_UI_MASKED",
        True,
        parse=boolean,
        doc="The page shows bodies only on request; 0: at once.",
    )
    shutdown_grace: float = setting(
        "FI_SHUTDOWN_GRACE",
        10.0,
        parse=seconds(0, 3600),
        doc="Time for requests after SIGTERM; keep above FI_PUBLISH_DEADLINE.",
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


SETTINGS = web.AppKey("settings", Settings)
