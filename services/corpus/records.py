"""What goes into a partition file: events, and the identity that the file states of itself."""

from __future__ import annotations

from dataclasses import dataclass, fields

from services.corpus.errors import IdentityMismatchError

#: bytes of an event id
EVENT_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Record:
    """One event as it is appended.

    Attributes:
        sequence: its sequence in the stream; rises within a consultation.
        received_ns: when it was accepted, nanoseconds since the Unix epoch.
        event_id: 16 bytes, unique within the consultation.
        body: one JSON text in UTF-8 without line breaks.
    """

    sequence: int
    received_ns: int
    event_id: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Identity:
    """What a partition file says of itself; every field is compared when it is opened.

    Attributes:
        store: name of the full copy of the corpus that the file is part of.
        volume: UUID of the data directory that the file belongs to.
        epoch: how often the partition has been placed; rises with each placement.
        partition: number of the partition, from 0.
        partitions: number of partitions of the stream, fixed at its creation.
        stream: name of the stream that the sequences count.
        stream_created: creation time of that stream as the broker states it: a re-created stream counts from 1 again.
    """

    store: str
    volume: str
    epoch: int
    partition: int
    partitions: int
    stream: str
    stream_created: str


_REMEDIES = {
    "store": "point FI_STORE or FI_DATA_DIR at the store that the file belongs to",
    "volume": "put the file back into the data directory of its own volume; one copied elsewhere must not be written",
    "epoch": (
        "the partition was placed anew since (by `fiq give-up` or `fiq restore`), so this is a stale copy: stop the "
        "persisters of this directory and keep it for reading; docs/operations.md, `A lost disk comes back`"
    ),
    "partition": "the file was renamed or copied over another one; put the right file back",
    "partitions": "use the partition count that the stream was created with; it cannot change",
    "stream": "point the service at the stream that the file was written from, or use another data directory",
    "stream_created": (
        "the stream was deleted and created anew, so its sequences no longer match the file; "
        "use a new data directory for the new stream and keep this one as it is"
    ),
}


def check_identity(name: str, expected: Identity, found: Identity) -> None:
    """Compare the identity that a file states with the one that is expected of it.

    Args:
        name: the file's name, for the message.

    Raises:
        IdentityMismatchError: a field differs; the message names it, both values, and what to do.
    """
    for field in fields(Identity):
        wanted, stated = getattr(expected, field.name), getattr(found, field.name)
        if wanted != stated:
            raise IdentityMismatchError(
                f"{name}: {field.name} is {stated!r} in the file but {wanted!r} is expected: {_REMEDIES[field.name]}",
                field=field.name,
                expected=wanted,
                found=stated,
            )
