"""HDF5's own tools in other processes read a corpus, also while its writer works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fiq.corpus import EventStore, open_corpus, repack, write_index
from tests.support.corpus import IDENTITY, append_range, commit_range, expected, stock_contents

_STOCK = "import h5py, sys; file = h5py.File(sys.argv[1], sys.argv[2]); print(file.attrs['committed_sequence'])"
_PAGE = Path(__file__).parents[3] / "docs" / "reading-the-corpus.md"
_DOCUMENTED = re.findall(r"^\$ (h5dump .*)$", _PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture
def filled(path: Path) -> Path:
    """A file with the sequences 1 to 200, its journal empty."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 201))
    return path


def test_h5dump_reads_a_file_while_its_writer_works(filled: Path, h5dump: str) -> None:
    """HDF5 1.10, as Debian has it, opens what HDF5 2.0 writes through the journal."""
    with EventStore.open(filled, expected=IDENTITY) as store:
        commit_range(store, range(201, 301))
        header = _run(h5dump, "-H", str(filled))
        rows = _run(h5dump, "-d", "/consultations/c-0003/events", "-c", "1", str(filled))
    assert 'GROUP "c-0003"' in header
    assert 'H5T_STD_U64LE "seq"' in rows
    with open_corpus(filled) as corpus:
        first = next(iter(corpus["c-0003"]))
    # an opaque id is printed in hexadecimal
    assert ":".join(f"{byte:02x}" for byte in first.id_bytes) in rows


def test_h5dump_follows_the_links_of_the_index(filled: Path, h5dump: str) -> None:
    """corpus.h5 opens every partition file."""
    write_index(filled.parent)
    index = str(filled.with_name("corpus.h5"))
    assert 'EXTERNAL_LINK "00"' in _run(h5dump, "-H", index)
    assert "H5T_OPAQUE" in _run(h5dump, "-H", "-d", "/partitions/00/consultations/c-0003/events", index)


def test_stock_tools_read_the_last_checkpoint_while_the_writer_works(path: Path) -> None:
    """Another process opens the file with plain h5py at any time: no lock error, no mark of an open writer."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 11))
        assert store.checkpoint()
        commit_range(store, range(11, 21))
        append_range(store, range(21, 31))
        assert _stock(path, "r").stdout == "10\n"
        assert (10, expected(10)) == stock_contents(path)


def test_a_stock_writer_is_refused_while_the_writer_lives(path: Path) -> None:
    """HDF5 itself wants the exclusive lock for `r+`."""
    with EventStore.open(path, expected=IDENTITY):
        refused = _stock(path, "r+")
    assert refused.returncode != 0
    assert "unable to lock file" in refused.stderr


@pytest.mark.parametrize("command", _DOCUMENTED)
def test_a_documented_command_runs(filled: Path, h5dump: str, command: str) -> None:
    """In the directory that holds `corpus/`, as the page for analysts says."""
    corpus = filled.with_name("corpus")
    corpus.mkdir()
    for file in (filled, filled.with_name("00.h5.wal")):
        file.rename(corpus / file.name)
    write_index(corpus)
    assert "HDF5" in _run(h5dump, *shlex.split(command)[1:], cwd=corpus.parent)


def test_the_page_for_analysts_has_commands() -> None:
    """Without them the test above would test nothing."""
    assert 5 == len(_DOCUMENTED)


def test_h5dump_unpacks_an_archive(filled: Path, h5dump: str) -> None:
    """HDF5 1.10 knows gzip, with which archives are compressed."""
    archive = filled.with_name("archive.h5")
    repack(filled, archive)
    shown = _run(h5dump, "-p", "-d", "/consultations/c-0003/events", "-c", "1", str(archive))
    assert "COMPRESSION DEFLATE" in shown
    assert "c-0003" in shown


def _stock(path: Path, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _STOCK, str(path), mode], capture_output=True, text=True, check=False)


def _run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout
