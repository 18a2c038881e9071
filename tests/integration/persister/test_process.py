"""Persister processes on a real cluster: what they write, how they start, share, die and stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from tests.support.persisters import PARTITIONS, Log, Persister, persisted, service_infos
from tests.support.polling import eventually, eventually_sync
from tests.support.service import Service


async def test_everything_accepted_is_in_hdf5_and_the_process_tells_of_itself(log: Log, tmp_path: Path) -> None:
    """Events, endpoints, metrics, service info; SIGTERM ends it with 0 and everything released."""
    with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        events = await log.publish(300)
        await persisted(tmp_path / "data", events)
        assert 200 == (await persister.ask("/healthz"))[0]
        status, metrics = await persister.ask("/metrics")
        assert 200 == status
        written = [float(line.split()[-1]) for line in metrics.splitlines() if "fi_persister_events_total{" in line]
        assert 300 == sum(written)

        async def announced() -> list[dict[str, Any]]:
            return await service_infos(log.nc)

        (info,) = await eventually(announced)
        assert str(persister.process.pid) == info["metadata"]["pid"]
        assert "00,01,02,03" == info["metadata"]["partitions"]
        assert {"worker", "volume", "store", "host"} < info["metadata"].keys()
        assert "fi_queue_ack_rate{" in metrics
        assert 0 == await persister.end()
        assert "" == persister.errors
    assert [] == list((tmp_path / "data" / "workers").iterdir())
    assert [] == [line for line in persister.lines if line["level"] == "error"]


async def test_when_idle_an_event_is_committed_within_a_tenth_of_a_second(log: Log, tmp_path: Path) -> None:
    """By the process's own measure, from ingest to the commit.

    The median of many counts: whatever the program waited for would delay all of them, a busy machine delays some.
    """
    with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        for number in range(1, 31):
            await log.publish(1, at=time.time_ns())

            async def committed(number: int = number) -> bool:
                return number == (await persister.samples())["fi_persister_event_age_seconds_count"]

            await eventually(committed)
        samples = await persister.samples()
        assert 30 == samples["fi_persister_batch_events_count"]
        assert samples['fi_persister_event_age_seconds_bucket{le="0.1"}'] >= 15
        assert 0 == await persister.end()


async def test_the_ack_rate_is_not_zero_while_events_are_acknowledged(log: Log, tmp_path: Path) -> None:
    """It looks back ten seconds; the updates every two seconds must not restart it."""
    with Persister(tmp_path, log.cluster, tmp_path / "data") as persister:
        await persister.ready()
        published: list[int] = []

        async def observed() -> list[float]:
            """Events of a moment ago count: on a busy machine those of the last round may be too old by now."""
            published.append(sum(map(len, (await log.publish(40)).values())))
            _, metrics = await persister.ask("/metrics")
            assert "fi_queue_length{" in metrics  # there has been an observation
            rates = [float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("fi_queue_ack_rate{")]
            assert 0 < sum(rates)
            return rates

        rates = await eventually(observed)
        assert PARTITIONS == len(rates)
        assert sum(published) / 10 + 1e-9 >= sum(rates)


async def test_a_second_process_takes_over_from_a_killed_one(log: Log, tmp_path: Path) -> None:
    """kill -9: the kernel lets the locks go, the other one goes on from the files."""
    data = tmp_path / "data"
    with (
        Persister(tmp_path / "a", log.cluster, data) as first,
        Persister(tmp_path / "b", log.cluster, data) as second,
    ):
        await first.ready()
        await second.ready()

        async def partitions() -> list[int]:
            return sorted(len(info["metadata"]["partitions"].split(",")) for info in await service_infos(log.nc))

        async def shared() -> bool:
            return await partitions() == [2, 2]

        await eventually(shared)
        events = [await log.publish(100)]
        publishing = asyncio.create_task(log.publish(200))
        first.process.kill()
        events.append(await publishing)
        await persisted(data, *events)
        await second.ready()

        async def alone() -> bool:
            return await partitions() == [PARTITIONS]

        await eventually(alone)
        assert 0 == await second.end()


#: imported by a Python that finds it: a sync hangs as long as there is a pipe that nothing writes to
_HANGING_DISK = """
import os
sync = os.fdatasync
def fdatasync(descriptor):
    try:
        os.close(os.open(os.environ["HANG"], os.O_RDONLY))
    except FileNotFoundError:
        sync(descriptor)
