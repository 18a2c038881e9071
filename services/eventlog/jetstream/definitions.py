"""What the streams and consumers are: bodies of ``STREAM.CREATE`` and ``CONSUMER.CREATE`` (DESIGN, section 5)."""

from __future__ import annotations

from typing import Any

from services.eventlog.jetstream import names
from services.eventlog.partitions import partition_name
from services.eventlog.settings import LogSettings

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
