"""`fiq verify`: what it prints, and its exit code."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fiq.corpus import EventStore
from services.cli.main import app
from services.persister.volume import identity_document, verified
from tests.support import damage as damages
from tests.support.corpus import IDENTITY, commit_range
from tests.support.damage import damage


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A data directory with one partition."""
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        commit_range(store, range(1, 201))
    return tmp_path


def test_a_clean_corpus_is_told_in_one_line(directory: Path) -> None:
    """The exit code is 0."""
    done = CliRunner().invoke(app, ["verify", str(directory)])
    assert 0 == done.exit_code
    assert "clean: 200 events of 7 consultations in 1 file, " in done.stdout
    assert "" == done.stderr


def test_one_is_no_plural(tmp_path: Path) -> None:
    """Of events, consultations and files."""
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        commit_range(store, range(1, 2))
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert "clean: 1 event of 1 consultation in 1 file, " in done.stdout


def test_problems_are_printed_up_to_a_limit(directory: Path) -> None:
    """The exit code is 1; each line names file, consultation and row, and the JSON has all of them."""
    damage(directory / "00.h5", damages.swap_rows)
    done = CliRunner().invoke(app, ["verify", "--limit", "2", str(directory)])
    assert 1 == done.exit_code
    assert "00.h5 c-0003 row 5 (sequence " in done.stdout
    assert "and 5 more; --json has all" in done.stdout
    assert "7 problems: 200 events" in done.stdout
    done = CliRunner().invoke(app, ["verify", "--json", str(directory / "00.h5")])
    assert 1 == done.exit_code
    report = json.loads(done.stdout)
    assert (False, 7, 200) == (report["clean"], len(report["problems"]), report["events"])
    assert "gap" == report["problems"][0]["kind"]


def test_a_corpus_that_is_not_there_is_named(tmp_path: Path) -> None:
    """That is an error as of any command."""
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "missing")])
    assert (1, "") == (done.exit_code, done.stdout)
    assert "there is no corpus" in done.stderr
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert 1 == done.exit_code
    assert "there are no partition files" in done.stderr


def test_the_result_is_recorded_in_a_volume(directory: Path) -> None:
    """When, how many events, and how many problems: the persisters report it, after each run the newest."""
    (directory / "volume.json").write_text(identity_document(IDENTITY.volume, IDENTITY.store))
    (directory / "workers").mkdir()
    assert verified(directory) is None
    CliRunner().invoke(app, ["verify", str(directory)])
    first = verified(directory)
    assert first is not None
    assert (200, 0) == (first.events, first.problems)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first.at)).total_seconds()) < 60
    damage(directory / "00.h5", damages.swap_rows)
    CliRunner().invoke(app, ["verify", str(directory)])
    second = verified(directory)
    assert second is not None
    assert 7 == second.problems


def test_nothing_is_recorded_in_a_copy(directory: Path) -> None:
    """A backup, or a folder of files: it is no volume, and stays as it is."""
    before = sorted(path.name for path in directory.iterdir())
    assert 0 == CliRunner().invoke(app, ["verify", str(directory)]).exit_code
    assert before == sorted(path.name for path in directory.iterdir())


def test_a_volume_that_cannot_be_written_is_verified_all_the_same(directory: Path) -> None:
    """An operator who may only read gets the result, and is told that it is not recorded."""
    (directory / "volume.json").write_text(identity_document(IDENTITY.volume, IDENTITY.store))
    (directory / "workers").mkdir()
    (directory / "verified.json.new").mkdir()
    done = CliRunner().invoke(app, ["verify", str(directory)])
    assert 0 == done.exit_code
    assert "clean: 200 events" in done.stdout
    assert "the result is not recorded" in done.stderr
    assert verified(directory) is None
