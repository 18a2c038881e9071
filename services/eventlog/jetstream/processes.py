"""Which persister processes live just now: everybody's answer in the NATS service API (ADR-32).

The broker passes the question on to whoever is subscribed, so a process that is gone is missing at once; nobody keeps a
list that could be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nats.aio.client import Client

from services.eventlog.errors import LogRefusedError
from services.eventlog.jetstream.everybody import everybody
from services.eventlog.jetstream.names import PERSISTER_SERVICE
from services.eventlog.partitions import partition_name

_SUBJECT = f"$SRV.INFO.{PERSISTER_SERVICE}"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a partition is.

    Attributes:
        committed: stream sequence that its file has reached.
        waiting: events of the partition in the stream after that one.
    """

    committed: int
    waiting: int


@dataclass(frozen=True, slots=True)
class LiveProcess:
    """A persister process that answered.

    Attributes:
        store: the store that it writes.
        volume: UUID of its volume.
        partitions: numbers of those that it runs, whatever state they are in.
        committed: of those that it follows, the stream sequence that their file has reached, or had a moment ago.
    """

    store: str
    volume: str
    partitions: frozenset[int]
    committed: Mapping[int, int]


def show_committed(committed: Mapping[int, int]) -> str:
    """Return *committed* as it stands in the metadata of a process, such as ``00:38,03:41``."""
    return ",".join(f"{partition_name(partition)}:{sequence}" for partition, sequence in sorted(committed.items()))


def read_committed(text: str) -> dict[int, int]:
    """Undo :func:`show_committed`; what is malformed is left out."""
    pairs = (pair.partition(":") for pair in text.split(","))
    return {int(p): int(sequence) for p, _, sequence in pairs if p.isdecimal() and sequence.isdecimal()}


async def live_processes(nc: Client) -> list[LiveProcess]:
    """Return every persister process that answers.

    Raises:
        LogUnavailableError: the connection is gone.
        LogRefusedError: the user of the connection may not ask, so silence means nothing.
    """
    infos = await persister_infos(nc)
    refused = [text for text in getattr(nc, "violations", ()) if _SUBJECT.lower() in text.lower()]
    if refused and not infos:
        raise LogRefusedError(f"the NATS user may not ask which persisters live: {refused[0]}")
    return [
        LiveProcess(
            store=metadata.get("store", ""),
            volume=metadata.get("volume", ""),
            partitions=frozenset(int(name) for name in metadata.get("partitions", "").split(",") if name.isdigit()),
            committed=read_committed(metadata.get("committed", "")),
        )
        for metadata in infos
    ]


async def persister_infos(nc: Client) -> list[dict[str, str]]:
    """Return what every persister process says of itself, in whatever number they come.

    Raises:
        LogUnavailableError: the connection is gone.
    """
    return [answer.document.get("metadata") or {} for answer in await everybody(nc, _SUBJECT)]
