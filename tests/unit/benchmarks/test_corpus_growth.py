"""The growth benchmark: files of the sizes that its table names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.corpus_growth import CONSULTATIONS, EVENTS, Series, append_batches, fill, table, verify
from fiq.corpus import verify_corpus


@pytest.mark.parametrize("series", [CONSULTATIONS, EVENTS], ids=lambda series: series.name)
def test_the_batches_of_a_step_bring_what_is_missing_to_its_size(series: Series) -> None:
    """The steps before count, and every consultation gets its share."""
    smaller, size = series.sizes[:2]
    shares = Counter[str]()
    for start, stop in ((0, smaller), (smaller, size)):
        for batch in series.batches(start, stop):
            shares.update(dict(batch))
    if series.consultations:
        assert (size, series.consultations) == (shares.total(), len(shares))
    else:
        assert (size, {series.events}) == (len(shares), set(shares.values()))


def test_a_step_measures_a_sound_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one, through all that a row of the table needs."""
    monkeypatch.setattr("benchmarks.corpus_growth._BATCHES", 3)
    series = Series("consultations", sizes=(200, 300), events=2, consultations=0)
    path = tmp_path / "growing.h5"
    for size in series.sizes:
        filled = fill(series, path, size)
        measured = append_batches(path)
        verified = verify(path)
        assert "| consultations | " in table([("consultations", filled, measured, verified)])
    report = verify_corpus(path)
    # three batches of 500 to known and three to new consultations, after each of the two steps
    assert (True, 2 * 300 + 2 * 6 * 500) == (report.clean, report.events)