os.fdatasync = fdatasync
"""


async def test_a_process_that_hangs_in_hdf5_ends_itself_and_another_one_takes_over(log: Log, tmp_path: Path) -> None:
    """A disk that never answers: the call is overdue, the process ends, and nothing is lost."""
    data, hang = tmp_path / "data", tmp_path / "hang"
    (tmp_path / "sitecustomize.py").write_text(_HANGING_DISK)
    settings = {"PYTHONPATH": str(tmp_path), "HANG": str(hang), "FI_WATCHDOG": "2"}
    with (
        Persister(tmp_path / "a", log.cluster, data, **settings) as first,
        Persister(tmp_path / "b", log.cluster, data) as second,
    ):
        await first.ready()
        await second.ready()

        async def shared() -> bool:
            infos = await service_infos(log.nc)
            return [2, 2] == [len(info["metadata"]["partitions"].split(",")) for info in infos]

        await eventually(shared)
        events = [await log.publish(40)]
        await persisted(data, *events)
        os.mkfifo(hang)
        events.append(await log.publish(40))
        assert 1 == await asyncio.to_thread(first.wait)
        await persisted(data, *events)
        line = first.wait_for("PROCESS_HUNG")
        assert "call in a thread" == line["hung"]
        assert "fdatasync" in str(line["threads"])
        assert [] == [other for other in second.lines if other["event"] == "PROCESS_HUNG"]
        assert 0 == await second.end()


async def test_a_process_that_joins_gets_half_without_anything_lost(log: Log, tmp_path: Path) -> None:
    """Partitions are handed over while events flow."""
    data = tmp_path / "data"
    with Persister(tmp_path / "a", log.cluster, data) as first:
        await first.ready()
        publishing = asyncio.create_task(log.publish(600))
        with Persister(tmp_path / "b", log.cluster, data) as second:
            await second.ready()
            events = await publishing
            await persisted(data, events)
            assert 0 == await second.end()
        more = await log.publish(20)
        await persisted(data, events, more)
        assert 0 == await first.end()


# -- starting ---------------------------------------------------------------------------------------------------------


def test_wrong_settings_end_it_with_one_line_each(tmp_path: Path) -> None:
    """Exit code 2, nothing else on stderr."""
    with Service(tmp_path, "services.persister", FI_VOLUMES="0", FI_LOG_URL="localhost") as persister:
        assert 2 == persister.wait()
        lines = persister.errors.splitlines()
        assert ["fiq-persister: FI_LOG_URL", "fiq-persister: FI_VOLUMES"] == sorted(one.split("=")[0] for one in lines)


def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path) -> None:
    """Before the cluster is waited for."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        data = str(tmp_path / "data")
        with Service(tmp_path, "services.persister", FI_PERSISTER_PORT=port, FI_DATA_DIR=data) as persister:
            assert 1 == persister.wait()
            (line,) = persister.errors.splitlines()
            assert f"cannot listen on 127.0.0.1:{port} (FI_PERSISTER_HOST, FI_PERSISTER_PORT)" in line


def test_a_directory_that_is_no_volume_is_one_clear_line(tmp_path: Path) -> None:
    """Partition files without their identity."""
    (tmp_path / "00.h5").touch()
    with Service(tmp_path, "services.persister", FI_PERSISTER_PORT="0", FI_DATA_DIR=str(tmp_path)) as persister:
        assert 1 == persister.wait()
        (line,) = persister.errors.splitlines()
        assert "no volume.json" in line


