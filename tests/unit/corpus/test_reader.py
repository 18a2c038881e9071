"""Reading a corpus: everything that is committed, while it is written, from any process."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from fiq.corpus import (
    CorpusFormatError,
    CorpusIOError,
    CorpusNotFoundError,
    CorpusUsageError,
    EventStore,
    JournalError,
    Record,
    StoreOptions,
    UnknownConsultationError,
    open_corpus,
    write_index,
)
from fiq.corpus.wal.journal import AbsorbedState, write_state
from fiq.corpus.wal.storage import StorageIO
from tests.support.corpus import IDENTITY, append_range, commit_range, expected, read_contents


def test_every_field_of_an_event_comes_back(path: Path) -> None:
    """Ids, times, types and payloads are typed; the body is there byte for byte."""
    # given
    event_id = UUID("0191d5c2-7b7a-7c3e-8f00-1234567890ab")
    body = '{"event_type":"MESSAGE_RECEIVED","payload":{"text":"Grüße, ¿qué tal?"}}'.encode()
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c-1", [Record(7, 1_700_000_000_123_456_789, 1_700_000_000_198_765_432, event_id.bytes, body)])
        store.commit(7)
    # when
    with open_corpus(path) as corpus:
        [event] = corpus["c-1"]
    # then
    assert ("c-1", 7, event_id, 1_700_000_000_123_456_789, 1_700_000_000_198_765_432, body) == (
        event.consultation,
        event.sequence,
        event.event_id,
        event.received_ns,
        event.written_ns,
        event.raw,
    )
    assert datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC) == event.received
    assert datetime(2023, 11, 14, 22, 13, 20, 198765, tzinfo=UTC) == event.written
    assert event.event_type == "MESSAGE_RECEIVED"
    assert event.payload == {"text": "Grüße, ¿qué tal?"}


def test_a_body_that_is_no_json_object_is_named_without_its_content(path: Path) -> None:
    """A message never holds a payload."""
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c", [Record(1, 0, 2, bytes(16), b"[secret")])
        store.commit(1)
    with open_corpus(path) as corpus:
        [event] = corpus["c"]
    with pytest.raises(CorpusFormatError, match="the body of sequence 1 is no JSON object") as raised:
        event.document()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("cached_pages", [8192, 4])
def test_a_reader_sees_what_only_the_journal_holds(path: Path, cached_pages: int) -> None:
    """Committed events are seen before any checkpoint; those that are only appended are not."""
    with EventStore.open(path, expected=IDENTITY, options=StoreOptions(cached_pages=cached_pages)) as store:
        commit_range(store, range(1, 101))
        assert store.checkpoint()
        commit_range(store, range(101, 201))
        append_range(store, range(201, 301))
        with open_corpus(path) as corpus:
            assert expected(200) == read_contents(path)
            [info] = corpus.partitions
            assert (info.committed, info.journal_records, info.has_journal, info.identity) == (200, 1, True, IDENTITY)


def test_a_snapshot_does_not_change_while_it_is_open(path: Path) -> None:
    """A reader sees one moment; refresh() takes the next one, and the writer is never stopped."""
    with EventStore.open(path, expected=IDENTITY) as store, open_corpus(path) as corpus:
        commit_range(store, range(1, 101))
        assert len(corpus) == 7
        before = {name: len(corpus[name]) for name in corpus}
        for start in range(101, 501, 50):
            commit_range(store, range(start, start + 50), consultations=20)
            assert not store.maybe_checkpoint(now=True)
        assert before == {name: len(list(corpus[name])) for name in corpus}
        corpus.refresh()
        assert store.checkpoint()
        assert sum(len(corpus[name]) for name in corpus) == 500


def test_consultations_are_found_in_any_partition_file(tmp_path: Path) -> None:
    """A directory is one corpus, whatever the number of its files; the index and the journals are no partitions."""
    for number in (0, 3, 11):
        with EventStore.create(tmp_path / f"{number:02d}.h5", IDENTITY) as store:
            store.append(f"c-{number}", [Record(number + 1, 0, 2, bytes(16), b"{}")])
            store.commit(number + 1)
    write_index(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / "corpus.h5"):
        with open_corpus(place) as corpus:
            assert list(corpus) == ["c-0", "c-3", "c-11"]
            assert [partition.committed for partition in corpus.partitions] == [1, 4, 12]
            assert next(iter(corpus["c-11"])).sequence == 12
            assert len(corpus) == 3
            assert "c-3" in corpus
            assert corpus.get("c-4") is None


@pytest.mark.parametrize("name", ["missing", "", "c-0/events", "../consultations", "."])
def test_an_unknown_consultation_is_named(path: Path, name: str) -> None:
    """Also where the id is none that a consultation can have."""
    with open_corpus(path) as corpus:
        assert name not in corpus
        with pytest.raises(UnknownConsultationError, match="no consultation"):
            corpus[name]


def test_a_place_without_a_corpus_is_named(tmp_path: Path) -> None:
    """A missing path and an empty directory have messages of their own."""
    with pytest.raises(CorpusNotFoundError, match="there is no corpus at"):
        open_corpus(tmp_path / "missing")
    with pytest.raises(CorpusNotFoundError, match="no partition files"):
        open_corpus(tmp_path)


def test_what_to_open_instead_is_named(path: Path) -> None:
    """A journal, and the folder above a data directory."""
    directory = path.parent / "corpus"
    directory.mkdir()
    shutil.copy(path, directory / "00.h5")
    journal = path.with_name("00.h5.wal")
    with pytest.raises(CorpusNotFoundError, match=r"00\.h5\.wal is a journal: open 00\.h5,"):
        open_corpus(journal)
    for file in (path, journal):
        file.unlink()
    with pytest.raises(CorpusNotFoundError, match=f"there are no partition files .*: open {directory}$"):
        open_corpus(directory.parent)


def test_a_refusal_of_the_system_is_an_error_of_the_corpus(tmp_path: Path) -> None:
    """Such as a directory without permission; a name that is too long is refused to every user."""
    with pytest.raises(CorpusIOError, match=r"cannot open .*: File name too long"):
        open_corpus(tmp_path / ("c" * 300))


def test_an_index_that_is_no_id_is_refused(path: Path) -> None:
    """A corpus is no sequence: its first consultation is not at 0."""
    with open_corpus(path) as corpus, pytest.raises(TypeError, match=r"by consultation id \(str\), not by int"):
        corpus[0]  # type: ignore[index]


def test_an_event_is_found_by_its_position(path: Path) -> None:
    """A consultation is a sequence: its events have no names."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 3))
    with open_corpus(path) as corpus, pytest.raises(TypeError, match=r"by position \(int\) or slice, not by str"):
        corpus[next(iter(corpus))]["payload"]  # type: ignore[call-overload]


