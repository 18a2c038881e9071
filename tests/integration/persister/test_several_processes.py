"""Processes of one volume that start and end at any time: the kernel's locks keep them apart."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from fiq.corpus import EventStore
from services.log.settings import LogSettings
from services.persister.volume import Volume, VolumeContext, Workers
from tests.support.persister import LOG
from tests.support.polling import eventually_sync

_JOIN_AND_WAIT = """
import sys, time
from pathlib import Path
from services.persister.volume import Workers
Workers(Path(sys.argv[1]), sys.argv[2]).join()
print("joined", flush=True)
time.sleep(60)
"""

_OPEN = """
import sys, time
from pathlib import Path
from fiq.corpus import CorpusLockedError, StoreOptions
from services.persister.volume import open_store
from tests.integration.persister.test_several_processes import context
from tests.support.placements import placed
here = context(Path(sys.argv[1]))
while time.time() < float(sys.argv[2]):
    pass
while True:
    try:
        store = open_store(here, placed(2, here.volume.uuid), StoreOptions())
    except CorpusLockedError:
        continue
    store.commit(store.committed + 1)
    store.close()
    break
"""


def context(folder: Path) -> VolumeContext:
    return VolumeContext(Volume.open(folder, "main"), 1, LogSettings(partitions=4), LOG)


def test_a_killed_process_is_not_alive_and_its_file_is_removed(tmp_path: Path) -> None:
    """The kernel releases the lock with the process."""
    directory = tmp_path / "workers"
    us = Workers(directory, "us")
    us.join()
    with subprocess.Popen([sys.executable, "-c", _JOIN_AND_WAIT, str(directory), "it"], stdout=subprocess.PIPE) as it:
        assert it.stdout is not None
        it.stdout.readline()
        assert us.alive() == ["it", "us"]
        it.kill()
        it.wait()
    eventually_sync(lambda: us.alive() == ["us"])
    assert [path.name for path in directory.iterdir()] == ["us.lock"]
    us.leave()


def test_processes_that_open_a_new_file_take_turns(tmp_path: Path) -> None:
    """None fails, none begins the file again."""
    here = context(tmp_path)
    EventStore.create(here.volume.file(2), here.expected(2, 1)).close()
    command = [sys.executable, "-c", _OPEN, str(tmp_path), str(time.time() + 2)]
    root = Path(__file__).parents[3]
    processes = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=30)
        assert (0, b"") == (process.returncode, errors)
    store = EventStore.open(here.volume.file(2), expected=here.expected(2, 1))
    assert store.committed == 3
    store.close()
