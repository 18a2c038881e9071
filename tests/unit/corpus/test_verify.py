"""Verification: a clean corpus is clean, and each kind of damage is found and named."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import pytest

from fiq.corpus import (
    Checked,
    Consultation,
    CorpusNotFoundError,
    EventStore,
    Progress,
    Record,
    Report,
    open_corpus,
    recover_partition,
    verify_corpus,
    verify_slice,
    write_index,
)
from fiq.corpus.tools import verify
from fiq.corpus.tools.verify import KINDS
from tests.support import damage as damages
from tests.support.corpus import IDENTITY, append_range, commit_range, record
from tests.support.damage import VICTIM, Damage, damage


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of two partitions, as the persister leaves it."""
    directory = tmp_path_factory.mktemp("pristine") / "corpus"
    directory.mkdir()
    with EventStore.create(directory / "00.h5", IDENTITY) as store:
        commit_range(store, range(1, 201))
    with EventStore.create(directory / "01.h5", replace(IDENTITY, partition=1)) as store:
        store.append("d", [Record(7, 1, 2, b"a" * 16, b"{}")])
        store.commit(7)
    write_index(directory)
    (directory / "volume.json").write_text(json.dumps({"format": 1, "volume": IDENTITY.volume, "store": "main"}))
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(pristine, tmp_path / "corpus")


def found(report: Report) -> list[tuple[str, str, str | None, int | None]]:
    assert {problem.kind for problem in report.problems} <= KINDS.keys()
    return [(problem.file, problem.kind, problem.consultation, problem.row) for problem in report.problems]


def test_a_clean_corpus_has_no_problems(pristine: Path) -> None:
    """Everything is counted, the last progress is the whole."""
    seen: list[Progress] = []
    report = verify_corpus(pristine, on_progress=seen.append)
    assert (True, 201, 8, ()) == (report.clean, report.events, report.consultations, report.problems)
    assert ["00.h5", "01.h5"] == [partition.file for partition in report.partitions]
    assert (200, 200, 7) == (
        report.partitions[0].committed,
        report.partitions[0].events,
        report.partitions[0].consultations,
    )
    assert seen[-1].fraction == pytest.approx(1.0)
    assert 201 == seen[-1].events


DAMAGES: list[tuple[Damage, list[tuple[str, int | None]]]] = [
    (damages.change_body, [("chain", 5)]),
    (damages.change_time, [("chain", 5)]),
    (damages.change_written, []),  # it is not chained: each store writes an event at its own time
    (damages.change_flags, [("chain", 5)]),
    (damages.change_chain, [("chain", 5), ("chain", 6)]),
    (damages.change_sequence, [("order", 5), ("chain", 5)]),
    (damages.duplicate_id, [("chain", 7), ("duplicate", 7)]),
    (damages.remove_row, [("gap", 5), ("chain", 5), ("count", None)]),
    (
        damages.swap_rows,
        [("gap", 5), ("chain", 5), ("order", 6), ("gap", 6), ("chain", 6), ("gap", 7), ("chain", 7)],
    ),
    (damages.cut_payload, [("outside", 28)]),
    (damages.cut_rows, [("payload", None), ("count", None)]),
    (damages.cut_events, [("count", None)]),
    (damages.remove_consultation, [("names", None), ("count", None)]),
    (damages.misname_consultation, [("names", None), ("name", None)]),
    (damages.forget_name, [("names", None)]),
    (damages.repeat_name, [("names", None)]),
    (damages.cut_names, [("names", None)]),
    (damages.remove_payload, [("unreadable", None), ("count", None)]),
    (damages.retype_events, [("unreadable", None), ("count", None)]),
    (damages.flatten_group, [("unreadable", None), ("count", None)]),
    (damages.join_lines, [("newline", 5)]),
    (damages.drop_attribute, [("file", None)]),
]
#: kinds of problems that are of one consultation, but for duplicate ids
OF_CONSULTATION = {"chain", "order", "gap", "outside", "newline", "payload"}
#: what a persister refuses to open, or HDF5 cannot read in it
NOT_OPENED = {
    damages.drop_attribute,
    damages.remove_payload,
    damages.retype_events,
    damages.flatten_group,
    damages.cut_names,
    damages.forget_name,
    damages.repeat_name,
    damages.misname_consultation,
}
OPENED = [case for case in DAMAGES if case[0] not in NOT_OPENED]


