"""The sorted names of a partition file: pages that grow, whatever the order in which names come."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.corpus import CorpusFormatError, EventStore, open_corpus
from fiq.corpus.names import PAGE_BYTES, PAGE_DTYPE, DatasetPages, NameTree, create_names
from tests.support.corpus import IDENTITY, record


class MemoryPages:
    """Pages in memory, which count how many were read."""

    def __init__(self) -> None:
        self.pages: list[bytes] = []
        self.reads = 0

    def __len__(self) -> int:
        return len(self.pages)

    def read(self, number: int) -> bytes:
        self.reads += 1
        return self.pages[number].rstrip(b"\0")

    def write(self, number: int, at: int, data: bytes) -> None:
        page = self.pages[number]
        self.pages[number] = page[:at] + data + page[at + len(data) :]
        assert PAGE_BYTES == len(self.pages[number])

    def add(self, content: bytes) -> int:
        self.pages.append(content.ljust(PAGE_BYTES, b"\0"))
        assert PAGE_BYTES == len(self.pages[-1])
        return len(self.pages) - 1


@pytest.fixture
def pages() -> MemoryPages:
    return MemoryPages()


def filled(pages: MemoryPages, names: list[str]) -> NameTree:
    tree = NameTree(pages)
    for name in names:
        tree.insert(name.encode())
    return tree


def listed(names: Iterator[bytes]) -> list[str]:
    return [name.decode() for name in names]


NAMES = st.lists(st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True), unique=True, max_size=300)


@given(NAMES, st.text("-09AZ_az", max_size=5))
def test_names_come_sorted_from_any_place_on(names: list[str], start: str) -> None:
    """Names that begin like others, and the longest ones, too."""
    tree = filled(MemoryPages(), names)
    assert sorted(names) == listed(tree.scan())
    assert sorted(name for name in names if name >= start) == listed(tree.scan(start.encode()))


@pytest.mark.parametrize("kind", ["random", "rising", "falling", "long"])
def test_a_tree_of_several_levels_holds_every_name(pages: MemoryPages, kind: str) -> None:
    """Leaves and inner pages are split, the root several times."""
    names = [f"{'x' * 100 if kind == 'long' else 'c-'}{number:08d}" for number in range(30_000)]
    if kind in {"random", "long"}:
        random.Random(7).shuffle(names)
    tree = filled(pages, names[::-1] if kind == "falling" else names)
    names.sort()
    assert names == listed(tree.scan())
    for number in (0, 1, 15_000, 29_999):
        assert names[number : number + 3] == listed(islice(tree.scan(names[number].encode()), 3))


def test_names_that_rise_leave_full_pages(pages: MemoryPages) -> None:
    """As ids with a time do."""
    names = [f"2026-11-27-{number:08d}" for number in range(20_000)]
    filled(pages, names)
    assert len(pages) <= 1.1 * sum(len(name) + 1 for name in names) / PAGE_BYTES


def test_a_page_of_names_reads_few_pages_of_the_tree(pages: MemoryPages) -> None:
    """From the beginning, from the middle and for a prefix: the height of the tree, and what is shown."""
    names = [f"{number * 2_654_435_761 % 2**32:08x}-{number:06d}" for number in range(100_000)]
    tree = filled(pages, names)
    for start in (b"", b"8", b"ffffff"):
        pages.reads = 0
        assert 101 >= len(list(islice(tree.scan(start), 101)))
        assert pages.reads <= 6


@pytest.mark.parametrize("content", [b"a 0\n", b"a 99\n", b"a x\n", b"a -1\n", b" 1\n", b"ab"])
def test_a_damaged_page_is_an_error_and_no_endless_walk(pages: MemoryPages, content: bytes) -> None:
    """A page that leads to itself, to none, or is cut off."""
    pages.add(b" 1\n")
    pages.add(content)
    with pytest.raises(CorpusFormatError, match="index of names is damaged"):
        list(NameTree(pages).scan())


def test_pages_are_the_same_through_hdf5_as_past_it(tmp_path: Path) -> None:
    """Archives are written through HDF5, partition files past it."""
    names = [f"c-{number * 7919 % 10_007}" for number in range(1, 3_001)]
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        for sequence, name in enumerate(names, 1):
            store.append(name, [record(sequence)])
            if not sequence % 500:
                store.commit(sequence)
    with h5py.File(tmp_path / "other.h5", "w") as other, h5py.File(tmp_path / "00.h5") as file:
        tree = NameTree(DatasetPages(create_names(other.id, b"names")))
        for name in names:
            tree.insert(name.encode())
        assert PAGE_DTYPE == file["names"].dtype
        assert file["names"][:].tolist() == other["names"][:].tolist()

    with open_corpus(tmp_path) as corpus:
        assert sorted(names) == list(corpus)
        assert sorted(name for name in names if name.startswith("c-99")) == list(corpus.ids("c-99"))
        assert sorted(name for name in names if name > "c-5") == list(corpus.ids(after="c-5"))


def test_names_that_were_not_committed_are_gone(tmp_path: Path) -> None:
    """Index and groups are one commit."""
    path = tmp_path / "00.h5"
    store = EventStore.create(path, IDENTITY)
    for sequence in range(1, 1001):
        store.append(f"kept-{sequence}", [record(sequence)])
    store.commit(1000)
    for sequence in range(1001, 1501):
        store.append(f"lost-{sequence}", [record(sequence)])
    store.abandon()
    with EventStore.open(path, expected=IDENTITY) as store, store.reading() as lookup:
        assert sorted(f"kept-{sequence}" for sequence in range(1, 1001)) == list(lookup.names())
        assert 1000 == len(lookup)
