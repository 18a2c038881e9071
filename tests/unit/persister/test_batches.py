"""One batch: telling events from poison, dropping what the corpus holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from fiq.corpus import Consultation, EventStore
from services.log.protocol import Delivery, Fate, Outcome
from services.persister.dead_letters import DeadLetters, PoisonLimit, Quarantine
from services.persister.metrics import PersisterMetrics
from services.persister.rounds import Conflict, OpenPartition, PartitionBatch, PartitionFile
from tests.support.persister import (
    IDENTITY,
    LOG,
    DeadStream,
    ScriptedFollower,
    Stream,
    conflicts,
    contents,
    delivery,
    event,
    poison,
    reusing,
)

GOOD = event(1).headers()
#: when all rows were written
WRITTEN_NS = 1_700_000_000_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    made = EventStore.create(tmp_path / "00.h5", IDENTITY)
    yield made
    made.abandon()


def made(store: EventStore, *deliveries: Delivery, known: Mapping[int, str] | None = None) -> PartitionBatch:
    """Return a batch of *deliveries* for the partition whose file is open in *store*."""
    metrics = PersisterMetrics().of(0)
    log = structlog.get_logger()
    quarantine = Quarantine(DeadLetters(DeadStream(), 0, LOG), PoisonLimit(), metrics, log)
    quarantine.known |= known or {}
    follower = ScriptedFollower(Stream())
    one = OpenPartition("00", PartitionFile(store), follower, quarantine, metrics, log, fail=lambda _: None)
    return PartitionBatch(one, list(deliveries))


def written(store: EventStore, *deliveries: Delivery) -> PartitionBatch:
    """Take the steps of a round in the HDF5 thread."""
    result = made(store, *deliveries)
    result.decode()
    result.append(WRITTEN_NS)
    result.commit()
    return result


def reused(found: PartitionBatch) -> list[tuple[int, int]]:
    """Return the sequences of the conflicts, and those of the events that hold their ids."""
    return [(one.sequence, one.first) for one in found.conflicts]


def counts(found: PartitionBatch) -> tuple[int, int, int]:
    """Return what is new, what was held, and the consultations touched."""
    return found.persisted, found.duplicates, found.consultations


async def test_a_retry_in_the_same_batch_is_dropped(store: EventStore) -> None:
    """The first one stays: its position is the one that the client got."""
    assert (1, 1, 1) == counts(written(store, delivery(1), delivery(2, of=1)))
    assert {"c1": [1]} == contents(store.path)
    assert store.committed == 2


async def test_a_retry_in_a_later_batch_is_dropped(store: EventStore) -> None:
    """However long after the broker's window."""
    written(store, delivery(1))
    assert (1, 1, 1) == counts(written(store, delivery(5, of=1), delivery(6)))
    assert {"c1": [1, 6]} == contents(store.path)


async def test_a_retry_after_the_file_was_opened_again_is_dropped(store: EventStore) -> None:
    """The ids are read from the file."""
    written(store, delivery(1), delivery(2, consultation="c2"))
    store.close()
    again = EventStore.open(store.path, expected=IDENTITY)
    assert (0, 2, 0) == counts(written(again, delivery(3, of=1), delivery(4, of=2, consultation="c2")))
    assert again.committed == 4
    again.close()


async def test_the_same_id_in_another_consultation_is_another_event(store: EventStore) -> None:
    """Ids are unique within a consultation only."""
    assert (2, 0, 2) == counts(written(store, delivery(1), delivery(2, of=1, consultation="c2")))


async def test_the_first_of_two_bodies_under_one_id_is_kept_and_the_second_is_a_conflict(store: EventStore) -> None:
    """In one batch, in a later one, and of the same length; a retry of the first is a plain duplicate in between."""
    same_length = event(1).body.replace(b"1", b"2")
    found = written(store, delivery(1), reusing(2, of=1), delivery(3, of=1), reusing(4, of=1, body=same_length))
    assert ((1, 1, 1), [(2, 1), (4, 1)]) == (counts(found), reused(found))
    assert Conflict(2, replace(event(1), body=reusing(2, of=1).body), 1) == found.conflicts[0]
    found = written(store, reusing(5, of=1, body=same_length), delivery(6, of=1), reusing(7, of=1), delivery(8))
    assert ((1, 3, 1), []) == (counts(found), reused(found))
    assert {"c1": [1, 8]} == contents(store.path)


async def test_conflicts_of_several_consultations_are_kept_in_their_own_groups(store: EventStore) -> None:
    """Whatever the order in which they come."""
    written(store, delivery(1), delivery(2, consultation="c2"), delivery(3))
    batch = [reusing(4, of=3), reusing(5, of=2, consultation="c2"), reusing(6, of=1), delivery(7, consultation="c3")]
    found = written(store, *batch)
    assert [(4, 3), (5, 2), (6, 1)] == sorted(reused(found))
    kept = {name: [sequence for sequence, _ in held] for name, held in conflicts(store.path).items()}
    assert {"c1": [4, 6], "c2": [5]} == kept