def test_a_copy_without_its_journal_shows_the_last_checkpoint(path: Path, tmp_path: Path) -> None:
    """Analysts copy the .h5 alone; the info says that the journal was not there."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 21))
        assert store.checkpoint()
        commit_range(store, range(21, 41))
        copy = Path(shutil.copy(path, tmp_path / "copy.h5"))
    assert expected(20) == read_contents(copy)
    with open_corpus(copy) as corpus:
        assert not corpus.partitions[0].has_journal


def test_a_copy_from_the_middle_of_a_checkpoint_needs_its_journal(path: Path) -> None:
    """Such a file is neither the old nor the new checkpoint."""
    with path.open("r+b") as file:
        write_state(StorageIO(), file.fileno(), AbsorbedState(generation=9, absorbed=0, target=1, link=0))
    path.with_name("00.h5.wal").unlink()
    with open_corpus(path) as corpus, pytest.raises(JournalError, match="copied in the middle of a checkpoint"):
        len(corpus)


def test_a_reader_writes_nothing(path: Path) -> None:
    """Files and directory may be read-only."""
    store = EventStore.open(path, expected=IDENTITY)
    commit_range(store, range(1, 101))
    store.abandon()
    files = [path, path.with_name("00.h5.wal")]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    for file in (*files, path.parent):
        file.chmod(0o555)
    assert expected(100) == read_contents(path)
    assert before == [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    path.parent.chmod(0o755)


def test_a_closed_corpus_says_so(path: Path) -> None:
    """A consultation is of use only while its corpus is open."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 101))
    with open_corpus(path) as corpus:
        consultation = corpus[next(iter(corpus))]
    with pytest.raises(CorpusUsageError, match="closed"):
        list(consultation)
    with pytest.raises(CorpusUsageError, match="closed"):
        len(corpus)


def test_a_long_consultation_is_read_in_bounded_slices(path: Path) -> None:
    """Ten thousand events, and bodies larger than what is read at once."""
    big = b'"' + b"x" * (5 << 20) + b'"'
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c", [Record(n, n, 2, n.to_bytes(16, "big"), b"%d" % n) for n in range(1, 10_001)])
        store.append("c", [Record(n, n, 2, n.to_bytes(16, "big"), big) for n in range(10_001, 10_005)])
        store.commit(10_004)
        with open_corpus(path) as corpus:
            events = list(corpus["c"])
    assert list(range(1, 10_005)) == [event.sequence for event in events]
    assert all(event.raw == b"%d" % event.sequence for event in events[:10_000])
    assert [big] * 4 == [event.raw for event in events[10_000:]]
