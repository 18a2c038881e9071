"""A huge consultation among others: no duplicate is accepted, its table is read once, and memory stays small."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fiq.corpus import Consultation, EventStore, Record
from tests.support.corpus import IDENTITY
from tests.support.torture import LONG

EVENTS = 1_000_000 if LONG else 100_000
#: bytes of an id in memory, while all of them are being read
MOST_BYTES_EACH = 50
_BATCH = 50_000


def id_of(number: int) -> bytes:
    """Return the id of an event: always the same one, and random enough."""
    return (number * 0x9E3779B97F4A7C15_F39CC0605CEDC835 % 2**128).to_bytes(16, "big")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "00.h5"
    with EventStore.create(made, IDENTITY) as store:
        for start in range(1, EVENTS + 1, _BATCH):
            numbers = range(start, start + _BATCH)
            store.append("huge", [Record(number, 1, 2, id_of(number), b"{}") for number in numbers])
            store.commit(numbers[-1])
    return made


def test_its_ids_are_read_once_and_each_of_them_is_known(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds go on with other consultations in between, some of them with retries from all over the huge one."""
    reads = 0
    whole = Consultation.ids

    def counted(self: Consultation) -> Iterator[npt.NDArray[np.void]]:
        nonlocal reads
        reads += 1
        return whole(self)

    monkeypatch.setattr(Consultation, "ids", counted)
    rng = random.Random(7)
    with EventStore.open(path, expected=IDENTITY) as store:
        tracemalloc.start()
        assert not store.held("huge", [id_of(EVENTS + 1)])
        peak = tracemalloc.get_traced_memory()[1]
        last = EVENTS
        for round_ in range(50):
            for name in ("huge", *(f"c{number}" for number in range(10))):
                new = range(last + 1, last + 101)
                retries = [rng.randint(1, EVENTS) for _ in range(20)] if name == "huge" else []
                held = store.held(name, [id_of(number) for number in (*new, *retries)])
                assert {id_of(number): number for number in retries} == {i: row.sequence for i, row in held.items()}
                store.append(name, [Record(number, 1, 2, id_of(number), b"{}") for number in new])
                last = new[-1]
            store.commit(last)
            assert 20 == len(store.held("huge", [id_of(number) for number in range(last - 1099, last - 1079)])), round_
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert reads == 1
        assert peak < MOST_BYTES_EACH * EVENTS
        assert kept < 50 << 20