async def test_a_batch_that_is_delivered_again_is_not_compared(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event is stored under its own sequence: no body is read."""
    batch = [delivery(sequence) for sequence in range(1, 101)]
    written(store, *batch)

    def never(*_: object) -> None:
        raise AssertionError("a body was read")

    monkeypatch.setattr(Consultation, "body", never)
    again = made(store, *batch)
    again.decode()
    again.append(WRITTEN_NS)
    assert (0, 100, 0) == counts(again)


async def test_a_batch_of_retries_only_moves_the_position(store: EventStore) -> None:
    """Or it would be delivered again for ever."""
    written(store, delivery(1))
    assert (0, 1, 0) == counts(written(store, delivery(9, of=1)))
    assert store.committed == 9


@pytest.mark.parametrize(
    ("consultation", "headers", "body", "reason"),
    [
        ("c1", None, b"{}", "no Nats-Msg-Id"),
        ("c1", {}, b"{}", "no Nats-Msg-Id"),
        ("c1", {"Fi-Received-Ns": "1"}, b"{}", "no Nats-Msg-Id"),
        ("c2", GOOD, event(1).body, "subject's consultation"),
        ("c1", GOOD | {"Nats-Msg-Id": "c1/no-uuid"}, event(1).body, "lower-case UUID"),
        ("c1", GOOD | {"Nats-Msg-Id": "c1"}, event(1).body, "lower-case UUID"),
        ("a b", GOOD, event(1).body, "consultation id is"),
        ("�", GOOD, event(1).body, "consultation id is"),
        ("c1", GOOD, b"{", "not valid JSON"),
        ("c1", GOOD, b"\xff", "not valid JSON"),
        ("c1", GOOD, b"[]", "JSON object"),
        ("c1", GOOD, b"{}", "event_type is required"),
        ("c1", GOOD, b'{"event_type":""}', "event_type is required"),
        ("c1", GOOD, b'{"event_type":\n"T"}', "line breaks"),
        ("c1", GOOD, b'{"event_type":"T"}\r', "line breaks"),
        ("c1", GOOD | {"Fi-Received-Ns": ""}, event(1).body, "Fi-Received-Ns"),
        ("c1", GOOD | {"Fi-Received-Ns": "-1"}, event(1).body, "Fi-Received-Ns"),
        ("c1", GOOD | {"Fi-Received-Ns": "9" * 5000}, event(1).body, "Fi-Received-Ns"),
        ("c1", GOOD | {"Fi-Received-Ns": str(2**63)}, event(1).body, "Fi-Received-Ns"),
        ("c1", GOOD | {"Fi-Received-Ns": "²"}, event(1).body, "Fi-Received-Ns"),
    ],
)
async def test_what_ingest_would_not_have_written_is_poison(
    store: EventStore, consultation: str, headers: dict[str, str] | None, body: bytes, reason: str
) -> None:
    """The reason says which rule it breaks, and quotes nothing of the body."""
    bad = Delivery(2, consultation, headers, body, "token")
    batch = made(store, delivery(1), bad, delivery(3))
    batch.decode()
    assert [1, 3] == [sequence for sequence, _ in batch.events]
    ((found, why),) = batch.poison
    assert bad is found
    assert reason in why


async def test_the_largest_time_fits(store: EventStore) -> None:
    """It is a signed 64-bit number in the file."""
    latest = Delivery(1, "c1", GOOD | {"Fi-Received-Ns": str(2**63 - 1)}, event(1).body, "token")
    assert (1, 0, 1) == counts(written(store, latest))


async def test_a_message_that_failed_twice_on_its_own_is_poison(store: EventStore) -> None:
    """Although it can be decoded."""
    batch = made(store, delivery(1), delivery(2), known={2: "could not be written: ValueError"})
    batch.decode()
    assert [1] == [sequence for sequence, _ in batch.events]
    assert [(2, "could not be written: ValueError")] == [(bad.sequence, why) for bad, why in batch.poison]


async def test_the_log_gets_the_outcome_of_each_delivery_that_is_not_a_new_event(store: EventStore) -> None:
    """A log without a broker answers its writers only then: with the sequence of the event that holds the id."""
    written(store, delivery(1), reusing(2, of=1))
    found = written(store, delivery(3), delivery(4, of=3), delivery(5, of=1), reusing(6, of=1), reusing(7, of=3))
    assert {
        4: Outcome(Fate.DUPLICATE, 3),
        5: Outcome(Fate.DUPLICATE, 1),
        6: Outcome(Fate.CONFLICT, 1),  # kept already
        7: Outcome(Fate.CONFLICT, 3),
    } == found.outcomes
    again = made(store, delivery(3), poison(8))
    again.decode()
    again.append(WRITTEN_NS)
    assert {8: Outcome(Fate.POISON)} == again.outcomes  # 3 was committed before a crash: it is its own event


async def test_a_conflict_is_not_kept_when_its_writer_waits_for_the_outcome(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client gets a 422, so nothing was accepted that could be lost."""
    monkeypatch.setattr(ScriptedFollower, "writers_wait", True)
    found = written(store, delivery(1), reusing(2, of=1))
    assert ({2: Outcome(Fate.CONFLICT, 1)}, []) == (found.outcomes, found.conflicts)
    assert {} == conflicts(store.path)
