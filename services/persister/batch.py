"""One batch: from raw deliveries to appended rows. Runs in the HDF5 thread, knows nothing of the broker."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from services.contract.errors import PoisonError
from services.contract.event import Event, decode
from services.corpus import EventStore, Record, StoredRow
from services.eventlog.protocol import Delivery


@dataclass(slots=True)
class Sorted:
    """A batch told apart.

    Attributes:
        events: what can be written, with its position in the log.
        poison: what never can, with the reason.
    """

    events: list[tuple[int, Event]] = field(default_factory=list)
    poison: list[tuple[Delivery, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reused:
    """An event whose id its consultation holds with another body.

    Attributes:
        sequence: its position in the log.
        event: the event, which is not written.
        first: position of the event that is kept.
    """

    sequence: int
    event: Event
    first: int


@dataclass(slots=True)
class Written:
    """What a batch brings.

    Attributes:
        persisted: events that are new in the corpus.
        duplicates: events that it held already, body and all.
        consultations: consultations touched.
        reused: events whose id it held with another body.
        created: consultations that were not in the corpus.
    """

    persisted: int = 0
    duplicates: int = 0
    consultations: int = 0
    reused: list[Reused] = field(default_factory=list)
    created: list[str] = field(default_factory=list)


def sort(batch: Sequence[Delivery], condemned: Mapping[int, str]) -> Sorted:
    """Decode *batch*, setting aside what is no event, and what stands in *condemned* with its reason."""
    result = Sorted()
    for delivery in batch:
        if delivery.sequence in condemned:
            result.poison.append((delivery, condemned[delivery.sequence]))
            continue
        try:
            event = decode(delivery.consultation, delivery.headers, delivery.body)
        except PoisonError as error:
            result.poison.append((delivery, str(error)))
        else:
            result.events.append((delivery.sequence, event))
    return result


def append(store: EventStore, events: Sequence[tuple[int, Event]]) -> Written:
    """Append the *events* that *store* does not hold; the commit is the caller's.

    Raises:
        CorpusError: the store must be abandoned and opened again.
    """
    groups: dict[str, list[tuple[int, Event]]] = {}
    for numbered in events:
        groups.setdefault(numbered[1].consultation, []).append(numbered)
    written = Written()
    for consultation, candidates in groups.items():
        held = store.held(consultation, {event.event_id.bytes for _, event in candidates})
        records, repeats = _told_apart(candidates, held)
        if repeats:
            written.reused += _reused(store, consultation, records, held, repeats)
        if records:
            if store.append(consultation, list(records.values())):
                written.created.append(consultation)
            written.persisted += len(records)
            written.consultations += 1
    written.reused.sort(key=lambda reused: reused.sequence)
    written.duplicates = len(events) - written.persisted - len(written.reused)
    return written


def _told_apart(
    candidates: Sequence[tuple[int, Event]], held: Container[bytes]
) -> tuple[dict[bytes, Record], list[tuple[int, Event]]]:
    """Return the records of the events that are neither *held* nor among those before them, by id, and the others."""
    records: dict[bytes, Record] = {}
    repeats = []
    for sequence, event in candidates:
        event_id = event.event_id.bytes
        if event_id in held or event_id in records:
            repeats.append((sequence, event))
        else:
            records[event_id] = Record(sequence, event.received_ns, event_id, event.body)
    return records, repeats


def _reused(
    store: EventStore,
    consultation: str,
    records: Mapping[bytes, Record],
    held: Mapping[bytes, StoredRow],
    repeats: Sequence[tuple[int, Event]],
) -> list[Reused]:
    """Return those of *repeats*, events of one consultation, whose body is not the first one's.

    What was delivered before has its own sequence in the corpus: after a crash all of a batch may be that. Of other
    copies only bodies of equal length are read.
    """
    reused = []
    with store.reading() as lookup:
        stored = lookup.consultation(consultation) if held else None
        for sequence, event in repeats:
            own = records.get(event.event_id.bytes)
            if own is not None:
                if own.body != event.body:
                    reused.append(Reused(sequence, event, own.sequence))
            elif (
                stored is not None
                and (row := held[event.event_id.bytes]).sequence != sequence
                and (row.length != len(event.body) or stored.body(row) != event.body)
            ):
                reused.append(Reused(sequence, event, row.sequence))
    return reused
