"""The acceptance test: real dialogues, twenty clients, retries, six kills."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from services.cli.rehearsal.chaos import Chaos, drained
from services.cli.rehearsal.load import Load, Outcome
from services.cli.rehearsal.verification import verify
from services.cli.stack import Stack
from services.corpus import open_corpus
from services.eventlog.settings import LogSettings
from tests.support.dialogues import consultations
from tests.support.polling import eventually

#: shares of the load after which the leader, or a persister, is killed
LEADER_KILLS = (0.1, 0.4, 0.7)
PERSISTER_KILLS = (0.25, 0.55, 0.85)


@pytest.mark.timeout(420)
async def test_every_accepted_event_is_in_hdf5_once_byte_for_byte_and_in_stream_order(
    start_stack: Callable[..., Stack],
) -> None:
    """G1, G2, G3: while the stream's leader and a persister are killed -9 three times each."""
    stack = await asyncio.to_thread(start_stack)
    dialogues = consultations()
    total = sum(len(posts) for posts in dialogues)
    load = Load(stack.ingest.url, clients=20, repeats=0.05)
    chaos = Chaos(stack)

    async with asyncio.TaskGroup() as group:
        group.create_task(_kill(chaos, load, total))
        outcome = await load.run(dialogues)
    await chaos.recovered()

    assert 6 == len(chaos.killed)
    assert total == len(outcome.accepted)
    settings = LogSettings(servers=tuple(stack.cluster.urls))
    assert await drained(settings, timeout=60)
    verdict = verify(stack.data_dir, outcome.accepted.values())
    assert [] == verdict.summary()
    assert (total, len(dialogues)) == (verdict.persisted, verdict.consultations)

    await asyncio.to_thread(stack.stop)
    _stock_tools_agree(stack.data_dir, outcome)


async def _kill(chaos: Chaos, load: Load, total: int) -> None:
    """Kill leader and persisters in turn, each time when the cluster is whole again: quorum loss is another test."""
    steps = sorted([(share, "leader") for share in LEADER_KILLS] + [(share, "persister") for share in PERSISTER_KILLS])
    for number, (share, what) in enumerate(steps):
        await eventually(lambda share=share: len(load.outcome.accepted) >= share * total, timeout=120)  # type: ignore[misc]
        await chaos.recovered()
        if what == "leader":
            await chaos.kill_leader()
        else:
            await chaos.kill_persister(number % 2)


def _stock_tools_agree(data_dir: Path, outcome: Outcome) -> None:
    """What plain h5py, h5dump and pandas see of the files after an orderly stop is the whole corpus."""
    consultations = {one.post.consultation for one in outcome.accepted.values()}
    events = 0
    with h5py.File(data_dir / "corpus.h5", "r") as index:
        found: set[str] = set()
        for partition in index["partitions"].values():
            for name, group in partition["consultations"].items():
                found.add(name)
                events += len(group["events"])
    assert (consultations, len(outcome.accepted)) == (found, events)

    one = next(iter(outcome.accepted.values())).post.consultation
    with open_corpus(data_dir) as corpus:
        frame = corpus[one].to_frame()
    assert len(frame) == len([a for a in outcome.accepted.values() if a.post.consultation == one])

    h5dump = shutil.which("h5dump")
    if h5dump is None:
        assert "CI" not in os.environ, "CI has hdf5-tools"
        return
    for path in sorted(data_dir.glob("*.h5")):
        subprocess.run([h5dump, "-H", str(path)], check=True, capture_output=True, timeout=60)
