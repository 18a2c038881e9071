"""A damaged partition file does not keep anybody from reading the others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from typer.testing import CliRunner

from fiq.corpus import (
    Corpus,
    CorpusFormatError,
    DamagedPartitionError,
    DamagedPartitionWarning,
    EventStore,
    open_corpus,
)
from fiq.corpus.errors import hdf5_says
from fiq.corpus.reader import write_index
from services.cli.main import app
from tests.support.corpus import IDENTITY, record
from tests.support.damage import VICTIM, Damage, damage


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Three partitions with a consultation each; the superblock of the second one is overwritten."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        with EventStore.create(folder / f"0{number}.h5", replace(IDENTITY, partition=number)) as store:
            store.append(f"c-{number}", [record(sequence) for sequence in range(1, 4)])
            store.commit(3)
    with (folder / "01.h5").open("r+b") as file:
        file.seek(16384)
        file.write(bytes(512))
    return folder


def test_what_is_healthy_is_read_and_the_rest_is_named(directory: Path) -> None:
    """Ids, lengths, events and frames, with one warning for each damaged file."""
    with open_corpus(directory) as corpus:
        with pytest.warns(DamagedPartitionWarning, match=r"01\.h5 is damaged"):
            assert ["c-0", "c-2"] == list(corpus)
        assert 2 == len(corpus)  # warnings are errors here: there is one
        assert 3 == len(corpus["c-2"])
        assert 6 == len(corpus.to_frame())
        assert [0, 2] == [info.identity.partition for info in corpus.partitions]
        (damaged,) = corpus.damaged
    assert (directory / "01.h5", CorpusFormatError) == (damaged.path, type(damaged.error))
    assert f"`fiq verify {damaged.path}`" in str(damaged)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            KeyError("Unable to synchronously open object (bad object header version number)"),
            "bad object header version number",
        ),
        (OSError("Can't read data (chunk (3, 4) is missing)"), "chunk (3, 4) is missing"),
        (ValueError("not a valid type"), "not a valid type"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_hdf5_gives_its_reason_only(error: Exception, expected: str) -> None:
    """Without the names of its functions and the quotes of a KeyError."""
    assert f"HDF5 cannot read it ({expected})" == hdf5_says(error)


@pytest.mark.filterwarnings("ignore::fiq.corpus.DamagedPartitionWarning")
def test_a_consultation_that_a_damaged_file_may_hold_is_not_called_unknown(directory: Path) -> None:
    """Neither missing nor there: the error names the file."""
    with open_corpus(directory) as corpus:
        assert "c-2" in corpus
        for look in (lambda: corpus["c-1"], lambda: corpus.get("c-1"), lambda: "c-1" in corpus):
            with pytest.raises(
                DamagedPartitionError, match=r"'c-1' in the files that can be read. .*01\.h5 is damaged"
            ):
                look()


def test_the_warning_is_shown_for_the_line_that_reads(directory: Path) -> None:
    """Whatever the library does in between: a comprehension over generators, or a frame."""
    reads: tuple[Callable[[Corpus], object], ...] = (list, len, lambda corpus: corpus.to_frame())
    for read in reads:
        with open_corpus(directory) as corpus, pytest.warns(DamagedPartitionWarning) as caught:
            read(corpus)
        assert {__file__} == {one.filename for one in caught}
    with open_corpus(directory) as corpus, pytest.warns(DamagedPartitionWarning):
        exec("list(corpus)", {"corpus": corpus})


def test_a_strict_reader_gets_the_error(directory: Path) -> None:
    """So does one of a single file, and one of damaged files only."""
    with open_corpus(directory, strict=True) as corpus, pytest.raises(CorpusFormatError, match=r"01\.h5"):
        list(corpus)
    with open_corpus(directory / "01.h5") as corpus, pytest.raises(CorpusFormatError, match=r"01\.h5"):
        list(corpus)
    for name in ("00.h5", "02.h5"):
        os.truncate(directory / name, 20_000)
    with open_corpus(directory) as corpus, pytest.warns(DamagedPartitionWarning), pytest.raises(CorpusFormatError):
        list(corpus)


def test_a_damaged_index_of_names_leaves_out_its_file_only(directory: Path) -> None:
    """What was read before stays read."""
    content = (directory / "02.h5").read_bytes()
    (directory / "02.h5").write_bytes(content.replace(b"c-2\n" + bytes(64), b"c-2 " + bytes(64)))
    with open_corpus(directory) as corpus:
        with pytest.warns(DamagedPartitionWarning):
            assert ["c-0"] == list(corpus)
        assert ["01.h5", "02.h5"] == [damaged.path.name for damaged in corpus.damaged]


def test_the_commands_name_the_damaged_file_and_fail_at_the_end(directory: Path, tmp_path: Path) -> None:
    """With what is healthy shown and written."""
    run = CliRunner().invoke
    shown = run(app, ["show", "c-2", "--corpus", str(directory)])
    assert 3 == shown.stdout.count("MESSAGE_RECEIVED")
    target = tmp_path / "all.ndjson"
    exported = run(app, ["export", "--all", "--corpus", str(directory), "-o", str(target)])
    assert 6 == len(target.read_text().splitlines())
    missing = run(app, ["show", "c-1", "--corpus", str(directory)])
    for result in (shown, exported, missing):
        assert 1 == result.exit_code
        assert f"{directory / '01.h5'} is damaged" in result.stderr


@pytest.mark.parametrize("journal", [True, False])
def test_a_file_that_is_gone_is_damaged(tmp_path: Path, journal: bool) -> None:
    """Its journal or the index shows that it was there: what is read is known to be incomplete."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(2):
        with EventStore.create(folder / f"0{number}.h5", replace(IDENTITY, partition=number)) as store:
            store.append(f"c-{number}", [record(1)])
            store.commit(1)
            kept = (folder / f"0{number}.h5.wal").read_bytes()  # closing empties it
    if journal:
        (folder / "01.h5.wal").write_bytes(kept)
        why = "its journal 01.h5.wal holds commits"
    else:
        why = "corpus.h5 links it"
        write_index(folder)
        (folder / "01.h5.wal").unlink()
    (folder / "01.h5").unlink()

    with open_corpus(folder) as corpus:
        with pytest.warns(DamagedPartitionWarning, match=f"01.h5 is missing, but {why}"):
            assert ["c-0"] == list(corpus)
        assert [folder / "01.h5"] == [damaged.path for damaged in corpus.damaged]
    with open_corpus(folder, strict=True) as corpus, pytest.raises(CorpusFormatError, match="is missing"):
        list(corpus)
    run = CliRunner().invoke
    listed = run(app, ["ls", "--corpus", str(folder)])
    assert "c-0" in listed.stdout
    for done in (
        listed,
        run(app, ["export", "--all", "--corpus", str(folder)]),
        run(app, ["repack", str(folder), str(tmp_path / "archive")]),
    ):
        assert 1 == done.exit_code
        assert f"01.h5 is missing, but {why}" in " ".join(done.stderr.split())
    assert not (tmp_path / "archive").exists()