def nowhere() -> str:
    """Return the URL of a port without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"nats://127.0.0.1:{free.getsockname()[1]}"


def test_without_a_cluster_it_gives_up_with_one_line(tmp_path: Path) -> None:
    """After FI_STARTUP_TIMEOUT."""
    settings = {"FI_LOG_URL": nowhere(), "FI_STARTUP_TIMEOUT": "1", "FI_PERSISTER_PORT": "0"}
    with Service(tmp_path, "services.persister", FI_DATA_DIR=str(tmp_path / "data"), **settings) as persister:
        assert 1 == persister.wait()
        (line,) = persister.errors.splitlines()
        assert "gave up after 1 s (FI_STARTUP_TIMEOUT)" in line


def test_a_signal_ends_it_while_it_waits_for_the_cluster(tmp_path: Path) -> None:
    """At once, and with 0: it was asked to."""
    settings = {"FI_LOG_URL": nowhere(), "FI_PERSISTER_PORT": "0"}
    with Service(tmp_path, "services.persister", FI_DATA_DIR=str(tmp_path / "data"), **settings) as persister:
        eventually_sync((tmp_path / "data" / "volume.json").exists)
        persister.terminate()
        assert 0 == persister.process.wait(3)
        assert "" == persister.errors


# -- workers ----------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def worker_pids(log: Log, count: int = 2) -> list[int]:
    """Wait until there are so many workers, each with partitions, and return their process ids."""
    found: list[int] = []

    async def check() -> bool:
        infos = await service_infos(log.nc)
        found[:] = sorted(int(info["metadata"]["pid"]) for info in infos)
        return [2] * count == [len(info["metadata"]["partitions"].split(",")) for info in infos]

    await eventually(check)
    return found


async def test_workers_share_the_partitions_and_stop_together(log: Log, tmp_path: Path) -> None:
    """SIGTERM to the parent: all of them end in order, exit code 0; a killed one is started again before that."""
    with Persister(tmp_path, log.cluster, tmp_path / "data", "--workers", "2") as parent:
        pids = await worker_pids(log)
        assert parent.process.pid not in pids
        events = [await log.publish(100)]
        os.kill(pids[0], signal.SIGKILL)
        events.append(await log.publish(100))
        await eventually(lambda: any(line["event"] == "WORKER_ENDED" for line in parent.lines))
        again = await worker_pids(log)
        assert pids[1] in again
        assert pids[0] not in again
        await persisted(tmp_path / "data", *events)
        assert 0 == await parent.end()
        assert "" == parent.errors
        assert not any(alive(pid) for pid in again)
    assert 2 == sum(line["event"] == "PERSISTER_STOPPED" for line in parent.lines)


def test_an_unknown_setting_is_warned_of_once_whatever_the_number_of_workers(tmp_path: Path) -> None:
    """By the parent; settings of ingest, in a file that both share, are known."""
    settings = {"FI_LOG_URL": nowhere(), "FI_STARTUP_TIMEOUT": "1", "FI_PERSISTER_PORT": "0", "FI_RATE": "5"}
    settings |= {"FI_DATA_DIR": str(tmp_path / "data"), "FI_RETENTIONS": "1h"}
    with Service(tmp_path, "services.persister", "--workers", "2", **settings) as parent:
        parent.wait_for("WORKER_ENDED")
        (line,) = [line for line in parent.lines if line["event"] == "SETTINGS_UNKNOWN"]
        assert ["FI_RETENTIONS (FI_RETENTION?)"] == line["variables"]
        parent.terminate()
        parent.process.wait(20)


async def test_a_second_signal_kills_the_workers_too(log: Log, tmp_path: Path) -> None:
    """The way out when one hangs: here they are frozen, so no orderly end could come."""
    with Persister(tmp_path, log.cluster, tmp_path / "data", "--workers", "2") as parent:
        pids = await worker_pids(log)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)

        def ended() -> bool:
            parent.terminate()  # signals that come at the same time are one: again until there were two
            return parent.process.poll() is not None

        await eventually(ended)
        assert -signal.SIGTERM == parent.process.returncode
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        await eventually(lambda: not any(alive(pid) for pid in pids))


async def test_a_killed_parent_leaves_no_workers(log: Log, tmp_path: Path) -> None:
    """Otherwise they would keep the partitions locked, with no parent to stop them."""
    with Persister(tmp_path, log.cluster, tmp_path / "data", "--workers", "2") as parent:
        pids = await worker_pids(log)
        parent.process.kill()
        await eventually(lambda: not any(alive(pid) for pid in pids))
    assert [] == list((tmp_path / "data" / "workers").iterdir())
