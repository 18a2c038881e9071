"""A stream that was lost and restored from its own backup: what docs/operations.md says of it."""

from __future__ import annotations

from pathlib import Path

from services.log.jetstream.stream import STREAM
from tests.support.persisters import Log, Persister, persisted
from tests.support.polling import eventually
from tests.support.snapshots import back_up, restore


async def test_a_restored_stream_is_a_new_one_and_gets_a_new_data_directory(log: Log, tmp_path: Path) -> None:
    """It has the old sequences and another creation time: what it gets next has sequences that the old corpus holds for
    other events, so the old files are refused, and a new data directory takes everything that the stream has."""
    old, new = tmp_path / "old", tmp_path / "new"
    with Persister(tmp_path / "a", log.cluster, old) as persister:
        await persister.ready()
        saved = await log.publish(20)
        await persisted(old, saved)
        backup = await back_up(log.nc, STREAM)
        lost = await log.publish(20)
        await persisted(old, saved, lost)
        assert 0 == await persister.end()
    await log.api.request(f"STREAM.DELETE.{STREAM}")
    await restore(log.nc, backup)

    async def restored() -> bool:
        info = await log.api.stream_info(STREAM)
        assert info is not None
        assert log.identity.created != info["created"]
        return bool(info["state"]["last_seq"] == 20)

    await eventually(restored)
    after = await log.publish(30)  # sequences 21 to 50: the old corpus has other events up to 40
    with Persister(tmp_path / "b", log.cluster, old) as persister:
        await persister.not_ready("the stream was deleted and created anew")
        assert 0 == await persister.end()
    await persisted(old, saved, lost)

    # the bucket still has the old keys: they name the old stream, so they do not count
    with Persister(tmp_path / "c", log.cluster, new) as persister:
        await persister.ready()
        await persisted(new, saved, after)
        assert 0 == await persister.end()