# -- Damage within a consultation --------------------------------------------------------------------------------------


def _break_body(file: h5py.File) -> None:
    consultation = file[f"consultations/{VICTIM}"]
    consultation["payload"][int(consultation["events"][1]["offset"])] = ord("x")


def _break_row(file: h5py.File) -> None:
    events = file[f"consultations/{VICTIM}/events"]
    rows = events[:]
    rows["offset"][1] = 10**6
    events[:] = rows


def _break_header(file: h5py.File) -> None:
    place = h5py.h5o.get_info(file[f"consultations/{VICTIM}/events"].id).addr + file.userblock_size
    name = Path(file.filename)
    file.close()
    content = bytearray(name.read_bytes())
    content[place : place + 32] = bytes(32)
    name.write_bytes(content)


@pytest.mark.parametrize(("how", "left"), [(_break_body, 1), (_break_row, 0), (_break_header, 0)])
def test_a_damaged_consultation_does_not_keep_anybody_from_reading_the_others(
    tmp_path: Path, how: Damage, left: int
) -> None:
    """Those in its own file included; it is read up to the damage, and the file is named."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, names in enumerate((("a", VICTIM, "d"), ("e",))):
        with EventStore.create(folder / f"0{number}.h5", replace(IDENTITY, partition=number)) as store:
            for name in names:
                store.append(name, [record(sequence) for sequence in range(1, 4)])
            store.commit(3)
    damage(folder / "00.h5", how)
    read = {name: number for name, number in {"a": 3, VICTIM: left, "d": 3, "e": 3}.items() if number}

    with open_corpus(folder) as corpus:
        with pytest.warns(DamagedPartitionWarning, match=r"00\.h5 is damaged"):
            assert read == corpus.to_frame()["consultation"].value_counts().to_dict()
        assert read == corpus.to_frame()["consultation"].value_counts().to_dict()  # as before, and warned of once
        assert [folder / "00.h5"] == [damaged.path for damaged in corpus.damaged]
        assert 3 == len(corpus["d"].to_frame())
    with open_corpus(folder, strict=True) as corpus, pytest.raises(CorpusFormatError):
        corpus.to_frame()

    run = CliRunner().invoke
    target = tmp_path / "x.csv"
    exported = run(app, ["export", "--all", "--flat", "--corpus", str(folder), "-o", str(target)])
    assert sum(read.values()) == target.read_text().count("MESSAGE_RECEIVED")
    shown = run(app, ["show", VICTIM, "--corpus", str(folder)])
    assert (1, True) == (shown.exit_code, "; `fiq verify` shows what is wrong" in shown.stderr)
    listed = run(app, ["ls", "--json", "--corpus", str(folder)])
    assert {"a", "d", "e"} <= {one["consultation"] for one in json.loads(listed.stdout)}
    failed = [exported] if how is not _break_header else [exported, listed]  # a list reads no bodies
    for result in failed:
        assert 1 == result.exit_code
        assert f"{folder / '00.h5'} is damaged" in result.stderr
        assert "Traceback" not in result.stderr
