"""docs/nats-cli.md names everything of ours that the NATS command line shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiq import event
from services.log.jetstream import stream
from services.log.jetstream.stream import bucket_config, cursor_config, dead_stream_config, stream_config
from services.log.settings import LogSettings
from services.persister import dead_letters

DOCUMENT = (Path(__file__).parents[2] / "docs" / "nats-cli.md").read_text(encoding="utf-8")
HEADERS = [
    value for module in (event, dead_letters) for name, value in vars(module).items() if name.endswith("_HEADER")
]
KEYS = [value for name, value in vars(stream).items() if name.endswith("_KEY")]
CONFIGURATIONS = [
    stream_config(LogSettings()),
    dead_stream_config(LogSettings()),
    cursor_config("main", 3, 1, 1),
    bucket_config(LogSettings()),
]


@pytest.mark.parametrize(
    "name",
    [
        *HEADERS,
        *KEYS,
        "epoch",
        "committed",
        "begins",
        "host",
        "pid",
        "volume",
        "store",
        "partitions",
        "address",
        "worker",
        "version",
        "verified",
        "conflicts",
    ],
)
def test_each_header_and_each_key_of_metadata_is_explained(name: str) -> None:
    """Of events, dead letters, streams, consumers and of the service API."""
    assert f"`{name}`" in DOCUMENT


@pytest.mark.parametrize(
    "text", [stream.STREAM, stream.DEAD_STREAM, stream.BUCKET, f"{stream.WORKERS_PREFIX}-<store>-<pp>", "fi-persister"]
)
def test_each_name_is_explained(text: str) -> None:
    """Streams, consumers, services."""
    assert text in DOCUMENT


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: str(config["name"]))
def test_each_stream_and_consumer_describes_itself(config: dict[str, object]) -> None:
    """In sentences that fit a terminal: printable ASCII, and less than the 4 KiB that nats-server takes."""
    description = str(config["description"])
    assert 40 < len(description) < 400
    assert description.isascii()
    assert description.isprintable()
    assert description.endswith(".")
