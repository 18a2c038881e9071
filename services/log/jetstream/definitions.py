"""What the streams and consumers are: bodies of ``STREAM.CREATE`` and ``CONSUMER.CREATE`` (DESIGN, section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.log.errors import ProvisionError
from services.log.jetstream import names
from services.log.partitions import partition_name
from services.log.settings import LogSettings

Config = Mapping[str, Any]

#: room that a lowered ``max_bytes`` must leave above what is stored, bytes
MINIMUM_HEADROOM_BYTES = 8 * 2**20

#: what cannot be changed on an existing stream, or not without losing its sense
_FIXED = ("subjects", "retention", "storage", "subject_transform")
#: version of these definitions, kept in the streams' metadata
FORMAT = 1

#: earlier values that the bucket keeps of each key: `nats kv history fi-partitions` shows them
BUCKET_HISTORY = 8
#: limit of the bucket; a hundred partitions of a store take a quarter of a megabyte, history included
BUCKET_MAX_BYTES = 16 << 20

#: an ack-all consumer counts everything behind its floor as pending; the runner bounds what it holds, not the broker
MAX_ACK_PENDING = 1_000_000
#: longer than any batch may take, seconds: the runner resets when in doubt, so the broker's timer must never redeliver
ACK_WAIT_SECONDS = 600
#: a cursor that nobody uses for this long goes, seconds: its owner deletes those before its own, this is the net
CURSOR_IDLE_SECONDS = 24 * 3600

_NANOSECONDS = 1_000_000_000


def stream_config(settings: LogSettings) -> dict[str, Any]:
    """Return the configuration of the stream of events."""
    return {
        **_common(settings),
        "name": names.STREAM,
        "description": (
            f"Events of medical consultations in {settings.partitions} partitions by consultation. "
            "Written by fiq ingest, read by fiq persisters, trimmed by them only. Do not purge or edit by hand."
        ),
        "subjects": [names.EVENTS_SUBJECT],
        "subject_transform": names.subject_transform(settings.partitions),
        "max_bytes": settings.max_bytes,
        "duplicate_window": _window(settings),
        "allow_atomic": True,
        "allow_direct": True,
        "metadata": {names.FORMAT_KEY: str(FORMAT), names.PARTITIONS_KEY: str(settings.partitions)},
    }


def dead_stream_config(settings: LogSettings) -> dict[str, Any]:
    """Return the configuration of the stream of dead letters.

    A dead letter carries a message id, so that the same one set aside twice within the window is kept once.
    """
    return {
        **_common(settings),
        "name": names.DEAD_STREAM,
        "description": (
            f"Messages of {names.STREAM} that no persister could take, each with its reason in the headers. "
            "Read and purge after an operator looked at them."
        ),
        "subjects": [names.DEAD_SUBJECT],
        "max_bytes": settings.dead_max_bytes,
        "duplicate_window": _window(settings),
        "allow_direct": True,
        "metadata": {names.FORMAT_KEY: str(FORMAT)},
    }


def bucket_config(settings: LogSettings) -> dict[str, Any]:
    """Return the configuration of the stream of the bucket ``fi-partitions``, as ``nats kv add`` makes it (ADR-8)."""
    return {
        **_common(settings),
        "name": names.BUCKET_STREAM,
        "description": "Where the partitions of each store live. Written by fiq persisters, and by fiq for operators.",
        "subjects": [f"{names.BUCKET_PREFIX}.>"],
        "max_bytes": BUCKET_MAX_BYTES,
        "max_msgs_per_subject": BUCKET_HISTORY,
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_direct": True,
        "metadata": {names.FORMAT_KEY: str(FORMAT)},
    }


def cursor_config(store: str, partition: int, generation: int, start: int) -> dict[str, Any]:
    """Return the configuration of a cursor through which *store* follows *partition* from sequence *start* on."""
    name = names.cursor_name(store, partition, generation)
    return {
        "name": name,
        "durable_name": name,
        "description": (
            f"Cursor of store {store}, partition {partition_name(partition)}: shows how much waits. The persister that "
            "has the partition makes another one when this one is gone."
        ),
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": start,
        "ack_policy": "all",
        "ack_wait": ACK_WAIT_SECONDS * _NANOSECONDS,
        "max_deliver": -1,
        "max_ack_pending": MAX_ACK_PENDING,
        "replay_policy": "instant",
        "filter_subject": names.filter_subject(partition),
        # the sink holds the position: a replicated cursor would write each delivery through raft for nothing
        "num_replicas": 1,
        "mem_storage": True,
        "inactive_threshold": CURSOR_IDLE_SECONDS * _NANOSECONDS,
    }


def _common(settings: LogSettings) -> dict[str, Any]:
    return {
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "num_replicas": settings.replicas,
        "max_age": 0,
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "max_msg_size": -1,
    }


def _window(settings: LogSettings) -> int:
    """Return the duplicate window in nanoseconds, as the broker counts it."""
    return round(settings.duplicate_window * _NANOSECONDS)


# -- Compares a stream with what the definitions ask for: what to change, and what must not be changed ---------------
#
# Limits that are higher in the settings than on the stream are raised. ``max_bytes`` is lowered only where what is
# stored leaves a quarter of itself, and at least 8 MiB, free below the new limit: the broker drops the oldest messages
# of a stream that is above its new limit (nats-server #2589), and events may arrive between the check and the change.


def changes(wanted: Config, current: Config, stored_bytes: int) -> dict[str, Any]:
    """Return the fields of *current*, a stream's configuration, that must become those of *wanted*.

    Args:
        wanted: what the definitions say.
        current: what the broker says.
        stored_bytes: what the stream holds.

    Raises ProvisionError: the stream is not ours, or a change would lose events or safety.
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

    Raises ProvisionError: it is another one; the message says what to do.
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
