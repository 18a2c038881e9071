"""The files have the layout that docs/corpus-format.md describes, as stock h5py shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from fiq.corpus import EventStore, Record, open_corpus
from fiq.corpus.format import EVENT_DTYPE, EVENT_HEAD, EVENT_ROW, EVENT_TAIL
from tests.support.corpus import IDENTITY, commit_range


@pytest.fixture
def filled(path: Path) -> Path:
    """A file with the sequences 1 to 200, its journal empty."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 201))
    return path


def test_the_packed_row_and_the_table_agree() -> None:
    """Rows are packed by struct and read by numpy."""
    chain = bytes(range(32))
    packed = EVENT_HEAD.pack(1, -2, 3, 4, 5, b"0123456789abcdef") + EVENT_TAIL.pack(chain, -6)
    values = (1, -2, 3, 4, 5, b"0123456789abcdef", chain, -6)
    assert values == np.frombuffer(packed, EVENT_DTYPE)[0].item() == EVENT_ROW.unpack(packed)


def test_stock_h5py_shows_the_documented_layout(filled: Path) -> None:
    """Names, types, chunks and attributes are those of docs/corpus-format.md."""
    with h5py.File(filled, "r") as file:
        consultation = file["consultations/c-0003"]
        assert sorted(consultation) == ["events", "payload"]
        events, payload = consultation["events"], consultation["payload"]
        assert (events.dtype, events.chunks, events.maxshape) == (EVENT_DTYPE, (16,), (None,))
        assert (np.uint8, (4096,), (None,)) == (payload.dtype, payload.chunks, payload.maxshape)
        assert {
            "format": "fiq-corpus",
            "format_version": 5,
            "store": "main",
            "volume": IDENTITY.volume,
            "epoch": 1,
            "partition": 0,
            "partitions": 16,
            "stream": "fi-events",
            "stream_created": IDENTITY.stream_created,
            "begins_at_sequence": 1,
            "committed_sequence": 200,
            "committed_message_id": b"",
            "committed_events": 200,
            "committed_conflicts": 0,
        } == {name: value for name, value in file.attrs.items() if name != "journal"}


def test_a_new_consultation_takes_about_four_kilobytes(tmp_path: Path) -> None:
    """A client can create as many as it likes; one that begins with more gets larger chunks, which are faster."""
    short, long = (
        Record(1, 0, 2, bytes(16), b"{%b}" % (b" " * 200)),
        Record(5000, 0, 2, bytes(16), b"{%b}" % (b" " * 2000)),
    )
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        store.append("first", [short])
        store.commit(1)
        store.checkpoint()
        before = (tmp_path / "00.h5").stat().st_size
        for number in range(2, 1002):
            store.append(f"c-{number}", [replace(short, sequence=number)])
        store.commit(1001)
        store.checkpoint()
        assert ((tmp_path / "00.h5").stat().st_size - before) / 1000 < 4200
        store.append("long", [long])
        store.commit(5000)
    with h5py.File(tmp_path / "00.h5", "r") as file:
        chunks = [file[f"consultations/{name}/payload"].chunks for name in ("first", "long")]
    assert [(1024,), (4096,)] == chunks


def test_a_payload_dataset_is_ndjson(filled: Path) -> None:
    """Line n of the payload is the body of row n."""
    with h5py.File(filled, "r") as file, open_corpus(filled) as corpus:
        lines = file["consultations/c-0003/payload"][:].tobytes().split(b"\n")
        assert [event.raw for event in corpus["c-0003"]] == lines[:-1]
        assert lines[-1] == b""
