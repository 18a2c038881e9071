"""docs/corpus-format.md cannot rot: its examples run, its tables name what the code writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fiq.corpus import EventStore, errors, write_index
from fiq.corpus.format import EVENT_DTYPE
from fiq.corpus.wal.journal import RECORDS_START, USER_BLOCK
from tests.support.corpus import IDENTITY, commit_range

_DOCUMENT = (Path(__file__).parents[3] / "docs" / "corpus-format.md").read_text(encoding="utf-8")
_EXAMPLES = re.findall(r"^```python\n(.*?)^```", _DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", _EXAMPLES)
def test_an_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a directory `corpus`, as analysts have it."""
    pytest.importorskip("pandas")
    directory = tmp_path / "corpus"
    directory.mkdir()
    with EventStore.create(directory / "00.h5", IDENTITY) as store:
        commit_range(store, range(1, 101))
    write_index(directory)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    exec(compile(example, "docs/corpus-format.md", "exec"), variables)
    assert {"frame", "chain"} & variables.keys()


def test_every_field_and_place_is_documented() -> None:
    """Columns, attributes, and the sizes on which other programs rely."""
    for name in [*(EVENT_DTYPE.names or ()), *IDENTITY.__dataclass_fields__, "committed_sequence", "committed_events"]:
        assert f"`{name}`" in _DOCUMENT
    assert f"A row of `events` has {EVENT_DTYPE.itemsize} bytes" in _DOCUMENT
    assert f"({USER_BLOCK} bytes)" in _DOCUMENT
    assert f"| {RECORDS_START} |" in _DOCUMENT


def test_the_tree_of_errors_is_drawn_completely() -> None:
    """errors.py opens with every class that it holds."""
    classes = [name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")]
    assert classes
    assert [] == [name for name in classes if name not in str(errors.__doc__)]
