"""The owner's answer when it is asked whether a consultation is intact: also of one that HDF5 cannot read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from fiq.corpus import EventStore
from services.log.questions import Verify, VerifyAnswer
from services.persister.answering import answer_to
from services.persister.rounds import PartitionFile
from tests.support import damage as damages
from tests.support.corpus import IDENTITY, commit_range
from tests.support.damage import VICTIM, damage


def asked(path: Path, question: Verify) -> VerifyAnswer:
    """Open the file as a persister does, and ask."""
    with EventStore.open(path, expected=None) as store, store.reading() as lookup:
        answer = answer_to(question, PartitionFile(store), lookup, 1 << 20)
    assert isinstance(answer, VerifyAnswer)
    return answer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        commit_range(store, range(1, 3001), consultations=1)
    return tmp_path / "00.h5"


def test_a_long_consultation_is_answered_in_slices(path: Path) -> None:
    """Each some rows: no question keeps the HDF5 thread from the events of clients."""
    question: Verify | None = Verify("c-0000")
    rows = []
    while question is not None:
        answer = asked(path, question)
        assert ([], 3000, 3000) == (answer.problems, answer.events, answer.committed)
        rows.append(answer.checked.row)
        question = answer.after
    assert 3000 == rows[-1]
    assert len(rows) >= 3
    assert all(later - earlier <= 1024 for earlier, later in zip([0, *rows], rows, strict=False))


@pytest.mark.parametrize("how", [damages.remove_payload, damages.retype_events])
def test_what_hdf5_cannot_read_is_damage_and_ends_the_verification(
    tmp_path: Path, how: Callable[[h5py.File], None]
) -> None:
    """Of this consultation; another one of the file is intact."""
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        commit_range(store, range(1, 201))
    damage(tmp_path / "00.h5", how)
    answer = asked(tmp_path / "00.h5", Verify(VICTIM))
    assert (["unreadable"], None) == ([one.kind for one in answer.problems], answer.after)
    other = asked(tmp_path / "00.h5", Verify("c-0001"))
    assert ([], None, other.events) == (other.problems, other.after, other.checked.row)


def test_a_consultation_that_the_file_does_not_have_is_intact(path: Path) -> None:
    """It has no events in HDF5 yet."""
    answer = asked(path, Verify("never"))
    assert (0, [], None) == (answer.events, answer.problems, answer.after)
