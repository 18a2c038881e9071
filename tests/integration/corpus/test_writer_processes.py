"""A writer in a process of its own: read, verified and killed while it works, and raced by others."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from multiprocessing.queues import Queue
from pathlib import Path

from fiq.corpus import CorpusError, EventStore, recover_partition, verify_corpus
from tests.support.corpus import IDENTITY, expected, read_contents, stock_contents

#: commits as often as each line of its input says
_ON_DEMAND = """
import sys
from pathlib import Path
from fiq.corpus import EventStore, StoreOptions
from tests.support.corpus import commit_range

with EventStore.open(Path(sys.argv[1]), expected=None, options=StoreOptions(checkpoint_bytes=100_000)) as store:
    for line in sys.stdin:
        for _ in range(int(line)):
            commit_range(store, range(store.committed + 1, store.committed + 21))
            store.maybe_checkpoint()
        print(store.committed, flush=True)
"""

#: commits without a pause
_ENDLESS = """
import sys
from pathlib import Path
from fiq.corpus import EventStore
from tests.support.corpus import commit_range

with EventStore.open(Path(sys.argv[1]), expected=None) as store:
    while True:
        commit_range(store, range(store.committed + 1, store.committed + 21), 40)
        print(store.committed, flush=True)
"""

#: commits and makes checkpoints without a pause
_WITH_CHECKPOINTS = """
import sys
from pathlib import Path
from fiq.corpus import EventStore, StoreOptions
from tests.support.corpus import commit_range

with EventStore.open(Path(sys.argv[1]), expected=None, options=StoreOptions(checkpoint_bytes=100_000)) as store:
    while True:
        commit_range(store, range(store.committed + 1, store.committed + 21), 40)
        store.maybe_checkpoint()
        print(store.committed, flush=True)
"""


def test_of_processes_that_create_the_same_file_one_wins(tmp_path: Path) -> None:
    """The others learn that it exists, or that it is being written."""
    context = multiprocessing.get_context("spawn")
    results: Queue[str] = context.Queue()
    racers = [context.Process(target=_create, args=(tmp_path / "00.h5", results)) for _ in range(3)]
    for racer in racers:
        racer.start()
    outcomes = sorted(results.get(timeout=30) for _ in racers)
    for racer in racers:
        racer.join(30)
        racer.close()
    results.close()
    results.join_thread()
    assert outcomes == ["CorpusExistsError", "CorpusExistsError", "created"]
    EventStore.open(tmp_path / "00.h5", expected=IDENTITY).close()


def test_a_reader_in_another_process_follows_a_working_writer(path: Path) -> None:
    """Whatever the writer acknowledged is there at once, through commits and checkpoints."""
    writer = subprocess.Popen(
        [sys.executable, "-c", _ON_DEMAND, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    with writer:
        for commits in (1, 3, 1, 5, 2):
            writer.stdin.write(f"{commits}\n")
            writer.stdin.flush()
            committed = int(writer.stdout.readline())
            assert expected(committed) == read_contents(path)
            # this one reads while commits and checkpoints go on
            writer.stdin.write("15\n")
            writer.stdin.flush()
            seen = sum(map(len, read_contents(path).values()))
            assert committed <= seen
            assert seen % 20 == 0
            writer.stdout.readline()
        writer.stdin.close()
        assert writer.wait(30) == 0


def test_a_live_corpus_is_verified_while_its_writer_commits(path: Path) -> None:
    """Each verification sees a whole commit, at least the one before it; the writer is not stopped."""
    writer = subprocess.Popen([sys.executable, "-c", _WITH_CHECKPOINTS, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    try:
        seen = 0
        for _ in range(15):
            committed = next(number for number in map(int, writer.stdout) if number > seen)
            report = verify_corpus(path)
            assert () == report.problems
            assert committed <= report.events == report.partitions[0].committed
            seen = report.events
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.communicate()
    assert verify_corpus(path).clean


def test_what_a_killed_writer_committed_is_in_the_file_afterwards(path: Path) -> None:
    """After kill -9 stock tools see all of it, and verification finds nothing wrong, before and after."""
    # given
    writer = subprocess.Popen([sys.executable, "-c", _ENDLESS, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(10)][-1]
    writer.kill()
    acknowledged = max([acknowledged, *(int(line) for line in writer.communicate()[0].splitlines())])
    assert verify_corpus(path).clean
    # when
    recovered = recover_partition(path)
    # then
    assert recovered.committed in (acknowledged, acknowledged + 20)
    assert recovered.committed // 20 == recovered.replayed
    assert "" == recovered.held_back
    assert (recovered.committed, expected(recovered.committed, 40)) == stock_contents(path)
    report = verify_corpus(path)
    assert (True, recovered.committed, 0) == (report.clean, report.events, report.partitions[0].journal_records)


def _create(path: Path, results: Queue[str]) -> None:
    try:
        EventStore.create(path, IDENTITY).close()
        results.put("created")
    except CorpusError as error:
        results.put(type(error).__name__)
