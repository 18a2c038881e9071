"""`fiq doctor` on a real cluster: what is broken on purpose is found, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import h5py
import orjson
import pytest
from nats.js.api import Header
from typer.testing import CliRunner

from services.cli.doctor.command import Installation, examine
from services.cli.embedded.processes import LOOPBACK, Cluster
from services.cli.main import app
from services.cli.target import Target
from services.log.findings import Finding, Level
from services.log.jetstream.placement import BucketPlacements
from services.log.settings import LogSettings
from services.persister.volume import note_backup
from tests.support.cluster import delete_streams, heal
from tests.support.persisters import PARTITIONS, Log, Persister, persisted, provisioned
from tests.support.polling import eventually


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    """Three nodes with fresh streams."""
    async with provisioned(fresh_log) as made:
        yield made


def patient(log: Log, data: Path | None, settings: LogSettings | None = None, **env: str) -> Installation:
    monitoring = [f"http://{LOOPBACK}:{ports.monitoring}" for ports in log.cluster.ports]
    return Installation(Target(settings or log.settings, None), data, monitoring, {"FI_ALLOW_EPHEMERAL": "1"} | env)


async def findings(one: Installation, *, clock_offset: float = 0.0, held_back: float = 60.0) -> list[Finding]:
    return await asyncio.to_thread(examine, one, clock_offset=clock_offset, held_back=held_back)


def bad(found: list[Finding]) -> list[tuple[str, str]]:
    """Return check and level of what is not fine, without repetition."""
    return sorted({(one.check, one.level.value) for one in found if one.level is not Level.OK})


async def only(one: Installation, check: str, level: str, text: str, *, times: int = 1) -> None:
    """Wait until nothing but *check* is bad, with *text* in each of its findings."""

    async def look() -> bool:
        found = await findings(one)
        assert [(check, level)] == bad(found), [finding for finding in found if finding.level is not Level.OK]
        matching = [finding for finding in found if finding.level is not Level.OK and text in finding.what]
        assert times == len(matching), matching
        assert all(finding.meaning and finding.action for finding in matching)
        return True

    await eventually(look)


async def healthy(one: Installation) -> list[Finding]:
    async def look() -> list[Finding]:
        found = await findings(one)
        assert [] == bad(found), [finding for finding in found if finding.level is not Level.OK]
        return found

    return await eventually(look)


async def test_a_whole_deployment_has_nothing_wrong(log: Log, tmp_path: Path) -> None:
    """Every check says that it looked."""
    with Persister(tmp_path / "a", log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        await persisted(tmp_path / "data", await log.publish(20))
        found = await healthy(patient(log, tmp_path / "data"))
        assert 0 == await persister.end()
    expected = {"versions", "limits", "nodes", "clocks", "sync_interval", "certificates", "stream", "replicas"}
    expected |= {"dead letters", "placement", "persisters", "permissions", "disks", "corpus", "backup"}
    assert expected == {finding.check for finding in found}
    assert 3 == sum(finding.check == "clocks" for finding in found)


async def test_no_stream_no_persister_and_no_claim_are_told_one_after_the_other(log: Log, tmp_path: Path) -> None:
    """What an operator meets who begins at the wrong end."""
    await delete_streams(log.cluster)
    found = await findings(patient(log, None))
    assert [("corpus", "unknown"), ("stream", "error")] == bad(found)
    async with provisioned(log.cluster) as fresh:
        found = [one for one in await findings(patient(fresh, None)) if one.check == "placement"]
    assert ["no persister answers", "no volume has claimed partition 00, 01, 02, 03"] == [one.what for one in found]


async def test_a_volume_that_is_away_is_named_with_its_partitions(log: Log, tmp_path: Path) -> None:
    """Its own host is gone, the other volume's works on."""
    data = [tmp_path / "one", tmp_path / "two"]
    with (
        Persister(tmp_path / "a", log.cluster, data[0], FI_VOLUMES="2") as one,
        Persister(tmp_path / "b", log.cluster, data[1], FI_VOLUMES="2") as two,
    ):
        await one.ready()
        await two.ready()
        await healthy(patient(log, data[0], FI_VOLUMES="2"))
        assert 0 == await two.end()
        uuid = orjson.loads((data[1] / "volume.json").read_bytes())["volume"]
        await only(patient(log, data[0], FI_VOLUMES="2"), "placement", "error", f"volume {uuid} is away")
        assert 0 == await one.end()


