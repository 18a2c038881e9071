"""One batch: from raw deliveries to committed rows. Runs in the HDF5 thread, knows nothing of the broker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from services.contract.errors import PoisonError
from services.contract.event import Event, decode
from services.corpus import EventStore, Record
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
class Written:
    """What a commit brought.

    Attributes:
        persisted: events that are new in the corpus.
        duplicates: events that it held already.
        consultations: consultations touched.
    """

    persisted: int
    duplicates: int
    consultations: int


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


def write(store: EventStore, events: Sequence[tuple[int, Event]], reached: int) -> Written:
    """Append the *events* that *store* does not hold, and commit them together with the sequence *reached*.

    Raises:
        CorpusError: nothing was committed; the store must be abandoned and opened again.
    """
    groups: dict[str, list[tuple[int, Event]]] = {}
    for numbered in events:
        groups.setdefault(numbered[1].consultation, []).append(numbered)
    persisted = touched = 0
    for consultation, candidates in groups.items():
        records = _new_records(candidates, store.event_ids(consultation))
        if records:
            store.append(consultation, records)
            persisted += len(records)
            touched += 1
    store.commit(reached)
    return Written(persisted, len(events) - persisted, touched)


def _new_records(candidates: Sequence[tuple[int, Event]], held: Set[bytes]) -> list[Record]:
    """Return the records of the events of one consultation that are neither *held* nor among those before them."""
    records = []
    seen: set[bytes] = set()
    for sequence, event in candidates:
        event_id = event.event_id.bytes
        if event_id not in held and event_id not in seen:
            seen.add(event_id)
            records.append(Record(sequence, event.received_ns, event_id, event.body))
    return records
