"""Names on the broker: streams, subjects, consumers, metadata keys.

An event is published on ``fi.events.<consultation>``; the server's subject transform files it under
``fi.events.<partition>.<consultation>``. The names come from the users' own documents and are part of the product.
"""

from __future__ import annotations

import re
from enum import StrEnum

from services.log.partitions import partition_name
from services.log.protocol import EVENT_LOG

#: the stream of events
STREAM = EVENT_LOG
#: the stream of messages that were set aside
DEAD_STREAM = "fi-dead"

#: the key-value bucket that says where partitions live, and the stream that keeps it
BUCKET, BUCKET_STREAM = "fi-partitions", "KV_fi-partitions"
#: prefix of the subjects of its keys
BUCKET_PREFIX = f"$KV.{BUCKET}"

#: prefix of the events' subjects, as published and as stored
EVENTS_PREFIX = "fi.events"
#: what clients may publish; one token behind the prefix: the consultation
EVENTS_SUBJECT = f"{EVENTS_PREFIX}.*"
#: prefix of the dead letters' subjects
DEAD_PREFIX = "fi.dead"
#: subjects of the dead-letter stream
DEAD_SUBJECT = f"{DEAD_PREFIX}.>"

#: prefix of the subjects on which persisters answer questions about the corpus
CORPUS_PREFIX = "fi.corpus"

#: prefix of the subjects on which every node tells of itself, as on its monitoring port; `ops` may ask
NODES_PREFIX = "fi.nodes"
#: what it tells there: its state and configuration, and whether it is healthy
NODES_STATE, NODES_HEALTH = f"{NODES_PREFIX}.varz", f"{NODES_PREFIX}.healthz"

#: beginning of each persister consumer's name
WORKERS_PREFIX = "fi-workers"

#: metadata of the streams: version of these definitions
FORMAT_KEY = "fi_format"
#: metadata of the bucket: creation time of the stream of events, when that had events before the bucket was made
LATE_KEY = "fi_made_after_events"
#: metadata of the stream of events: number of partitions, fixed at creation
PARTITIONS_KEY = "fi_partitions"

#: name of the persisters in the NATS service API (ADR-32): what `nats micro ls` and `fiq status` show
PERSISTER_SERVICE = "fi-persister"


class Role(StrEnum):
    """What a process is to the broker: each role has a NATS user and an inbox prefix of its own."""

    INGEST = "ingest"
    PERSISTER = "persister"
    PROVISIONER = "provisioner"
    OPS = "ops"


_CURSOR_NAME = re.compile(rf"{WORKERS_PREFIX}-([a-z0-9]{{1,32}})-([0-9]{{2}})-([1-9][0-9]{{0,14}})", re.ASCII)


def inbox_prefix(role: Role) -> str:
    """Return what the subjects begin with on which answers to *role* arrive; its user may subscribe to no others."""
    return f"_INBOX_{role}"


def subject_of(consultation: str) -> str:
    """Return the subject on which an event of *consultation* is published."""
    return f"{EVENTS_PREFIX}.{consultation}"


def filter_subject(partition: int) -> str:
    """Return what the consumer of *partition* filters on: the stored form of its subjects."""
    return f"{EVENTS_PREFIX}.{partition}.*"


def dead_subject(partition: int) -> str:
    """Return the subject on which a message of *partition* is set aside."""
    return f"{DEAD_PREFIX}.{partition}"


def stored_subject(partition: int, consultation: str) -> str:
    """Return the subject under which the stream keeps the events of *consultation*."""
    return f"{EVENTS_PREFIX}.{partition}.{consultation}"


def corpus_subject(store: str, partition: int, kind: str) -> str:
    """Return the subject on which the persister that has *partition* of *store* answers questions of a *kind*."""
    return f"{CORPUS_PREFIX}.{store}.{partition}.{kind}"


def placement_key(store: str, partition: int) -> str:
    """Return the key of the bucket that says where *partition* of *store* lives."""
    return f"{store}.{partition_name(partition)}"


def key_subject(key: str) -> str:
    """Return the subject under which the bucket keeps *key*."""
    return f"{BUCKET_PREFIX}.{key}"


def stream_of(subject: str) -> str:
    """Return the stream that must acknowledge a message published on *subject*."""
    return DEAD_STREAM if subject.startswith(f"{DEAD_PREFIX}.") else STREAM


def cursor_name(store: str, partition: int, generation: int) -> str:
    """Return the name of a cursor: the consumer through which the owner of *partition* of *store* follows it.

    Each cursor that an owner makes gets a *generation* of its own, so that a predecessor that comes back with its node
    is another consumer.
    """
    return f"{WORKERS_PREFIX}-{store}-{partition_name(partition)}-{generation}"


def parse_cursor_name(name: str) -> tuple[str, int, int] | None:
    """Return store, partition and generation of a cursor, or None for a name of another form."""
    match = _CURSOR_NAME.fullmatch(name)
    return (match[1], int(match[2]), int(match[3])) if match else None


def subject_transform(partitions: int) -> dict[str, str]:
    """Return the transform by which the server files an event under its partition.

    ``partition(n,1)`` hashes the first wildcard's token; :func:`services.log.partitions.partition_of` agrees.
    """
    return {"src": EVENTS_SUBJECT, "dest": f"{EVENTS_PREFIX}.{{{{partition({partitions},1)}}}}.{{{{wildcard(1)}}}}"}
