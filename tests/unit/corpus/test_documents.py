"""The documents on the corpus cannot rot: their examples run, their tables name what the code has."""

from __future__ import annotations

import inspect
import re
from itertools import count
from pathlib import Path
from uuid import UUID

import pytest

from fiq.corpus import Corpus, EventRecord, EventStore, Record, errors, write_index
from fiq.corpus.format import EVENT_DTYPE
from fiq.corpus.wal.journal import RECORDS_START, USER_BLOCK
from tests.support.corpus import IDENTITY, commit_range
from tests.support.dialogues import consultations

_DOCS = Path(__file__).parents[3] / "docs"
_FORMAT, _READING = (
    (_DOCS / name).read_text(encoding="utf-8") for name in ("corpus-format.md", "reading-the-corpus.md")
)
_EXAMPLES = re.findall(r"^```python\n(.*?)^```", _FORMAT + _READING, re.MULTILINE | re.DOTALL)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a directory `corpus` with dialogues in the working directory, as analysts have it."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    sequences = count(101)
    with EventStore.create(directory / "00.h5", IDENTITY) as store:
        commit_range(store, range(1, 101))
        for dialogue in consultations()[:20]:
            records = [Record(next(sequences), 10**18, 2, UUID(post.key).bytes, post.body) for post in dialogue]
            store.append(dialogue[0].consultation, records)
        store.commit(next(sequences))
    write_index(directory)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("corpus")
@pytest.mark.parametrize("example", _EXAMPLES)
def test_an_example_runs(example: str) -> None:
    """Each by itself, as it would be copied."""
    pytest.importorskip("pandas")
    variables: dict[str, object] = {}
    exec(compile(example, "docs", "exec"), variables)
    assert {"frame", "chain", "corpus", "ids"} & variables.keys()


def test_the_documents_have_examples() -> None:
    """Without them the test above would test nothing."""
    assert 6 <= len(_EXAMPLES)


def test_every_field_and_place_is_documented() -> None:
    """Columns, attributes, and the sizes on which other programs rely."""
    for name in [*(EVENT_DTYPE.names or ()), *IDENTITY.__dataclass_fields__, "committed_sequence", "committed_events"]:
        assert f"`{name}`" in _FORMAT
    assert f"A row of `events` has {EVENT_DTYPE.itemsize} bytes" in _FORMAT
    assert f"({USER_BLOCK} bytes)" in _FORMAT
    assert f"\n- {RECORDS_START}: records\n" in _FORMAT


def test_what_analysts_call_is_documented() -> None:
    """Each attribute of an event with its type, and each argument of a frame, in a list of its own."""
    attributes, _, frames = _READING.partition("\n## Make a frame\n")
    for name in [name for name in vars(EventRecord) if not name.startswith("_") and name != "id_bytes"]:
        assert re.search(rf"^- `{name}(\(\))?` \([\w ]+\): \S", attributes, re.MULTILINE), name
    for name in [name for name in inspect.signature(Corpus.to_frame).parameters if name != "self"]:
        assert re.search(rf"^- `{name}(=False)?`: \S", frames.partition("\nIts columns:\n")[0], re.MULTILINE), name


def test_the_tree_of_errors_is_drawn_completely() -> None:
    """errors.py opens with every class that it holds."""
    classes = [name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")]
    assert classes
    assert [] == [name for name in classes if name not in str(errors.__doc__)]
