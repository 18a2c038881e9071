"""The acceptance test: real dialogues, twenty clients, retries, six kills."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import h5py
import pytest

from fiq.corpus import open_corpus, verify_corpus
from fiq.event import decode
from services.cli.demo import Chaos, Load, LoadResult, compare_corpus, wait_until_persisted
from services.cli.embedded.stack import Stack
from services.cli.target import connected
from services.log.jetstream.stream import STREAM
from services.log.settings import LogSettings
from tests.support.dialogues import consultations
from tests.support.polling import eventually

#: shares of the load after which something is killed, the leader first and then in turn with a persister
KILLS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
#: share of the load that clients may post beyond a kill before everything is whole again: so each kill hits a load
BEYOND = 0.1
#: share of the events that clients send again after their 202
REPEATS = 0.05


@pytest.mark.timeout(600)
async def test_every_accepted_event_is_in_hdf5_once_byte_for_byte_and_in_stream_order(
    start_stack: Callable[..., Stack],
) -> None:
    """G1, G2, G3: while the stream's leader and a persister are killed -9 three times each."""
    stack = await asyncio.to_thread(start_stack)
    dialogues = consultations()
    total = sum(len(posts) for posts in dialogues)
    load = Load(stack.ingest.url, clients=20, repeats=REPEATS)
    chaos = Chaos(stack)

    async with asyncio.TaskGroup() as group:
        group.create_task(_kill(chaos, load, total))
        outcome = await load.run(dialogues)
    await chaos.recovered()

    killed = [name.partition(", ")[2] or name for name in chaos.killed]
    assert 3 * ["the stream's leader"] == killed[::2]
    assert {"persister-1", "persister-2"} == set(killed[1::2])
    assert total == len(outcome.accepted)
    assert 0.6 * REPEATS * total < outcome.repeated <= outcome.duplicates
    settings = LogSettings(servers=tuple(stack.cluster.urls))
    assert await wait_until_persisted(stack.data_dir, len(outcome.accepted), timeout=60)
    verdict = compare_corpus(stack.data_dir, outcome.accepted.values())
    assert [] == verdict.summary()
    assert (total, len(dialogues)) == (verdict.persisted, verdict.consultations)
    assert await _in_stream_order(settings) == _in_hdf5(stack.data_dir)
    assert verify_corpus(stack.data_dir).clean

    await asyncio.to_thread(stack.stop)
    _stock_tools_agree(stack.data_dir, outcome)


async def _kill(chaos: Chaos, load: Load, total: int) -> None:
    """Kill leader and persisters in turn, each time when the cluster is whole again: quorum loss is another test."""
    for number, share in enumerate(KILLS):
        await chaos.recovered()
        load.allow((share + BEYOND) * total)
        await eventually(lambda share=share: len(load.result.accepted) >= share * total, timeout=120)  # type: ignore[misc]
        assert len(load.result.accepted) < (share + BEYOND) * total
        if number % 2 == 0:
            await chaos.kill_leader()
        else:
            await chaos.kill_persister(number // 2 % 2)
    load.allow(total)


async def _in_stream_order(settings: LogSettings) -> dict[str, list[tuple[UUID, int, bytes]]]:
    """Return the events that the stream holds, each where its id stands first."""
    found: dict[str, dict[UUID, tuple[UUID, int, bytes]]] = {}
    async with connected(settings) as connection:
        js = connection.jetstream()
        last = (await js.stream_info(STREAM)).state.last_seq
        messages = await js.subscribe("fi.events.>", stream=STREAM, ordered_consumer=True)
        sequence = 0
        while sequence < last:
            message = await messages.next_msg(timeout=30)
            sequence = message.metadata.sequence.stream
            event = decode(message.subject.rpartition(".")[2], message.headers, message.data)
            consultation = found.setdefault(event.consultation, {})
            consultation.setdefault(event.event_id, (event.event_id, sequence, event.body))
    return {name: list(events.values()) for name, events in found.items()}


def _in_hdf5(data_dir: Path) -> dict[str, list[tuple[UUID, int, bytes]]]:
    with open_corpus(data_dir) as corpus:
        return {name: [(one.event_id, one.sequence, one.raw) for one in corpus[name]] for name in corpus}


def _stock_tools_agree(data_dir: Path, outcome: LoadResult) -> None:
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
        if "CI" in os.environ:
            pytest.fail("CI has hdf5-tools")
        pytest.skip("there is no h5dump; everything else was shown")
    for path in sorted(data_dir.glob("*.h5")):
        subprocess.run([h5dump, "-H", str(path)], check=True, capture_output=True, timeout=60)
