"""The chain: what each row's hash covers, and that a writer goes on where the last one was."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import pytest

from fiq.corpus import CorpusFormatError, EventStore, Record, StoreOptions, open_corpus, verify_corpus
from fiq.corpus.format import chain_next, chain_start
from tests.support.corpus import IDENTITY, commit_range, record


def test_the_first_rows_are_chained_as_documented(path: Path) -> None:
    """The bytes are spelled out here once more, by hand."""
    # given
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c", [Record(7, -1, 2, b"i" * 16, b"{}"), Record(9, 2, 2, b"j" * 16, b"[1]")])
        store.commit(9)
    # when
    with open_corpus(path) as corpus:
        chains = corpus["c"].table()["chain"].tolist()
    # then
    start = sha256(b"fiq-chain-1\0fi-events\x002026-11-23T10:00:00.000000000Z\x000\x0016\0c").digest()
    head = (7).to_bytes(8, "little") + b"\xff" * 8 + bytes(8) + b"\2\0\0\0" + bytes(4) + b"i" * 16
    first = sha256(start + head + b"{}").digest()
    head = (9).to_bytes(8, "little") + b"\2" + bytes(7) + b"\3" + bytes(7) + b"\3\0\0\0" + bytes(4) + b"j" * 16
    assert [first, sha256(first + head + b"[1]").digest()] == chains


def test_appends_reopens_and_evictions_go_on_with_the_chain(path: Path) -> None:
    """Whether the row before is in memory or in the file, a full chunk's last or not, makes no difference."""
    options = StoreOptions(open_consultations=2)
    for start in range(1, 400, 57):
        with EventStore.open(path, expected=IDENTITY, options=options) as store:
            commit_range(store, range(start, start + 19), consultations=3)
            commit_range(store, range(start + 19, start + 57), consultations=3)
    with open_corpus(path) as corpus:
        for consultation in corpus.values():
            chain = chain_start(IDENTITY, consultation.id)
            for row, event in zip(consultation.table(), consultation, strict=True):
                chain = chain_next(chain, row.tobytes()[:48], event.raw)
                assert chain == row["chain"].tobytes()


def test_the_chain_is_bound_to_consultation_partition_and_stream_but_not_to_a_copy() -> None:
    """Copies of one consultation in two stores, or on two volumes, are to be compared by their chains."""
    start = chain_start(IDENTITY, "c")
    for other in (
        replace(IDENTITY, partition=1),
        replace(IDENTITY, partitions=8),
        replace(IDENTITY, stream="other"),
        replace(IDENTITY, stream_created="2026-11-24T10:00:00.000000000Z"),
    ):
        assert start != chain_start(other, "c")
    assert start != chain_start(IDENTITY, "d")
    assert start == chain_start(replace(IDENTITY, store="copy", volume="v", epoch=9), "c")


def test_two_stores_that_wrote_at_other_times_have_the_same_chain(tmp_path: Path) -> None:
    """The time when a row was written is kept with it, and is none of the event."""
    tables = []
    for store_name, later in (("main", 0), ("copy", 10**9)):
        identity = replace(IDENTITY, store=store_name)
        path = tmp_path / f"{store_name}.h5"
        with EventStore.create(path, identity) as store:
            store.append("c", [replace(record(n), written_ns=record(n).written_ns + later) for n in range(1, 40)])
            store.commit(39)
        assert verify_corpus(path).clean
        with h5py.File(path, "r") as file:
            tables.append(file["consultations/c/events"][:])
    first, second = tables
    assert [record(n).written_ns for n in range(1, 40)] == first["written_ns"].tolist()
    assert [10**9] * 39 == (second["written_ns"] - first["written_ns"]).tolist()
    assert first["chain"].tobytes() == second["chain"].tobytes()


def test_the_number_of_events_is_committed_with_them(path: Path) -> None:
    """Counted are all events of the file, whichever session wrote them; what was not committed does not count."""
    for start in (1, 31, 61):
        with EventStore.open(path, expected=IDENTITY) as store:
            commit_range(store, range(start, start + 30))
            store.append("c-0001", [Record(start + 30, 0, 2, bytes(16), b"{}")])
    with h5py.File(path, "r") as file:
        assert 90 == file.attrs["committed_events"]


@pytest.mark.parametrize(("version", "by"), [(4, "an earlier"), (6, "a later")])
def test_a_file_of_another_format_version_is_refused(path: Path, version: int, by: str) -> None:
    """By readers and writers; the message says which version to use."""
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = np.uint32(version)
    with pytest.raises(CorpusFormatError, match=f"format_version {version}, written by {by} version of fiq"):
        EventStore.open(path, expected=None)
    with open_corpus(path) as corpus, pytest.raises(CorpusFormatError, match="this one reads 5 only"):
        list(corpus)
