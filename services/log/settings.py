"""Settings of the log that every process of the pipeline shares."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from services.core.settings import boolean, integer, seconds, setting, size, text

#: file in a volume that says that all of its partition files were made, in a log without a broker
FORMED_FILE = "zeromq.json"
_STORE = re.compile(r"[a-z0-9]{1,32}", re.ASCII)


def formed_partitions(volume: Path) -> int | None:
    """Return the number of partitions that :data:`FORMED_FILE` in *volume* names; None without that file.

    Raises OSError, ValueError: it cannot be read.
    """
    try:
        found = json.loads((volume / FORMED_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("partitions"), int):
        raise ValueError("no number of partitions")
    return int(found["partitions"])


def _servers(value: str) -> tuple[str, ...]:
    urls = tuple(part.strip() for part in value.split(",") if part.strip())
    if len(urls) == 1 and urls[0].startswith(("zmq+ipc:///", "zmq+tcp://")):
        return urls
    if not urls or not all(map(_is_node, urls)):
        raise ValueError("nats://HOST:PORT, several of them with commas, zmq+ipc:///DIRECTORY or zmq+tcp://HOST:PORT")
    return urls


def _is_node(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"nats", "tls"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False


def _store(value: str) -> str:
    if _STORE.fullmatch(value) is None:
        raise ValueError("1 to 32 lower-case letters and digits")
    return value


def _replicas(value: str) -> int:
    if value not in {"1", "3", "5"}:
        raise ValueError("1, 3 or 5")
    return int(value)


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How to reach the log, and what it is made of when it does not exist yet."""

    servers: tuple[str, ...] = setting(
        "FI_LOG_URL",
        ("nats://127.0.0.1:4222",),
        parse=_servers,
        doc="NATS nodes, comma-separated, or a ZeroMQ address (docs/logs.md).",
    )
    ca_file: str = setting(
        "FI_NATS_CA_FILE",
        "",
        parse=text,
        doc="PEM file of the nodes' authority; allows only TLS 1.3.",
    )
    seed_file: str = setting(
        "FI_NATS_SEED_FILE",
        "",
        parse=text,
        doc="File with this process' nkey seed; read at each connect.",
    )
    zmq_key_file: str = setting(
        "FI_ZMQ_KEY_FILE",
        "",
        parse=text,
        doc="File with this process' CURVE keys (`*.key_secret`), for `zmq+tcp://`.",
    )
    zmq_server_key: str = setting(
        "FI_ZMQ_SERVER_KEY",
        "",
        parse=text,
        doc="Ingest: file with the persisters' public CURVE key (`*.key`).",
    )
    zmq_client_keys: str = setting(
        "FI_ZMQ_CLIENT_KEYS",
        "",
        parse=text,
        doc="Persister: folder of clients' public CURVE keys (`*.key`); read at start.",
    )
    partitions: int = setting(
        "FI_PARTITIONS",
        16,
        parse=integer(1, 100),
        doc="Partitions of the stream, fixed at its creation.",
    )
    replicas: int = setting(
        "FI_REPLICAS",
        3,
        parse=_replicas,
        doc="Copies of each event. Below 3 losing a node loses events.",
    )
    max_bytes: int = setting(
        "FI_STREAM_MAX_BYTES",
        4 * 2**30,
        parse=size(2**20, 2**50),
        doc="Stream's limit, reserved on each node; beyond: 503. May be raised.",
    )
    duplicate_window: float = setting(
        "FI_DUPLICATE_WINDOW",
        120.0,
        parse=seconds(0.1, 86400),
        doc="How long nodes remember ids; persisters drop later retries.",
    )
    dead_max_bytes: int = setting(
        "FI_DEAD_MAX_BYTES",
        256 * 2**20,
        parse=size(2**20, 2**50),
        doc="Limit of `fi-dead`; at it partitions with bad messages wait.",
    )
    store: str = setting(
        "FI_STORE",
        "main",
        parse=_store,
        doc="Name of the copy of the corpus.",
    )
    provision: bool = setting(
        "FI_PROVISION",
        True,
        parse=boolean,
        doc="Create or check the streams at start; 0 where only `fiq provision` may.",
    )
    startup_timeout: float = setting(
        "FI_STARTUP_TIMEOUT",
        60.0,
        parse=seconds(1, 3600),
        doc="Wait for the cluster at start; then exit code 1.",
    )

    @property
    def url(self) -> str:
        """FI_LOG_URL as one text."""
        return ",".join(self.servers)

    @property
    def uses_zeromq(self) -> bool:
        """Whether there is no broker."""
        return self.servers[0].startswith("zmq+")