@pytest.mark.parametrize(("how", "expected"), OPENED, ids=lambda value: getattr(value, "__name__", ""))
def test_slices_of_a_consultation_find_the_same(
    directory: Path, how: Damage, expected: list[tuple[str, int | None]]
) -> None:
    """In the file that a persister has open, some rows at a time, however few; ids are not compared."""
    damage(directory / "00.h5", how)
    of_rows = [(kind, row) for kind, row in expected if kind in OF_CONSULTATION]
    for most_rows, most_bytes in ((3, 1 << 20), (1024, 1), (1024, 1 << 20)):
        with EventStore.open(directory / "00.h5", expected=None) as store, store.reading() as lookup:
            consultation = lookup.consultation(VICTIM)
            if consultation is None:
                assert [] == of_rows
                continue
            found, checked, slices = [], Checked(), 0
            while slices == 0 or checked.rows < len(consultation):
                problems, checked = verify_slice(
                    consultation, store.identity, store.committed, checked, most_rows=most_rows, most_bytes=most_bytes
                )
                found += [(problem.kind, problem.row) for problem in problems]
                slices += 1
            assert sorted(of_rows, key=str) == sorted(found, key=str)
            assert checked.rows == len(consultation)
            assert slices == -(-len(consultation) // (1 if most_bytes == 1 else most_rows))


@pytest.mark.parametrize(("how", "expected"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_is_found_and_named(directory: Path, how: Damage, expected: list[tuple[str, int | None]]) -> None:
    """The problem names the kind and the row; nothing that is in order is accused."""
    damage(directory / "00.h5", how)
    report = verify_corpus(directory)
    assert expected == [(problem.kind, problem.row) for problem in report.problems]
    assert {problem.kind for problem in report.problems} <= KINDS.keys()
    for problem in report.problems:
        assert "00.h5" == problem.file
        assert problem.row is None or (VICTIM == problem.consultation and str(problem.row) in str(problem))


def test_an_event_that_was_taken_out_cleanly_breaks_the_chain(directory: Path) -> None:
    """Even if everything after it was moved up, and the number of events lowered."""
    damage(directory / "00.h5", damages.remove_event)
    report = verify_corpus(directory)
    assert ("00.h5", "chain", VICTIM, 5) == found(report)[0]
    assert {"chain", "count"} == {problem.kind for problem in report.problems}


def test_a_consultation_under_another_id_does_not_fit_its_chain(directory: Path) -> None:
    """The first row is chained to the id."""
    damage(directory / "00.h5", damages.rename_consultation)
    assert [("00.h5", "names", None, None), ("00.h5", "chain", "other", 0)] == found(verify_corpus(directory))


@pytest.mark.parametrize("how", [damages.forget_name, damages.repeat_name, damages.cut_names])
def test_an_index_of_names_can_be_written_anew(directory: Path, how: Damage) -> None:
    """It repeats what the groups say."""
    damage(directory / "00.h5", how)
    assert ["names"] == [problem.kind for problem in verify_corpus(directory).problems]
    recover_partition(directory / "00.h5", names=True)
    assert verify_corpus(directory).clean
    with EventStore.open(directory / "00.h5", expected=None) as store:
        store.append("new", [record(1000)])
        store.commit(1000)
    assert verify_corpus(directory).clean


def test_events_above_what_is_committed_are_named(directory: Path) -> None:
    """They would be delivered again."""
    damage(directory / "00.h5", damages.lower_committed)
    report = verify_corpus(directory)
    assert {"ahead"} == {problem.kind for problem in report.problems}
    assert set(range(101, 201)) == {problem.sequence for problem in report.problems}


def test_bodies_that_are_no_json_are_named_and_not_shown(path: Path) -> None:
    """The store takes any line; the report holds nothing of it."""
    bodies = [b'{"a":1}', b'{"secret', b'"secret \xff"', b"[1]"]
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c", [Record(n, 0, 2, bytes([n]) * 16, body) for n, body in enumerate(bodies)][1:])
        store.commit(9)
    report = verify_corpus(path)
    assert [("00.h5", "json", "c", 0), ("00.h5", "utf-8", "c", 1)] == found(report)
    assert "secret" not in json.dumps(report.to_dict())


def test_no_report_holds_a_payload(directory: Path) -> None:
    """It can be sent around."""
    for how in (damages.change_body, damages.join_lines, damages.swap_rows, damages.cut_payload):
        damage(directory / "00.h5", how)
    text = json.dumps(verify_corpus(directory).to_dict())
    assert "chain" in text
    assert "MESSAGE" not in text
    assert "ppp" not in text


@pytest.mark.parametrize(
    ("field", "value", "kinds"),
    [
        ("volume", "another", {"identity"}),
        ("store", "copy", {"identity"}),
        ("partition", 2, {"identity", "chain"}),
        ("partitions", 1, {"identity", "chain"}),
        ("stream", "other", {"identity", "chain"}),
        ("stream_created", "2026-11-24T10:00:00.000000000Z", {"identity", "chain"}),
    ],
)
def test_a_file_of_another_identity_is_named(directory: Path, field: str, value: str | int, kinds: set[str]) -> None:
    """All files of a directory are of one volume and stream; each is the partition that its name says."""
    damage(directory / "01.h5", damages.restate(field, value))
    report = verify_corpus(directory)
    assert kinds == {problem.kind for problem in report.problems}
    assert {"01.h5"} == {problem.file for problem in report.problems}


@pytest.mark.parametrize("content", ['{"format": 1, "volume": "another", "store": "main"}', "{", "[]"])
def test_the_files_belong_to_the_volume_of_the_directory(directory: Path, content: str) -> None:
    """volume.json says which one that is."""
    (directory / "volume.json").write_text(content)
    assert {"identity" if "another" in content else "volume"} == {one.kind for one in verify_corpus(directory).problems}


@pytest.mark.parametrize("change", ["no link", "extra", "elsewhere", "hard", "format", "garbage"])
def test_an_index_that_leads_elsewhere_is_named(directory: Path, change: str) -> None:
    """corpus.h5 links each partition file, and nothing else."""
    index = directory / "corpus.h5"
    if change == "garbage":
        index.write_bytes(b"garbage")
    else:
        with h5py.File(index, "r+") as file:
            links = file["partitions"]
            if change == "format":
                del file.attrs["format"]
            elif change == "extra":
                links["02"] = h5py.ExternalLink("02.h5", "/")
            else:
                del links["01"]
            if change == "elsewhere":
                links["01"] = h5py.ExternalLink("00.h5", "/")
            if change == "hard":
                links["01"] = h5py.SoftLink("/")
    assert [("corpus.h5", "index", None, None)] == found(verify_corpus(directory))
    (problem,) = verify_corpus(directory).problems
    assert "('" not in problem.message  # a name, and no tuple


def test_a_directory_without_an_index_is_complete(directory: Path) -> None:
    """It can be written again."""
    (directory / "corpus.h5").unlink()
    assert verify_corpus(directory).clean


def test_a_consultation_is_in_one_partition(directory: Path) -> None:
    """Otherwise its history is split."""
    with EventStore.open(directory / "01.h5", expected=None) as store:
        store.append(VICTIM, [Record(8, 1, 2, b"b" * 16, b"{}")])
        store.commit(8)
    assert [("01.h5", "elsewhere", VICTIM, None)] == found(verify_corpus(directory))


def test_journals_that_are_missing_swapped_or_alone_are_named(directory: Path) -> None:
    """What the journal held is part of the corpus."""
    first, second = directory / "00.h5.wal", directory / "01.h5.wal"
    first.rename(directory / "x")
    assert [("00.h5", "journal", None, None)] == found(verify_corpus(directory))
    second.rename(first)
    (directory / "x").rename(second)
    assert [("00.h5", "journal"), ("01.h5", "journal")] == [problem[:2] for problem in found(verify_corpus(directory))]


def test_a_journal_that_is_damaged_in_its_middle_is_named(directory: Path) -> None:
    """Commits after the damage would be lost; a tail that a crash tore is not damage."""
    journal = directory / "01.h5.wal"
    store = EventStore.open(directory / "01.h5", expected=None)
    states = [journal.read_bytes()]
    for sequence in (8, 9):
        store.append("d", [Record(sequence, 1, 2, bytes([sequence]) * 16, b"{}")])
        store.commit(sequence)
        states.append(journal.read_bytes())
    store.abandon()
    first, second = (_first_change(*states[number : number + 2]) for number in (0, 1))
    journal.write_bytes(_flipped(states[2], first + 600))
    assert [("01.h5", "journal", None, None)] == found(verify_corpus(directory))
    journal.write_bytes(_flipped(states[2], second + 600))
    report = verify_corpus(directory)
    assert (True, 1) == (report.clean, report.partitions[1].journal_records)


def test_a_journal_whose_file_is_gone_is_named(directory: Path) -> None:
    """Its commits are nowhere else."""
    store = EventStore.open(directory / "01.h5", expected=None)
    store.append("d", [Record(8, 1, 2, b"b" * 16, b"{}")])
    store.commit(8)
    store.abandon()
    (directory / "01.h5").unlink()
    (directory / "corpus.h5").unlink()
    assert [("01.h5.wal", "journal", None, None)] == found(verify_corpus(directory))


def test_a_file_that_is_none_is_named_and_the_others_are_verified(directory: Path) -> None:
    """One bad file does not hide the state of the rest."""
    (directory / "00.h5").write_bytes(b"garbage" * 10_000)
    report = verify_corpus(directory)
    assert [("00.h5", "file", None, None)] == found(report)
    assert ["01.h5"] == [partition.file for partition in report.partitions]


def test_what_only_the_journal_holds_is_verified(path: Path) -> None:
    """And what is not committed is not there."""
    store = EventStore.open(path, expected=IDENTITY)
    commit_range(store, range(1, 51))
    append_range(store, range(51, 99))
    try:
        report = verify_corpus(path)
        assert (True, 50, 1) == (report.clean, report.events, report.partitions[0].journal_records)
    finally:
        store.abandon()


def test_a_long_consultation_is_verified_in_slices(path: Path) -> None:
    """Damage at the borders of slices is named with its own row."""
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append(VICTIM, [Record(n, 0, 2, n.to_bytes(16, "big"), b'{"n":%d}' % n) for n in range(1, 10_001)])
        store.commit(10_000)
    assert verify_corpus(path).clean
    with h5py.File(path, "r+") as file:
        events = file[f"consultations/{VICTIM}/events"]
        for number in (4095, 4096, 8192, 9999):
            row = events[number]
            row["received_ns"] = 1
            events[number] = row
        row = events[9000]
        row["event_id"] = events[10]["event_id"]
        events[9000] = row
    kinds = [("chain", row) for row in (4095, 4096, 8192, 9000, 9999)]
    assert [*kinds, ("duplicate", 9000)] == [(problem.kind, problem.row) for problem in verify_corpus(path).problems]


def test_random_damage_is_found_or_harmless(path: Path) -> None:
    """Whatever bytes change, in HDF5's own structures too: either a problem is found, or every event is what it was.

    But for the time when it was written, which no chain covers.
    """
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 201), 20)
    sound, events = path.read_bytes(), _tables(path)
    chance = random.Random(3)
    outcomes = set()
    for size in [1, 1, 8, 512] * 20:
        content = bytearray(sound)
        place = chance.randrange(16384, len(content) - size)
        content[place : place + size] = chance.randbytes(size)
        path.write_bytes(content)
        clean = verify_corpus(path).clean
        outcomes.add(clean)
        assert not clean or events == _tables(path)
    assert {True, False} == outcomes


def test_a_file_that_is_all_wrong_is_given_up(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report stays bounded."""
    monkeypatch.setattr(verify, "MOST_PROBLEMS", 30)
    damage(directory / "00.h5", damages.lower_committed)
    kinds = [problem.kind for problem in verify_corpus(directory).problems]
    assert len(kinds) < 100
    assert "more" == kinds[-1]


@pytest.mark.parametrize("state", ["closed", "crashed", "live"])
def test_verification_changes_nothing(directory: Path, state: str) -> None:
    """No byte, no name, no time of change: closed, with a journal that waits, or with a writer that lives."""
    # given
    store = EventStore.open(directory / "00.h5", expected=None)
    if state == "closed":
        store.close()
    else:
        commit_range(store, range(201, 251))
        append_range(store, range(251, 260))
    if state == "crashed":
        store.abandon()
    before = _everything(directory)
    # when
    report = verify_corpus(directory)
    # then
    assert () == report.problems
    assert (state != "closed") == (report.partitions[0].journal_records > 0)
    assert before == _everything(directory)
    store.abandon()


def _everything(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Return the content and the time of the last change of every file; of the directory itself, the latter."""
    files = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}
    return files | {".": (b"", directory.stat().st_mtime_ns)}


def test_every_kind_of_problem_is_documented() -> None:
    """docs/cli.md lists what the code can say, in its words."""
    document = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    for kind, meaning in KINDS.items():
        assert f"\n- `{kind}`: {meaning}\n" in document


def test_a_path_without_a_corpus_is_refused(tmp_path: Path) -> None:
    """That is an error, and no report."""
    with pytest.raises(CorpusNotFoundError):
        verify_corpus(tmp_path)
    with pytest.raises(CorpusNotFoundError):
        verify_corpus(tmp_path / "missing")


def _tables(path: Path) -> dict[str, tuple[bytes, bytes]]:
    with open_corpus(path) as corpus:
        return {name: (_chained(one), one.lines(0, one.payload_bytes).tobytes()) for name, one in corpus.items()}


def _chained(consultation: Consultation) -> bytes:
    """Return the rows without the time when they were written."""
    table = consultation.table()
    table["written_ns"] = 0
    return table.tobytes()


def _first_change(before: bytes, after: bytes) -> int:
    return next(place for place, byte in enumerate(after) if before[place : place + 1] != bytes([byte]))


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_partition_that_is_created_meanwhile_is_no_damage(directory: Path) -> None:
    """Before the index knows of it, and afterwards."""
    made: list[Path] = []

    def create(_: Progress) -> None:
        name = f"{len(made) + 2:02d}.h5"
        if len(made) == 2:
            return
        with EventStore.create(directory / name, replace(IDENTITY, partition=len(made) + 2)) as store:
            store.append(f"new-{name[:2]}", [Record(1, 1, 2, b"b" * 16, b"{}")])
            store.commit(1)
            store.abandon()
        if not made:
            write_index(directory)
        made.append(directory / name)

    report = verify_corpus(directory, on_progress=create)
    assert len(made) == 2
    assert report.problems == ()
