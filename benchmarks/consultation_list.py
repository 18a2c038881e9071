"""What does a partition's owner need to list consultations? ``python -m benchmarks.consultation_list``.

The file is built past the store: all names lead to one real consultation, and the pages of ``/names`` are made in
memory, from names in random order. Then a process opens it as a persister does and answers the questions for pages of
100: names, and the summary of each. A cold page is read after the file was dropped from the kernel's cache. Processor
time is shown as well: on a machine that does other work, the rest is waiting for it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from uuid import UUID

import h5py
import numpy as np
import psutil

from fiq.corpus import EventStore, Identity, Record
from fiq.corpus.format import CONSULTATIONS, NAMES
from fiq.corpus.names import PAGE_BYTES, PAGE_DTYPE, NameTree
from services.log.questions import Consultations, ConsultationsAnswer, Summaries, SummariesAnswer
from services.persister.answering import answer_to
from services.persister.rounds import PartitionFile

_IDENTITY = Identity("main", "0b9f6a52-7d83-4c1e-9d6a-52f0c7a9b101", 1, 0, 16, "fi-events", "2026-11-23T10:00:00Z")
_TEMPLATE = "00000000-0000-0000-0000-000000000000"
_PAGE, _ROOM = 100, 1 << 20


class MemoryPages:
    """Pages of a tree in memory."""

    def __init__(self) -> None:
        self.pages: list[bytearray] = []

    def __len__(self) -> int:
        return len(self.pages)

    def read(self, number: int) -> bytes:
        return bytes(self.pages[number]).rstrip(b"\0")

    def write(self, number: int, at: int, data: bytes) -> None:
        self.pages[number][at : at + len(data)] = data

    def add(self, content: bytes) -> int:
        self.pages.append(bytearray(content.ljust(PAGE_BYTES, b"\0")))
        return len(self.pages) - 1


def build(path: Path, count: int) -> None:
    """Make a partition file with *count* consultations, whose ids are UUIDs in random order."""
    with EventStore.create(path, _IDENTITY) as store:
        body = b'{"event_type":"MESSAGE_RECEIVED"}'
        store.append(_TEMPLATE, [Record(n, 10**18 + n, 2, n.to_bytes(16, "big"), body) for n in range(1, 101)])
        store.commit(100)
    chance, pages = random.Random(1), MemoryPages()
    tree = NameTree(pages)
    tree.insert(_TEMPLATE.encode())
    with h5py.File(path, "r+") as file:
        cache = file.id.get_mdc_config()
        cache.set_initial_size, cache.initial_size = True, 128 << 20
        cache.max_size = cache.min_size = 128 << 20
        file.id.set_mdc_config(cache)
        groups = file[CONSULTATIONS].id
        for _ in range(count - 1):
            name = str(UUID(int=chance.getrandbits(128))).encode()
            tree.insert(name)
            groups.links.create_hard(name, groups, _TEMPLATE.encode())
        file[NAMES].resize((len(pages),))
        for first in range(0, len(pages), 1000):
            part = pages.pages[first : first + 1000]
            file[NAMES][first : first + len(part)] = np.array([bytes(page) for page in part], PAGE_DTYPE)


@contextmanager
def _time(times: list[tuple[float, float]]) -> Iterator[None]:
    started = time.perf_counter(), time.process_time()
    yield
    times.append((1000 * (time.perf_counter() - started[0]), 1000 * (time.process_time() - started[1])))


def measure(path: Path) -> None:
    """Open the file, answer questions, and print what that took."""
    process, chance = psutil.Process(), random.Random(2)
    size = path.stat().st_size / 1e6
    _drop_from_cache(path)
    before = process.memory_info().rss
    with EventStore.open(path, expected=None) as store:
        file, opened = PartitionFile(store), process.memory_info().rss
        print(f"{_count(store):,} consultations, {size:,.0f} MB; open: {(opened - before) / 1e6:.1f} MB of memory\n")
        print("| page of 100 | with | cold ms | median ms | processor ms |\n|---|---|---:|---:|---:|")
        for label, prefix, digits in (("first", "", 0), ("from anywhere on", "", 8), ("of a prefix", "p", 4)):
            for summaries in (False, True):
                times: list[tuple[float, float]] = []
                for number in range(101):
                    if not number:
                        _drop_from_cache(path)
                    text = f"{chance.getrandbits(32):08x}"[:digits]
                    with _time(times):
                        _page(file, text if prefix else "", "" if prefix else text, summaries=summaries)
                wall, processor = (median(one) for one in zip(*times[1:], strict=True))
                shown = "summaries" if summaries else "names"
                print(f"| {label} | {shown} | {times[0][0]:.1f} | {wall:.1f} | {processor:.1f} |")
        memory = process.memory_info().rss - opened
        started, listed, after = time.perf_counter(), 0, ""
        while names := _page(file, "", after, limit=1000, summaries=False):
            listed, after = listed + len(names), names[-1]
        seconds = time.perf_counter() - started
        whole = process.memory_info().rss - opened
    print(f"\nMemory for these pages: {memory / 1e6:.1f} MB.")
    print(f"All {listed:,} names: {seconds:.1f} s, {whole / 1e6:.1f} MB.")


def _count(store: EventStore) -> int:
    with store.reading() as lookup:
        return len(lookup)


def _page(file: PartitionFile, prefix: str, after: str, *, limit: int = _PAGE, summaries: bool = True) -> list[str]:
    with file.store.reading() as lookup:
        answer = answer_to(Consultations(prefix, after, limit), file, lookup, _ROOM)
        assert isinstance(answer, ConsultationsAnswer)
        rest = answer.names if summaries else ()
        while rest:
            found = answer_to(Summaries(rest), file, lookup, _ROOM)
            assert isinstance(found, SummariesAnswer)
            rest = found.rest
    return list(answer.names)


def _drop_from_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def main() -> None:
    """Build in a child process, whose memory does not count, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=5_000_000, help="number of consultations")
    parser.add_argument("--folder", type=Path, help="keep the file there, or measure the one that is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fiq-list-") as folder:
        path = Path(options.folder or folder, "00.h5")
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            child = os.fork()
            if not child:
                build(path, options.names)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                sys.exit("the file could not be built")
        measure(path)


if __name__ == "__main__":
    main()
