"""A corpus as Python sequences and pandas frames, with payloads as the services receive them."""

from __future__ import annotations

import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest

from fiq.corpus import Corpus, CorpusUsageError, EventRecord, EventStore, Record, open_corpus
from services.cli.demo import Post
from tests.support.corpus import IDENTITY, commit_range
from tests.support.dialogues import consultations

#: one event a second
START = datetime(2026, 11, 27, 8, tzinfo=UTC)
DIALOGUES = consultations()[:60]
POSTS = [post for dialogue in DIALOGUES for post in dialogue]
#: of every frame of a corpus
COLUMNS = ["consultation", "sequence", "received", "written", "event_id", "event_type"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two partitions with sixty dialogues, an event a second through all of them."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    stores = [EventStore.create(directory / f"{number:02d}.h5", IDENTITY) for number in (0, 1)]
    first = 1
    for number, dialogue in enumerate(DIALOGUES):
        stores[number % 2].append(
            dialogue[0].consultation, [_record(one, post) for one, post in enumerate(dialogue, first)]
        )
        first += len(dialogue)
    for store in stores:
        store.commit(first)
        store.close()
    return directory


def _record(sequence: int, post: Post) -> Record:
    received = int((START + timedelta(seconds=sequence)).timestamp()) * 10**9
    return Record(sequence, received, received + 50_000_000, UUID(post.key).bytes, post.body)


def one_consultation(path: Path, *bodies: object) -> None:
    """Put events with these bodies into the consultation c."""
    with EventStore.open(path, expected=IDENTITY) as store:
        records = [Record(n, n, 2, n.to_bytes(16, "big"), orjson.dumps(body)) for n, body in enumerate(bodies, 1)]
        store.append("c", records)
        store.commit(len(bodies))


# -- Sequences --------------------------------------------------------------------------------------------------------


def test_a_corpus_and_its_consultations_show_what_they_are(directory: Path) -> None:
    """In a notebook or a REPL; a body appears in no repr."""
    with open_corpus(directory) as corpus, open_corpus(directory / "00.h5") as one:
        name = DIALOGUES[0][0].consultation
        assert f"Corpus({str(directory)!r}, 2 partition files)" == repr(corpus)
        assert f"Corpus({str(directory / '00.h5')!r}, 1 partition file)" == repr(one)
        assert f"Consultation({name!r}, {len(DIALOGUES[0])} events)" == repr(corpus[name])
        assert "text" not in repr(corpus[name][0])
        first = corpus[name][0]
        assert (
            f"EventRecord(consultation={name!r}, sequence=1, received='{first.received}', event_id='{first.event_id}')"
        ) == repr(first)
    assert f"Corpus({str(directory)!r}, closed)" == repr(corpus)


def test_a_consultation_is_a_sequence(path: Path) -> None:
    """Indices, also from the end, slices with steps, and what Python's sequences can do besides."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 101), consultations=1)
    with open_corpus(path) as corpus:
        [consultation] = corpus.values()
        events = list(consultation)
        assert 100 == len(consultation) == len(events)
        for index in (0, 1, 31, 32, 99, -1, -100):
            assert events[index] == consultation[index]
        for chosen in (slice(3), slice(10, 50), slice(-5, None), slice(None), slice(90, 200), slice(5, 5), slice(9, 3)):
            assert events[chosen] == consultation[chosen]
        assert events[::-7] == consultation[::-7]
        assert events[::-1] == list(reversed(consultation))
        assert events[40] in consultation
        for index in (100, -101):
            with pytest.raises(IndexError, match=f"has 100 events, none at {index}"):
                consultation[index]


def test_a_corpus_is_a_mapping(directory: Path) -> None:
    """Of all partition files, as one."""
    names = [dialogue[0].consultation for dialogue in DIALOGUES]
    with open_corpus(directory) as corpus:
        assert len(names) == len(corpus)
        assert sorted(names) == sorted(corpus)
        assert names[7] in corpus
        assert "7" not in corpus
        assert [post.body for post in DIALOGUES[7]] == [event.raw for event in corpus[names[7]]]


# -- Frames -----------------------------------------------------------------------------------------------------------


def test_each_member_of_a_payload_is_a_column(directory: Path) -> None:
    """A row an event; the members of all payloads are columns, and what an event lacks is missing."""
    pandas = pytest.importorskip("pandas")
    with open_corpus(directory) as corpus:
        frame = corpus.to_frame()
        events = [event for consultation in corpus.values() for event in consultation]
    members = list(dict.fromkeys(f"payload.{name}" for event in events for name in event.payload))
    assert ["consultation", "sequence", "received", "written", "event_id", "event_type", *members] == list(
        frame.columns
    )
    assert ["payload.speaker", "payload.text"] == members[:2]
    assert len(POSTS) == len(frame)
    for event, row in zip(events, frame.to_dict("records"), strict=True):
        assert (event.consultation, event.sequence) == (row["consultation"], row["sequence"])
        assert (str(event.event_id), event.event_type) == (row["event_id"], row["event_type"])
        assert (event.received, event.written) == (row["received"], row["written"])
        shown = {name: row[f"payload.{name}"] for name in event.payload}
        assert event.payload == shown
        assert all(
            pandas.isna(row[column]) for column in members if column.removeprefix("payload.") not in event.payload
        )


def test_columns_are_typed(directory: Path) -> None:
    """So that a filter, a resampling and an aggregation work without a conversion."""
    pytest.importorskip("pandas")
    with open_corpus(directory) as corpus:
        frame = corpus.to_frame()
    kinds = {column: str(frame[column].dtype) for column in frame}
    assert "uint64" == kinds.pop("sequence")
    assert "datetime64[ns, UTC]" == kinds.pop("received") == kinds.pop("written")
    assert {"string"} == set(kinds.values())
    minutes = frame.set_index("received").resample("1min").size()
    assert len(POSTS) == minutes.sum()
    assert {"MESSAGE_RECEIVED", "CONSULTATION_SUMMARIZED"} == set(frame["event_type"])


@pytest.mark.parametrize(("since", "until"), [(100, 200), (None, 50), (300, None), (7, 8), (5000, None)])
def test_a_frame_is_bounded_by_time(directory: Path, since: int | None, until: int | None) -> None:
    """The beginning is in, the end is out."""
    pytest.importorskip("pandas")
    moments = [None if seconds is None else START + timedelta(seconds=seconds) for seconds in (since, until)]
    with open_corpus(directory) as corpus:
        frame = corpus.to_frame(since=moments[0], until=moments[1])
    wanted = range(1 if since is None else since, len(POSTS) + 1 if until is None else until)
    assert [n for n in wanted if n <= len(POSTS)] == sorted(frame["sequence"])


def test_a_frame_is_bounded_by_the_beginning_of_the_id(directory: Path) -> None:
    """Ids often begin with a date or a site."""
    pytest.importorskip("pandas")
    prefix = DIALOGUES[0][0].consultation[:-1]
    wanted = {post.consultation for post in POSTS if post.consultation.startswith(prefix)}
    with open_corpus(directory) as corpus:
        assert wanted == set(corpus.to_frame(prefix=prefix)["consultation"])
        none = corpus.to_frame(prefix="no-such-")
    assert (0, COLUMNS) == (len(none), list(none.columns))
    assert ["string", "uint64", *["datetime64[ns, UTC]"] * 2, "string", "string"] == [str(kind) for kind in none.dtypes]


@pytest.mark.parametrize("wrong", [5, None, b"c"])
def test_a_prefix_of_another_type_is_refused(directory: Path, wrong: Any) -> None:
    """With an example of what is needed, here as in the other methods that take one."""
    pytest.importorskip("pandas")
    with open_corpus(directory) as corpus:
        for use in (
            lambda: corpus.to_frame(prefix=wrong),
            lambda: list(corpus.ids(wrong)),
            lambda: list(corpus.read(list, prefix=wrong)),
        ):
            with pytest.raises(CorpusUsageError, match="prefix must be a str, as in prefix='ward-7-', not"):
                use()
        with pytest.raises(CorpusUsageError, match="after must be a str"):
            list(corpus.ids(after=wrong))


def test_a_time_without_a_zone_is_refused(directory: Path) -> None:
    """It would silently mean another moment in another place."""
    pytest.importorskip("pandas")
    with open_corpus(directory) as corpus, pytest.raises(CorpusUsageError, match="since needs a time zone"):
        corpus.to_frame(since=datetime(2026, 11, 27))  # noqa: DTZ001 - that is what is tested


def test_a_time_of_another_type_is_refused(directory: Path) -> None:
    """With an example of what is needed: pandas takes text for a time, and this does not."""
    pytest.importorskip("pandas")
    for wrong in ("2026-11-27", date(2026, 11, 27)):
        with open_corpus(directory) as corpus, pytest.raises(CorpusUsageError, match="until must be a datetime, as in"):
            corpus.to_frame(until=wrong)  # type: ignore[arg-type]


def test_what_is_nested_stays_a_python_object(path: Path) -> None:
    """Numbers and truth values are typed, lists and objects are whole; a payload that is no object has a column."""
    pandas = pytest.importorskip("pandas")
    one_consultation(
        path,
        {"event_type": "A", "payload": {"n": 1, "x": 0.5, "ok": True, "tags": ["a", "b"], "who": {"id": 7}}},
        {"event_type": "B", "payload": {"n": None, "x": 2, "ok": False, "tags": []}},
        {"event_type": "C", "payload": "only a text"},
        {"event_type": "D"},
    )
    with open_corpus(path) as corpus:
        frame = corpus["c"].to_frame()
        whole = corpus["c"].to_frame(expand=False)
    kinds = {column.removeprefix("payload."): str(frame[column].dtype) for column in frame.columns[len(COLUMNS) - 1 :]}
    assert {
        "n": "Int64",
        "x": "Float64",
        "ok": "boolean",
        "tags": "object",
        "who": "object",
        "payload": "string",
    } == kinds
    assert [["a", "b"], []] == frame["payload.tags"].tolist()[:2]
    assert {"id": 7} == frame["payload.who"][0]
    assert [True, True, False, True] == [bool(pandas.isna(one)) for one in frame["payload"]]
    assert ["sequence", "received", "written", "event_id", "event_type", "payload"] == list(whole.columns)
    assert [{"n": None, "x": 2, "ok": False, "tags": []}, "only a text"] == whole["payload"].tolist()[1:3]


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(1234567890123456789, "Int64"), (-(2**63), "Int64"), (2**63, "object"), (2**64 - 1, "object")],
)
def test_an_integer_keeps_all_of_its_digits(path: Path, number: int, dtype: str) -> None:
    """Also where another event lacks it: a float would name another patient's record."""
    one_consultation(path, *({"event_type": "A", "payload": payload} for payload in ({"id": number}, {}, {"id": 5})))
    with open_corpus(path) as corpus:
        column = corpus["c"].to_frame()["payload.id"]
    assert dtype == str(column.dtype)
    assert [number, 5] == column.dropna().tolist()
    assert [False, True, False] == column.isna().tolist()


def test_a_member_may_have_any_name(path: Path) -> None:
    """Clients choose it: it never replaces a column of the corpus's own."""
    pytest.importorskip("pandas")
    one_consultation(path, {"event_type": "A", "payload": {"sequence": "mine", "": 1, "payload": 2}})
    with open_corpus(path) as corpus:
        frame = corpus.to_frame()
    assert [1] == frame["sequence"].tolist()
    assert ["mine", 1, 2] == [frame[f"payload.{name}"][0] for name in ("sequence", "", "payload")]


def test_a_frame_without_pandas_says_what_to_install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas is an extra."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with open_corpus(directory) as corpus:
        for call in (corpus.to_frame, next(iter(corpus.values())).to_frame):
            with pytest.raises(CorpusUsageError, match=r"pip install 'fiq\[pandas\]'"):
                call()


def test_an_event_is_equal_to_itself_only(directory: Path) -> None:
    """Records are values: the same event read twice is equal, its body included."""

    def first(corpus: Corpus) -> EventRecord:
        return corpus[DIALOGUES[0][0].consultation][0]

    with open_corpus(directory) as one, open_corpus(directory) as other:
        assert first(one) == first(other)
        assert one[DIALOGUES[0][0].consultation][1] != first(other)
