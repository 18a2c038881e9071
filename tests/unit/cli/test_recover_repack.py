"""`fiq recover` and `fiq repack`: what they print, and their exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fiq.corpus import EventStore
from services.cli.main import app
from tests.support import damage as damages
from tests.support.corpus import IDENTITY, commit_range
from tests.support.damage import damage


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A partition file whose commits only its journal holds."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    store = EventStore.create(directory / "00.h5", IDENTITY)
    for start in (1, 51):
        commit_range(store, range(start, start + 50))
    store.abandon()
    return directory / "00.h5"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_recover_prints_what_it_replayed(file: Path) -> None:
    """For a directory and for one file; the second time there is nothing left."""
    done = run("recover", file.parent)
    assert (0, "") == (done.exit_code, done.stderr)
    assert ["00.h5", "100", "2", "0", "complete"] == done.stdout.splitlines()[1].split()
    done = run("recover", file)
    assert ["00.h5", "100", "0", "0", "complete"] == done.stdout.splitlines()[1].split()


def test_recover_says_that_a_writer_lives(file: Path) -> None:
    """And exits with 1."""
    with EventStore.open(file, expected=None):
        done = run("recover", file.parent)
    assert (1, "") == (done.exit_code, done.stdout)
    assert "another process writes 00.h5" in done.stderr
    assert "there is nothing to do" in done.stderr


def test_recover_says_once_that_a_writer_lives(file: Path) -> None:
    """Naming all of its files: sixteen times the same sentence hides anything else."""
    other = file.with_name("01.h5")
    with EventStore.open(file, expected=None), EventStore.create(other, replace(IDENTITY, partition=1)):
        done = run("recover", file.parent)
    assert 1 == done.exit_code
    assert "another process writes 00.h5: " in done.stderr
    assert "(and so for 01.h5)" in done.stderr
    assert 1 == done.stderr.count("there is nothing to do")


def test_recover_of_one_bad_file_recovers_the_others(file: Path) -> None:
    """The exit code is 1, and the bad one is named."""
    file.with_name("01.h5").write_bytes(b"x" * 20_000)
    done = run("recover", file.parent)
    assert 1 == done.exit_code
    assert "00.h5" in done.stdout
    assert "01.h5 has no journal" in done.stderr


def test_repack_prints_both_sizes(file: Path) -> None:
    """The archive is verified like any corpus."""
    target = file.parent.with_name("archive")
    done = run("repack", file.parent, target)
    assert (0, "") == (done.exit_code, done.stderr)
    assert ["00.h5", "7", "100"] == done.stdout.splitlines()[1].split()[:3]
    assert "equal to the original" in done.stdout
    done = run("verify", target)
    assert 0 == done.exit_code
    assert "archive" in done.stdout.splitlines()[1]


def test_repack_writes_another_format_for_small_readers(file: Path) -> None:
    """The superblock is at the beginning, where such readers look for it."""
    target = file.parent.with_name("archive")
    assert 0 == run("repack", file.parent, target, "--format", "1.8").exit_code
    assert (target / "00.h5").read_bytes().startswith(b"\x89HDF")
    assert 0 == run("verify", target).exit_code


def test_repack_refuses_a_damaged_corpus_and_an_existing_target(file: Path) -> None:
    """One message says why; no file is left."""
    done = run("repack", file.parent, file.parent)
    assert 1 == done.exit_code
    assert "exists" in done.stderr
    EventStore.open(file, expected=None).close()
    damage(file, damages.change_body)
    target = file.parent.with_name("archive")
    done = run("repack", file.parent, target)
    assert (1, "") == (done.exit_code, done.stdout)
    assert "00.h5 has a problem, so nothing was archived: 00.h5 c-0003 row 5" in done.stderr
    assert not target.exists()


@pytest.mark.parametrize("arguments", [("recover",), ("repack",), ("repack", "corpus")])
def test_places_are_named_explicitly(arguments: tuple[str, ...]) -> None:
    """Commands that write take no place from the environment."""
    assert 2 == run(*arguments).exit_code


@pytest.mark.parametrize("arguments", [("recover", "missing"), ("repack", "missing", "archive")])
def test_a_corpus_that_is_not_there_is_named(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is an error as of any command."""
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert 1 == done.exit_code
    assert "there is no corpus at missing" in done.stderr


def test_recover_and_repack_print_json_for_scripts(file: Path, tmp_path: Path) -> None:
    """The numbers of the table, in bytes and without units."""
    recovered = json.loads(run("recover", file.parent, "--json").stdout)
    repacked = json.loads(run("repack", file.parent, tmp_path / "copy", "--json").stdout)

    assert [("00.h5", 100, 2, 0, "")] == [tuple(one.values()) for one in recovered]
    assert [("00.h5", 100)] == [(one["file"], one["events"]) for one in repacked]
    assert (tmp_path / "copy" / "00.h5").stat().st_size == repacked[0]["bytes_after"]
