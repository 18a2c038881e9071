"""Archives: smaller, equal to the original, read by everything, written by nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import pyfive
import pytest

from fiq.corpus import (
    ArchivedFileError,
    Consultation,
    CorpusExistsError,
    CorpusFormatError,
    CorpusNotFoundError,
    EventStore,
    Record,
    open_corpus,
    recover_partition,
    repack,
    verify_corpus,
    write_index,
)
from tests.support import damage as damages
from tests.support.corpus import IDENTITY, commit_range, expected, stock_contents
from tests.support.damage import Damage, damage

#: the module; the package has its function under the same name
repacking = import_module("fiq.corpus.tools.copy")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A data directory of two partitions, one with a long consultation and large bodies."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    with EventStore.create(directory / "00.h5", IDENTITY) as store:
        commit_range(store, range(1, 401), consultations=20)
    with EventStore.create(directory / "01.h5", replace(IDENTITY, partition=1)) as store:
        store.append("long", [Record(n, n, 2, n.to_bytes(16, "big"), b'{"n":%d}' % n) for n in range(1, 10_001)])
        store.append("big", [Record(10_001, 1, 2, b"i" * 16, b'"' + b"x" * (9 << 20) + b'"')])
        store.commit(10_001)
    write_index(directory)
    return directory


def test_an_archive_of_a_directory_holds_the_same_events_and_is_smaller(directory: Path) -> None:
    """Chains and times included; the index comes with it, and only owner and group may read it."""
    target = directory.with_name("archive")
    steps: list[tuple[str, float]] = []
    done = repack(directory, target, on_progress=lambda step, fraction: steps.append((step, fraction)))
    assert [("00.h5", 20, 400), ("01.h5", 2, 10_001)] == [(one.file, one.consultations, one.events) for one in done]
    assert all(one.bytes_after < one.bytes_before / 2 for one in done)
    assert ["00.h5", "01.h5", "corpus.h5"] == sorted(path.name for path in target.iterdir())
    assert {0o640} == {path.stat().st_mode & 0o777 for path in target.iterdir()}
    with open_corpus(directory) as original, open_corpus(target) as copy:
        assert list(original) == list(copy)
        for name, consultation in original.items():
            assert list(consultation) == list(copy[name])
            assert consultation.table().tobytes() == copy[name].table().tobytes()
        assert [one.identity for one in original.partitions] == [one.identity for one in copy.partitions]
        assert [(400, 400, True), (10_001, 10_001, True)] == [
            (one.committed, one.events, one.archived) for one in copy.partitions
        ]
    report = verify_corpus(target)
    assert (True, 10_401) == (report.clean, report.events)
    assert "comparing 01.h5" == steps[-1][0]
    assert steps[-1][1] == pytest.approx(1.0)
    assert [fraction for _, fraction in steps] == sorted(fraction for _, fraction in steps)
    assert ["archive", "corpus"] == sorted(path.name for path in directory.parent.iterdir())


def test_stock_h5py_reads_an_archive(directory: Path) -> None:
    """h5py reads it as any other file."""
    target = directory.with_name("archive.h5")
    repack(directory / "00.h5", target)
    assert (400, expected(400, 20)) == stock_contents(target)
    with h5py.File(target, "r") as file:
        assert "archived" in file.attrs
        events = file["consultations/c-0003/events"]
        assert ("gzip", True) == (events.compression, events.shuffle)


def test_an_archive_is_not_written_and_not_recovered(directory: Path) -> None:
    """The message says what it is."""
    target = directory.with_name("00.h5")
    repack(directory / "00.h5", target)
    before = target.read_bytes()
    for call in (lambda: EventStore.open(target, expected=None), lambda: recover_partition(target)):
        with pytest.raises(ArchivedFileError, match="an archive that `fiq repack` made, which is read-only"):
            call()
    assert before == target.read_bytes()


def test_an_archive_can_be_repacked_and_its_damage_is_found(directory: Path) -> None:
    """It is a corpus as any other."""
    target = directory.with_name("archive")
    repack(directory, target)
    again = directory.with_name("again")
    repack(target, again)
    assert verify_corpus(again).clean
    damage(again / "00.h5", damages.change_body)
    assert ["chain"] == [problem.kind for problem in verify_corpus(again).problems]


def test_a_corpus_that_is_written_is_archived_as_of_a_commit(path: Path) -> None:
    """What only the journal holds is in the archive, what is not committed is not."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 51))
        store.append("c-0001", [Record(51, 0, 2, bytes(16), b"{}")])
        repack(path, path.with_name("archive.h5"))
        store.commit(51)
    assert (50, expected(50)) == stock_contents(path.with_name("archive.h5"))


def test_an_empty_partition_is_archived(path: Path) -> None:
    """Most have no event at first."""
    repack(path, path.with_name("archive.h5"))
    assert (0, {}) == stock_contents(path.with_name("archive.h5"))