async def test_more_partitions_than_a_volumes_share_are_a_warning(log: Log, tmp_path: Path) -> None:
    """FI_VOLUMES is not the same everywhere."""
    with Persister(tmp_path / "a", log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        one = patient(log, tmp_path / "data", FI_VOLUMES="2")
        await only(one, "placement", "warning", f"has {PARTITIONS} partitions")
        assert 0 == await persister.end()


async def test_a_partition_that_stands_still_is_told_with_the_persisters_reason(log: Log, tmp_path: Path) -> None:
    """From the process's own port, and from the directory that lacks the file."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        await persisted(data, await log.publish(20))
        assert 0 == await persister.end()
    for name in ("01.h5", "01.h5.wal"):
        (data / name).unlink()
    with Persister(tmp_path / "b", log.cluster, data) as persister:
        await persister.not_ready("01.h5 is gone")
        found = [one for one in await findings(patient(log, data)) if one.level is Level.ERROR]
        assert 0 == await persister.end()
    assert ["persisters", "corpus"] == [one.check for one in found]
    assert "partition 01 is stopped" in found[0].what
    assert "01.h5 is gone" in found[1].what


async def test_an_old_copy_of_a_partition_file_is_an_error(log: Log, tmp_path: Path) -> None:
    """Its key says that its file had come further: trim may have deleted what lies between."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        await persisted(data, await log.publish(20))
        assert 0 == await persister.end()
    await log.publish(20)
    placements = BucketPlacements(log.nc, log.settings)
    for placement in (await placements.read()).partitions.values():
        await placements.progress(placement, 40)
    found = [one for one in await findings(patient(log, data)) if one.check == "corpus"]
    assert PARTITIONS == sum("its key says that it had reached 40" in one.what for one in found)


async def test_a_node_that_is_down_is_told_twice(log: Log, tmp_path: Path) -> None:
    """It does not answer, and its copies are offline. Its monitoring port is unknown, not wrong."""
    with Persister(tmp_path / "a", log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        log.cluster.kill(2)
        try:

            async def told() -> bool:
                found = await findings(patient(log, tmp_path / "data"))
                errors = [one.what for one in found if one.level is Level.ERROR]
                assert any("does not answer as a NATS node" in what for what in errors), errors
                assert any("n3 is offline" in what for what in errors), errors
                assert ("sync_interval", "unknown") in bad(found)
                return True

            await eventually(told)
        finally:
            await heal(log.cluster)
        await healthy(patient(log, tmp_path / "data"))
        assert 0 == await persister.end()


async def test_settings_that_differ_from_the_stream_are_told(log: Log, tmp_path: Path) -> None:
    """What may be changed is a warning, what may not is an error."""
    with Persister(tmp_path / "a", log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        settings = replace(log.settings, max_bytes=2**30)
        await only(patient(log, tmp_path / "data", settings), "stream", "warning", "max_bytes")
        settings = replace(log.settings, partitions=16)
        await only(
            patient(log, tmp_path / "data", settings),
            "stream",
            "error",
            "was made with FI_PARTITIONS=4, and it is 16 here",
        )
        assert 0 == await persister.end()


async def test_dead_letters_are_a_warning(log: Log, tmp_path: Path) -> None:
    """An operator has to look at them."""
    with Persister(tmp_path / "a", log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        await log.nc.request("fi.events.c1", b"no event", headers={Header.MSG_ID: "c1/x"})
        await only(patient(log, tmp_path / "data"), "dead letters", "warning", "1 message set aside")
        assert 0 == await persister.end()


async def test_checkpoints_that_a_reader_holds_back_are_told_with_the_readers_pid(log: Log, tmp_path: Path) -> None:
    """A notebook that keeps a file open for an afternoon."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        await persisted(data, await log.publish(20))
        with contextlib.ExitStack() as notebook:
            for partition in range(PARTITIONS):
                notebook.enter_context(h5py.File(data / f"0{partition}.h5", "r"))

            async def told() -> bool:
                await log.publish(8)
                found = [one for one in await findings(patient(log, data), held_back=0.1) if one.check == "checkpoints"]
                return bool(found) and all("it is held by pid" in one.what for one in found)

            await eventually(told)
        await healthy(patient(log, data))
        assert 0 == await persister.end()


async def test_clocks_are_compared_through_the_consumers_when_no_monitoring_port_is_near(
    log: Log, tmp_path: Path
) -> None:
    """The clock of this machine cannot be changed here, so it is taken to be an hour ahead."""
    with Persister(tmp_path / "a", log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        one = patient(log, tmp_path / "data")
        found = await findings(
            Installation(one.target, one.directory, ["http://127.0.0.1:9"], one.env), clock_offset=3600
        )
        assert 0 == await persister.end()
    clocks = [finding for finding in found if finding.check == "clocks"]
    assert clocks
    assert {Level.ERROR} == {finding.level for finding in clocks}
    assert all("behind this machine's" in finding.what for finding in clocks)


async def test_the_command_prints_findings_and_exits_with_1_only_for_errors(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings alone leave 0, so that a cron job can tell them apart."""
    monkeypatch.setenv("FI_PARTITIONS", str(PARTITIONS))
    monkeypatch.setenv("FI_STREAM_MAX_BYTES", "1GiB")
    arguments = ["doctor", "--server", log.cluster.url, "--corpus", str(tmp_path / "data")]
    with Persister(tmp_path / "a", log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert 0 == done.exit_code, done.output
        assert "warning  stream" in done.stdout
        assert "to do: " in done.stdout
        assert 0 == await persister.end()
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert 1 == done.exit_code
    assert "error    placement     no persister answers" in done.stdout


async def test_one_copy_without_a_backup_of_the_last_day_is_a_warning(log: Log, tmp_path: Path) -> None:
    """What FI_RETENTION has taken from the stream is on one disk; a new volume has a day's time."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as persister:
        await persister.ready()
        assert 0 == await persister.end()
    volume = (data / "volume.json").stat()
    os.utime(data / "volume.json", (volume.st_atime, volume.st_mtime - 2 * 86400))
    (found,) = [one for one in await findings(patient(log, data)) if one.check == "backup"]
    assert (Level.WARNING, True) == (found.level, "never" in found.what)
    note_backup(data, datetime.now(UTC).isoformat())
    (found,) = [one for one in await findings(patient(log, data)) if one.check == "backup"]
    assert Level.OK is found.level
    note_backup(data, (datetime.now(UTC) - timedelta(days=2)).isoformat())
    (found,) = [one for one in await findings(patient(log, data)) if one.check == "backup"]
    assert (Level.WARNING, True) == (found.level, "48 hours" in found.what)
