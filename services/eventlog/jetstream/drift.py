"""Compares a stream with what the definitions ask for: what to change, and what must not be changed.

Limits that are higher in the settings than on the stream are raised. ``max_bytes`` is lowered only where what is stored
leaves a quarter of itself, and at least 8 MiB, free below the new limit: the broker drops the oldest messages of a
stream that is above its new limit (nats-server #2589), and events may arrive between the check and the change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.eventlog.errors import ProvisionError
from services.eventlog.jetstream import names
from services.eventlog.jetstream.definitions import FORMAT

Config = Mapping[str, Any]

#: room that a lowered ``max_bytes`` must leave above what is stored, bytes
MINIMUM_HEADROOM_BYTES = 8 * 2**20

#: what cannot be changed on an existing stream, or not without losing its sense
_FIXED = ("subjects", "retention", "storage", "subject_transform")


def changes(wanted: Config, current: Config, stored_bytes: int) -> dict[str, Any]:
    """Return the fields of *current*, a stream's configuration, that must become those of *wanted*.

    Args:
        wanted: what the definitions say.
        current: what the broker says.
        stored_bytes: what the stream holds.

    Raises:
        ProvisionError: the stream is not ours, or a change would lose events or safety.
    """
    check_ownership(wanted, current)
    _check_limits(wanted, current, stored_bytes)
    metadata = {**own_metadata(current), **wanted["metadata"]}
    different = {key: value for key, value in wanted.items() if key != "metadata" and current.get(key) != value}
    if metadata != own_metadata(current):
        different["metadata"] = metadata
    return different


def check_ownership(wanted: Config, current: Config) -> None:
    """Check that *current* is a stream of ours with the wanted partitions.

    Raises:
        ProvisionError: it is another one; the message says what to do.
    """
    name, metadata = wanted["name"], current.get("metadata") or {}
    if names.FORMAT_KEY not in metadata:
        raise ProvisionError(
            f"stream {name} exists but was not made by fiq (no {names.FORMAT_KEY} in its metadata): "
            "use another NATS account, or move that stream away"
        )
    if metadata[names.FORMAT_KEY] != str(FORMAT):
        raise ProvisionError(
            f"stream {name} has format {metadata[names.FORMAT_KEY]}, this fiq knows {FORMAT}: run the matching version"
        )
    have, want = metadata.get(names.PARTITIONS_KEY), wanted["metadata"].get(names.PARTITIONS_KEY)
    if have != want:
        raise ProvisionError(
            f"stream {name} has {have} partitions, FI_PARTITIONS is {want}: the number is fixed when the stream is "
            f"created, because it decides where a consultation lives. Set FI_PARTITIONS={have}"
        )
    for key in _FIXED:
        if current.get(key) != wanted.get(key):
            raise ProvisionError(
                f"stream {name} was changed by hand: {key} is {current.get(key)!r}, fiq needs {wanted.get(key)!r}: "
                "change it back, or move that stream away"
            )


def _check_limits(wanted: Config, current: Config, stored_bytes: int) -> None:
    name, have, want = wanted["name"], current["num_replicas"], wanted["num_replicas"]
    if want < have:
        raise ProvisionError(
            f"stream {name} has {have} replicas, FI_REPLICAS is {want}: fewer copies would make stored events less "
            f"safe. Set FI_REPLICAS={have}, or lower it by hand with `nats stream edit`"
        )
    limit = wanted["max_bytes"]
    needed = stored_bytes + max(stored_bytes // 4, MINIMUM_HEADROOM_BYTES)
    if current["max_bytes"] > limit and needed > limit:
        raise ProvisionError(
            f"stream {name} holds {stored_bytes} bytes of {current['max_bytes']}: lowering its limit to {limit} could "
            f"drop events. Set {size_setting(name)} to {needed} or more, or wait until the stream is trimmed"
        )


def own_metadata(config: Config) -> dict[str, str]:
    """Return the metadata without what the server adds by itself."""
    return {key: value for key, value in (config.get("metadata") or {}).items() if not key.startswith("_nats.")}


def size_setting(stream: str) -> str:
    """Return the name of the setting that limits *stream*; for the small bucket that of what takes its room."""
    return "FI_DEAD_MAX_BYTES" if stream == names.DEAD_STREAM else "FI_STREAM_MAX_BYTES"