@pytest.mark.parametrize("how", [damages.change_body, damages.cut_events, damages.cut_payload, damages.drop_attribute])
def test_a_damaged_original_is_refused(directory: Path, how: Damage) -> None:
    """An archive of it would look sound. Nothing is left of the attempt."""
    damage(directory / "00.h5", how)
    with pytest.raises(CorpusFormatError, match=r"00\.h5"):
        repack(directory, directory.with_name("archive"))
    assert ["corpus"] == [path.name for path in directory.parent.iterdir()]


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_nothing_is_overwritten(directory: Path, kind: str) -> None:
    """Whatever it is."""
    target = directory.with_name("archive")
    if kind == "file":
        target.write_text("mine")
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    with pytest.raises(CorpusExistsError, match="exists"):
        repack(directory, target)
    with pytest.raises(CorpusExistsError, match="exists"):
        repack(directory / "00.h5", target)


def test_an_archive_that_appeared_meanwhile_is_not_overwritten(path: Path) -> None:
    """Two may run at once."""
    target = path.with_name("archive.h5")

    def appear(step: str, _: float) -> None:
        if step.startswith("comparing"):
            target.write_text("mine")

    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 51))
    with pytest.raises(CorpusExistsError):
        repack(path, target, on_progress=appear)
    assert "mine" == target.read_text()
    assert ["00.h5", "00.h5.wal", "archive.h5"] == sorted(file.name for file in path.parent.iterdir())


def test_a_source_or_a_place_that_is_missing_is_named(path: Path) -> None:
    """Nothing is made."""
    with pytest.raises(CorpusNotFoundError):
        repack(path.with_name("05.h5"), path.with_name("archive.h5"))
    with pytest.raises(CorpusNotFoundError, match="there is no directory"):
        repack(path, path.parent / "missing" / "archive.h5")


@pytest.mark.parametrize("spoil", ["body", "event", "consultation"])
def test_a_copy_that_differs_is_dropped(directory: Path, monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    """Whatever the writing made wrong is found before the archive gets its name."""
    write: Callable[..., Any] = repacking.ArchiveWriter.add

    def spoiled(self: Any, consultation: Consultation) -> None:
        if spoil == "consultation" and consultation.id == "c-0003":
            return
        write(self, consultation)

    monkeypatch.setattr(repacking.ArchiveWriter, "add", spoiled)
    if spoil != "consultation":
        lines = repacking._lines if spoil == "body" else repacking._tables
        name = "_lines" if spoil == "body" else "_tables"

        def changed(consultation: Consultation) -> Any:
            for piece in lines(consultation):
                altered = piece.copy()
                if consultation.id == "c-0003" and len(altered) > 5:
                    altered[5] = altered[4]
                yield altered

        monkeypatch.setattr(repacking, name, changed)
    with pytest.raises(CorpusFormatError, match=r"the copy of 00\.h5 .*dropped"):
        repack(directory, directory.with_name("archive"))
    assert ["corpus"] == [path.name for path in directory.parent.iterdir()]


def test_a_small_reader_without_hdf5_reads_a_portable_archive(directory: Path, tmp_path: Path) -> None:
    """Pyfive finds every byte of rows and bodies, and the names; so do our readers."""
    archive = tmp_path / "archive"
    repack(directory, archive, portable=True)
    assert verify_corpus(archive).clean
    with open_corpus(directory) as original, open_corpus(archive) as copy:
        assert all(info.archived for info in copy.partitions)
        assert list(original) == list(copy)
        assert all(list(original[name]) == list(copy[name]) for name in original)
        assert original["long"].row(5_000) == copy["long"].row(5_000)
        for info in copy.partitions:
            file = pyfive.File(str(info.path))
            assert file.attrs["format"] in ("fiq-corpus", b"fiq-corpus")
            groups = file["consultations"]
            listed = b"".join(bytes(page) for page in file["names"][:]).split(b"\n")[:-1]
            assert sorted(groups) == sorted(line.decode() for line in listed)
            for name in groups:
                rows, payload = groups[name]["events"][:], groups[name]["payload"][:]
                assert original[name].table().tobytes() == rows.tobytes()
                assert original[name].lines(0, len(payload)).tobytes() == payload.tobytes()


def test_a_portable_archive_is_not_written(directory: Path, tmp_path: Path) -> None:
    """It has no user block, so it has no mark."""
    archive = tmp_path / "00.h5"
    repack(directory / "00.h5", archive, portable=True)
    with pytest.raises(ArchivedFileError):
        EventStore.open(archive, expected=None)
    with pytest.raises(ArchivedFileError):
        recover_partition(archive)
    repack(archive, tmp_path / "again.h5")
    with open_corpus(archive) as first, open_corpus(tmp_path / "again.h5") as second:
        assert all(list(first[name]) == list(second[name]) for name in first)
