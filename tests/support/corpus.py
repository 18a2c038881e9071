"""Helpers of the corpus's tests: events to append, and what stock h5py finds in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import h5py

from fiq.corpus import Corpus, EventStore, Identity, Record, open_corpus

IDENTITY = Identity(
    store="main",
    volume="0b9f6a52-7d83-4c1e-9d6a-52f0c7a9b101",
    epoch=1,
    partition=0,
    partitions=16,
    stream="fi-events",
    stream_created="2026-11-23T10:00:00.000000000Z",
)

#: consultation -> its (sequence, time when it was written, id, body), in the order of the file
Contents = dict[str, list[tuple[int, int, bytes, bytes]]]
#: when the event of sequence 0 would have been received, nanoseconds since the Unix epoch
_RECEIVED_NS = 1_700_000_000_000_000_000


@lru_cache(50_000)
def record(sequence: int) -> Record:
    """Make the event of a sequence: always the same one, so that any file can be checked without its history."""
    padding = "p" * (sequence * 37 % 700)
    body = f'{{"event_type":"MESSAGE_RECEIVED","payload":{{"n":{sequence},"text":"{padding}"}}}}'
    received, event_id = _RECEIVED_NS + sequence, sequence.to_bytes(16, "little")
    return Record(sequence, received, received + 50_000_000, event_id, body.encode())


def consultation_of(sequence: int, consultations: int) -> str:
    """Return the consultation of a sequence: always the same one."""
    return f"c-{sequence * 2_654_435_761 % 2**32 % consultations:04d}"


def append_range(store: EventStore, sequences: Iterable[int], consultations: int = 7) -> None:
    """Append the events of *sequences*, without a commit."""
    groups: dict[str, list[Record]] = {}
    for sequence in sequences:
        groups.setdefault(consultation_of(sequence, consultations), []).append(record(sequence))
    for consultation, records in groups.items():
        store.append(consultation, records)


def commit_range(store: EventStore, sequences: range, consultations: int = 7) -> None:
    """Append the events of *sequences* and commit the last one."""
    append_range(store, sequences, consultations)
    store.commit(sequences[-1])


def expected(last: int, consultations: int = 7) -> Contents:
    """Return what a file holds once the sequences 1 to *last* are committed."""
    contents: Contents = {}
    for sequence in range(1, last + 1):
        event = record(sequence)
        consultation = consultation_of(sequence, consultations)
        contents.setdefault(consultation, []).append((sequence, event.written_ns, event.event_id, event.body))
    return contents


def stock_contents(path: Path) -> tuple[int, Contents]:
    """Read a partition file with stock h5py: the committed sequence, and every event."""
    with h5py.File(path, "r") as file:
        return int(file.attrs["committed_sequence"]), dict(_consultations(file["consultations"]))


def contents(corpus: Corpus) -> Contents:
    """Return every event of *corpus* as our reader shows it."""
    return {
        name: [(event.sequence, event.written_ns, event.id_bytes, event.raw) for event in consultation]
        for name, consultation in corpus.items()
    }


def read_contents(path: Path) -> Contents:
    """Return every event of the corpus at *path*."""
    with open_corpus(path) as corpus:
        return contents(corpus)


def _consultations(groups: h5py.Group) -> Iterator[tuple[str, list[tuple[int, int, bytes, bytes]]]]:
    for name, group in groups.items():
        payload = group["payload"][:].tobytes()
        events = []
        for sequence, _, offset, length, _, event_id, _, written in group["events"][:].tolist():
            assert payload[offset + length : offset + length + 1] == b"\n"
            events.append((sequence, written, event_id, payload[offset : offset + length]))
        yield name, events
