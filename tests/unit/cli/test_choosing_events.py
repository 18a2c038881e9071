"""`fiq ls` and `fiq export` on a corpus: what is chosen, where it goes, and what is said."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from fiq.corpus import EventStore, Record
from services.cli.corpus import SUFFIXES, Format
from services.cli.main import app
from tests.support.corpus import IDENTITY

#: consultation, type, and when it was received, hours after midnight, 2026-11-23; by sequence, from 1
EVENTS = (
    ("ward-7-a", "MESSAGE_RECEIVED", 8),
    ("ward-7-a", "NOTE", 9),
    ("ward-8-b", "MESSAGE_RECEIVED", 10),
    ("ward-7-c", "MESSAGE_RECEIVED", 11),
    ("ward-7-a", "MESSAGE_RECEIVED", 12),
)
MIDNIGHT_NS = 1_795_392_000 * 10**9
HOUR_NS = 3600 * 10**9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two partitions with the events above."""
    directory = tmp_path_factory.mktemp("corpus")
    for number, names in enumerate((("ward-7-a",), ("ward-8-b", "ward-7-c"))):
        store = EventStore.create(directory / f"0{number}.h5", IDENTITY)
        for sequence, (consultation, event_type, hour) in enumerate(EVENTS, start=1):
            if consultation in names:
                body = json.dumps({"event_type": event_type, "payload": {"n": sequence}}).encode()
                received = MIDNIGHT_NS + hour * HOUR_NS
                store.append(consultation, [Record(sequence, received, 2, sequence.to_bytes(16, "little"), body)])
        store.commit(len(EVENTS))
        store.close()
    return directory


def run(corpus: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--corpus", str(corpus)])


def sequences(result: Result) -> list[int]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line)["sequence"] for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--all"], [1, 2, 5, 4, 3]),
        (["--prefix", "ward-7-"], [1, 2, 5, 4]),
        (["ward-7-a"], [1, 2, 5]),
        (["--all", "--type", "NOTE"], [2]),
        (["ward-7-a", "--type", "MESSAGE_RECEIVED"], [1, 5]),
        (["--all", "--since", "2026-11-23T10:00:00Z"], [5, 4, 3]),
        (["--all", "--since", "2026-11-23T09:00:00Z", "--until", "2026-11-23T11:00:00Z"], [2, 3]),
        (["--all", "--until", "2026-11-23"], []),
        (["--all", "--after", "3"], [5, 4]),
        (["ward-7-a", "--after", "1"], [2, 5]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_events_are_chosen_by_consultation_type_time_and_sequence(
    corpus: Path, options: list[str], expected: list[int]
) -> None:
    """Consultation after consultation, each in stream order."""
    assert expected == sequences(run(corpus, "export", *options))


@pytest.mark.parametrize("arguments", [[], ["ward-7-a", "--all"], ["ward-7-a", "--prefix", "ward"]])
def test_one_consultation_or_several_have_to_be_chosen(corpus: Path, arguments: list[str]) -> None:
    """All of a corpus is a lot: it has to be asked for."""
    done = run(corpus, "export", *arguments)
    assert (2, "") == (done.exit_code, done.stdout)
    assert "name one consultation, or choose several with --all or --prefix" in done.stderr


def read(path: Path, form: Format) -> int:
    """Return the number of events in a file, which is of *form*."""
    if form is Format.PARQUET:
        return int(pq.read_metadata(path).num_rows)
    text = path.read_text(encoding="utf-8")
    if form is Format.CSV:
        assert text.startswith("\ufeffconsultation,")
        return text.count("\n") - 1
    return len(json.loads(text)) if form is Format.JSON else len(text.splitlines())


@pytest.mark.parametrize(("suffix", "form"), SUFFIXES.items())
def test_the_suffix_of_the_file_chooses_the_format(corpus: Path, tmp_path: Path, suffix: str, form: Format) -> None:
    """What was written is said, on stderr; the file is for its owner only."""
    path = tmp_path / f"x{suffix}"

    done = run(corpus, "export", "--all", "-o", path)

    assert (0, "") == (done.exit_code, done.stdout)
    assert done.stderr.startswith(f"wrote 5 events of 3 consultations to {path} ({form}, ")
    assert 5 == read(path, form)
    assert 0o600 == path.stat().st_mode & 0o777
    assert [path] == list(tmp_path.iterdir())


def test_the_option_comes_before_the_suffix(corpus: Path, tmp_path: Path) -> None:
    """And a file without one is NDJSON."""
    assert "(json, " in run(corpus, "export", "--all", "-f", "json", "-o", tmp_path / "x.csv").stderr
    assert "(csv, " in run(corpus, "export", "--all", "-f", "csv", "-o", tmp_path / "x.txt").stderr
    assert "(ndjson, " in run(corpus, "export", "ward-8-b", "-o", tmp_path / "x").stderr


@pytest.mark.parametrize("name", ["x.xlsx", "x.tsv", "x.csv.gz"])
def test_a_suffix_of_another_format_is_refused(corpus: Path, tmp_path: Path, name: str) -> None:
    """No program could open such a file."""
    done = run(corpus, "export", "--all", "-o", tmp_path / name)
    assert (2, []) == (done.exit_code, list(tmp_path.iterdir()))
    assert "is none of .ndjson, .jsonl, .json, .csv, .parquet: rename it, or choose with --format" in done.stderr


def test_a_file_is_replaced_only_with_force(corpus: Path, tmp_path: Path) -> None:
    """It may be somebody's work."""
    path = tmp_path / "x.csv"
    path.write_text("mine")

    refused = run(corpus, "export", "--all", "-o", path)
    kept = path.read_text()
    forced = run(corpus, "export", "--all", "-o", path, "--force")

    assert (1, "mine") == (refused.exit_code, kept)
    assert f"{path} exists: name another file, or replace it with --force" in refused.stderr
    assert (0, 5) == (forced.exit_code, read(path, Format.CSV))


def test_a_failed_export_keeps_the_file_that_was_there(corpus: Path, tmp_path: Path) -> None:
    """Even with --force: the new one appears when it is complete."""
    path = tmp_path / "x.csv"
    path.write_text("mine")

    done = run(corpus, "export", "unknown", "-o", path, "--force")

    assert (1, "mine", [path]) == (done.exit_code, path.read_text(), list(tmp_path.iterdir()))


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [(["-f", "parquet"], "-o FILE.parquet"), (["--flat"], "--flat is for csv and parquet")],
)
def test_what_a_format_cannot_do_is_said(corpus: Path, arguments: list[str], advice: str) -> None:
    """Parquet is written from its end, and the JSON forms are exact."""
    done = run(corpus, "export", "--all", *arguments)
    assert (2, "", True) == (done.exit_code, done.stdout, advice in done.stderr)


