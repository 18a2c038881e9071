"""Which ids a consultation holds: exact, whatever is in memory and however large the consultation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fiq.corpus import Consultation, EventStore, KnownIds, Record, StoreOptions, hashes_of
from fiq.corpus import ids as ids_module
from tests.support.corpus import IDENTITY


def id_of(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()


def append(store: EventStore, name: str, numbers: range) -> None:
    store.append(name, [Record(number, 1, 2, id_of(number), b"{}") for number in numbers])
    store.commit(numbers[-1])


def held(store: EventStore, name: str, numbers: range) -> dict[int, int]:
    """Return the sequence of each of *numbers* that is held."""
    rows = store.held(name, [id_of(number) for number in numbers])
    return {number: rows[id_of(number)].sequence for number in numbers if id_of(number) in rows}


@pytest.mark.parametrize("limit", [4_000_000, 2000, 100])
def test_every_id_is_found_in_its_row_and_no_other(tmp_path: Path, limit: int) -> None:
    """Just appended, merged, read from the file, dropped for others, or searched since there are too many."""
    options = StoreOptions(ids=KnownIds(limit))
    numbers = range(1, 1501)
    with EventStore.create(tmp_path / "00.h5", IDENTITY, options) as store:
        for start in range(1, 1501, 50):
            assert not held(store, "c", range(start, start + 50))
            append(store, "c", range(start, start + 49))
            append(store, f"d{start}", range(start + 49, start + 50))
        assert {number: number for number in numbers if number % 50} == held(store, "c", range(1, 2000))
        assert {50: 50} == held(store, "d1", numbers)
    with EventStore.open(tmp_path / "00.h5", expected=IDENTITY, options=options) as store:
        assert {number: number for number in numbers if number % 50} == held(store, "c", range(1, 2000))
        append(store, "c", range(2001, 2011))
        assert list(range(2001, 2011)) == list(held(store, "c", range(2000, 2020)))
        assert {} == held(store, "never", numbers)


def test_ids_with_the_same_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash that is found is compared with the id in its row."""

    def poor(_: bytes, ids: object) -> object:
        data = ids if isinstance(ids, bytes) else ids.tobytes()  # type: ignore[attr-defined]
        return np.frombuffer(data, np.uint8)[::16].astype(np.uint64) % 3

    monkeypatch.setattr(ids_module, "hashes_of", poor)
    for limit in (10_000, 10):
        path = tmp_path / f"{limit}.h5"
        with EventStore.create(path, IDENTITY, StoreOptions(ids=KnownIds(limit))) as store:
            append(store, "c", range(1, 1001))
            assert {number: number for number in range(900, 1001)} == held(store, "c", range(900, 1100))


def test_a_new_consultation_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it holds was appended here."""

    def never(*_: object) -> None:
        raise AssertionError("the table was read")

    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        monkeypatch.setattr(Consultation, "ids", never)
        monkeypatch.setattr(Consultation, "row", never)
        for start in range(1, 2001, 10):
            assert {} == held(store, "c", range(start, start + 10))
            append(store, "c", range(start, start + 10))


def test_what_was_not_committed_is_forgotten(tmp_path: Path) -> None:
    """The next one who opens the file shares the ids in memory, and it does not hold them."""
    options = StoreOptions(ids=KnownIds())
    store = EventStore.create(tmp_path / "00.h5", IDENTITY, options)
    append(store, "c", range(1, 11))
    store.append("c", [Record(11, 1, 2, id_of(11), b"{}")])
    assert 11 in held(store, "c", range(11, 12))
    store.abandon()
    assert 0 == len(options.ids)
    with EventStore.open(tmp_path / "00.h5", expected=IDENTITY, options=options) as store:
        assert list(range(1, 11)) == list(held(store, "c", range(1, 12)))


def test_files_that_share_the_memory_keep_to_its_limit(tmp_path: Path) -> None:
    """Whichever file it is: the consultations unused for longest are dropped, and read again."""
    options = StoreOptions(ids=KnownIds(20_000))
    stores = [EventStore.create(tmp_path / f"{n}.h5", IDENTITY, options) for n in range(3)]
    for round_ in range(20):
        for store in stores:
            append(store, f"c{round_}", range(round_ * 1000 + 1, round_ * 1000 + 1001))
    assert len(options.ids) <= 20_000
    for store in stores:
        assert 1000 == len(held(store, "c0", range(1, 1501)))
        store.close()
    assert 0 == len(options.ids)


def test_all_hashes_of_a_consultation_are_given_up_to_a_number(tmp_path: Path) -> None:
    """A process that has them and the key knows which ids are not there."""
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        append(store, "c", range(1, 1001))
        with store.reading() as lookup:
            found = lookup.id_hashes("c", 1000)
            assert found is not None
            hashes = hashes_of(found.key, b"".join(id_of(number) for number in range(1, 1001)))
            assert np.sort(hashes).astype("<u8").tobytes() == found.hashes
            assert lookup.id_hashes("c", 999) is None
            none = lookup.id_hashes("never", 10)
            assert none is not None
            assert (found.key, b"") == (none.key, none.hashes)
    with EventStore.open(tmp_path / "00.h5", expected=IDENTITY) as store, store.reading() as lookup:
        assert lookup.id_hashes("c", 999) is None
        found = lookup.id_hashes("c", 1000)
        assert found is not None
        assert 8000 == len(found.hashes)
