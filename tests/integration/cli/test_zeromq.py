"""The command line on a stack without a broker (`fiq up --log zmq`)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from fiq.corpus import open_corpus, verify_corpus
from services.cli.embedded.stack import LogKind, Stack, StackFolder
from services.cli.errors import CommandError
from services.log.settings import FORMED_FILE


def fiq(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command about the stack in *folder*."""
    command = [sys.executable, "-m", "services.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def post(url: str, body: bytes) -> int:
    request = urllib.request.Request(f"{url}/consultations/c-1/events", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return int(json.load(response)["sequence"])


def test_commands_work_on_a_stack_without_a_broker_or_say_why_not(tmp_path: Path) -> None:
    """Status, doctor, backup and restore; what is about nodes is refused."""
    home = StackFolder(tmp_path / ".fiq")
    with home.held(), Stack(home.path, log=LogKind.ZMQ, persisters=1) as stack:
        home.write(stack.state())
        assert 1 == post(stack.ingest.url, b'{"event_type":"A"}')

        status = json.loads(fiq(tmp_path, "status", "--json").stdout)
        assert [16, 0, 0] == [
            len(status["partitions"]),
            sum(p["lag"] for p in status["partitions"]),
            len(status["nodes"]),
        ]
        assert {("persister-1",)} == {tuple(one["owners"]) for one in status["partitions"]}
        assert 1 == sum(one["committed"] for one in status["partitions"])
        assert "has no broker" in status["remarks"][0]

        doctor = fiq(tmp_path, "doctor", "--all")
        assert 0 == doctor.returncode, doctor.stdout
        assert "each partition has an owner that answers, in all 16" in doctor.stdout

        for arguments in (("nats-context",), ("provision",), ("give-up", "--to", "x", "6f1b1d4e")):
            done = fiq(tmp_path, *arguments)
            assert 1 == done.returncode, done.stdout
            assert "NATS nodes" in done.stderr

        backup = fiq(tmp_path, "backup", str(tmp_path / "copy"))
        assert 0 == backup.returncode, backup.stderr
        assert "Events that are accepted from now on are not in it" in backup.stdout
        assert 2 == post(stack.ingest.url, b'{"event_type":"B"}')

        stack.persisters[0].process.kill()
        document = fiq(tmp_path, "doctor", "--json")
        assert 1 == document.returncode
        findings = {one["check"]: one["level"] for one in json.loads(document.stdout)["findings"]}
        assert "error" == findings["owners"]
    restored = fiq(tmp_path, "restore", str(tmp_path / "copy"), "--offline", "--to", str(tmp_path / "again" / "corpus"))
    assert 0 == restored.returncode, restored.stderr
    assert "without the events that came since" in restored.stdout
    with Stack(tmp_path / "again", log=LogKind.ZMQ, persisters=1) as stack:
        assert 2 == post(stack.ingest.url, b'{"event_type":"C"}')
    with open_corpus(tmp_path / "again" / "corpus") as corpus:
        assert ["A", "C"] == [event.event_type for event in corpus["c-1"]]


def test_a_deleted_folder_leaves_nothing_to_the_next_one_at_its_path(tmp_path: Path) -> None:
    """Sockets are among temporary files where the path of the folder is too long for them."""
    folder = tmp_path / ("long" * 20)
    for _ in range(2):
        with Stack(folder, log=LogKind.ZMQ, persisters=1) as stack:
            sockets = Path(stack.log_url.removeprefix("zmq+ipc://"))
            assert not sockets.is_relative_to(folder)
            assert 1 == post(stack.ingest.url, b'{"event_type":"A"}')
        shutil.rmtree(folder)
    shutil.rmtree(sockets)


def test_a_folder_belongs_to_one_log(tmp_path: Path) -> None:
    """Sequences of one log mean nothing to the other."""
    with Stack(tmp_path, log=LogKind.ZMQ, persisters=1):
        pass
    with pytest.raises(CommandError, match="belongs to a stack with --log zmq"):
        Stack(tmp_path, nodes=1).start()
    (tmp_path / "nats" / "cluster").mkdir(parents=True)
    with pytest.raises(CommandError, match="belongs to a stack with --log nats"):
        Stack(tmp_path / "nats", log=LogKind.ZMQ).start()


def test_a_stack_with_another_number_of_partitions_is_refused_at_once(tmp_path: Path) -> None:
    """Its persisters would wait for a minute, and then be stopped."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / FORMED_FILE).write_text('{"partitions": 16}')
    with pytest.raises(CommandError, match="has 16 partitions, not 4: set FI_PARTITIONS=16"):
        Stack(tmp_path, log=LogKind.ZMQ, env={"FI_PARTITIONS": "4"}).start()


def test_the_demo_kills_both_persisters_and_proves_that_every_event_is_there_once(tmp_path: Path) -> None:
    """With no nodes there is nothing else to kill."""
    done = fiq(tmp_path, "demo", "--log", "zmq", "--events", "1500", "--folder", str(tmp_path / "demo"))
    assert 0 == done.returncode, done.stderr
    for line in ("persister-2, persister-1", "every event once, in order"):
        assert line in done.stdout
    assert verify_corpus(tmp_path / "demo" / "corpus").clean


def test_init_makes_curve_keys_once_and_adds_clients(tmp_path: Path) -> None:
    """Files that only their owner reads; a second run changes nothing that is there."""
    keys = tmp_path / "secrets" / "zmq"
    assert 0 == fiq(tmp_path, "init", ".", "--curve", "ingest-1").returncode
    before = {path: path.read_bytes() for path in keys.rglob("*.key*")}
    assert {"server.key", "server.key_secret", "ingest-1.key_secret", "ingest-1.key"} == {path.name for path in before}
    assert {0o600} <= {path.stat().st_mode & 0o777 for path in before} <= {0o600, 0o400}
    assert 0 == fiq(tmp_path, "init", ".", "--curve", "ingest-1,ingest-2").returncode
    assert before == {path: path.read_bytes() for path in before}
    assert (keys / "clients" / "ingest-2.key").exists()
    assert "nothing was changed" in fiq(tmp_path, "init", ".", "--curve", "ingest-2").stdout
    assert "--curve Server" in fiq(tmp_path, "init", ".", "--curve", "Server").stderr