def test_parquet_without_its_extra_says_what_to_install(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no file."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    done = run(corpus, "export", "--all", "-o", tmp_path / "x.parquet")
    assert (1, []) == (done.exit_code, list(tmp_path.iterdir()))
    assert "pip install 'fiq[services,parquet]'" in done.stderr


def listed(corpus: Path, *options: str) -> Any:
    done = run(corpus, "ls", "--json", *options)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_ls_shows_events_and_times_of_each_consultation(corpus: Path) -> None:
    """Sorted by id, across partitions; one line each, which fits 80 columns with ids of up to 28 characters."""
    done = run(corpus, "ls")

    assert [
        "  events  first (UTC)          last (UTC)           consultation",
        "       3  2026-11-23 08:00:00  2026-11-23 12:00:00  ward-7-a",
        "       1  2026-11-23 11:00:00  2026-11-23 11:00:00  ward-7-c",
        "       1  2026-11-23 10:00:00  2026-11-23 10:00:00  ward-8-b",
    ] == done.stdout.splitlines()
    assert {
        "consultation": "ward-7-a",
        "events": 3,
        "first": "2026-11-23T08:00:00.000000Z",
        "last": "2026-11-23T12:00:00.000000Z",
    } == listed(corpus)[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--prefix", "ward-7"], ["ward-7-a", "ward-7-c"]),
        (["--since", "2026-11-23T11:00:00Z"], ["ward-7-a", "ward-7-c"]),
        (["--since", "2026-11-23T09:00:00Z", "--until", "2026-11-23T10:00:00Z"], ["ward-7-a"]),
        (["--since", "2026-11-23T10:00:00Z", "--until", "2026-11-23T11:00:00Z"], ["ward-8-b"]),
        (["--prefix", "elsewhere"], []),
    ],
    ids=lambda value: " ".join(value),
)
def test_ls_chooses_by_prefix_and_time(corpus: Path, options: list[str], expected: list[str]) -> None:
    """By time those that have an event in it, not only before and after it."""
    assert expected == [one["consultation"] for one in listed(corpus, *options)]


def test_ls_lists_what_is_healthy_and_names_a_damaged_file(corpus: Path, tmp_path: Path) -> None:
    """With exit code 1: the list may lack some."""
    shutil.copytree(corpus, tmp_path / "corpus")
    damaged = tmp_path / "corpus" / "01.h5"
    damaged.write_bytes(b"damaged")

    done = run(tmp_path / "corpus", "ls")

    assert 1 == done.exit_code
    assert ["ward-7-a"] == [line.split()[-1] for line in done.stdout.splitlines()[1:]]
    assert f"{damaged} is damaged" in done.stderr


# -- fiq show ----------------------------------------------------------------------------------------------------------


def test_show_keeps_all_digits_of_an_integer(tmp_path: Path) -> None:
    """Beyond 64 bits, too: it may be a patient's number."""
    body = '{"event_type": "NOTE", "payload": {"n": 12345678901234567890123, "text": "é", "dose": 0.5}}'
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        store.append("c-1", [Record(1, MIDNIGHT_NS, 2, bytes(16), body.encode())])
        store.commit(1)
    done = run(tmp_path, "show", "c-1")
    assert (0, '{"n":12345678901234567890123,"text":"é","dose":0.5}') == (done.exit_code, done.stdout.split()[-1])
