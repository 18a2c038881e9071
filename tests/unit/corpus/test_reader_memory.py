"""What HDF5 keeps in memory for a reader is bounded, however many consultations a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import pytest

from fiq.corpus import EventStore, StoreOptions, format, open_corpus, reader
from tests.support.corpus import IDENTITY, commit_range


def test_the_metadata_of_many_consultations_does_not_pile_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, HDF5 would let its cache grow to 32 MB, which take half a gigabyte of memory."""
    opened: list[Any] = []
    bound = format.bound_metadata

    def watched(file: Any, size: int) -> None:
        opened.append(file)
        bound(file, size)

    monkeypatch.setattr(reader, "bound_metadata", watched)
    with EventStore.open(path, expected=IDENTITY, options=StoreOptions(open_consultations=50)) as store:
        commit_range(store, range(1, 1501), consultations=1500)
    with open_corpus(path) as corpus:
        assert 1500 == sum(len(consultation) for consultation in corpus.values())
        _assert_bounded(opened[-1])
    assert 1 == len(opened)


def _assert_bounded(file: h5py.File) -> None:
    limit, _, now, _ = file.id.get_mdc_size()
    config = file.id.get_mdc_config()
    assert 2 << 20 == limit == config.max_size
    assert now < 3 << 20
    assert (0, 0) == (config.incr_mode, config.flash_incr_mode)
