"""`fiq up` as a user runs it: one command, a whole pipeline, and no process left at the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from services.cli.embedded.processes import LOOPBACK, free_block, free_ports
from services.cli.embedded.stack import StackFolder, StackState
from services.cli.main import app
from tests.support.polling import eventually_sync

START = 90.0
#: of docs/cli.md; tests/conftest.py gives this process another one, but not the commands that it starts
USUAL_PORT, USUAL_NATS_PORT = 7001, 4222
FIQ = [sys.executable, "-m", "services.cli.main"]
UNBUFFERED = os.environ | {"PYTHONUNBUFFERED": "1"}


class Up:
    """A `fiq up` that runs in a folder."""

    def __init__(self, folder: Path, *options: str, env: Mapping[str, str] = {}) -> None:
        self.folder = folder
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("wb") as out, self._stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [*FIQ, "up", *options],
                cwd=folder,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    @property
    def state(self) -> StackState:
        return StackFolder(self.folder / ".fiq").read()

    @property
    def pids(self) -> list[int]:
        return [member.pid for member in self.state.members]

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.stderr
            return "fiq is up" in self.stdout

        eventually_sync(ready, START)

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal signals the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)


@contextmanager
def running(folder: Path, *options: str, env: Mapping[str, str] = {}) -> Iterator[Up]:
    up = Up(folder, *options, env=env)
    try:
        up.wait_ready()
        yield up
    finally:
        if up.process.poll() is None:
            up.process.terminate()
        up.process.wait(60)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One stack for the tests that only look, on another port than the usual one, which is taken."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # another process has it, which serves as well
            held.enter_context(socket.create_server((LOOPBACK, USUAL_PORT)))
        yield held.enter_context(running(tmp_path_factory.mktemp("up")))


def fiq(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FIQ, *arguments],
        cwd=folder,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def post(up: Up, consultation: str, payload: Any, *, event_type: str = "MESSAGE_RECEIVED") -> dict[str, Any]:
    body = json.dumps({"event_type": event_type, "payload": payload}).encode()
    request = urllib.request.Request(
        f"{up.state.ingest_url}/consultations/{consultation}/events",
        data=body,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.status == 202
        answer: dict[str, Any] = json.load(response)
        return answer


def shown(up: Up, consultation: str, count: int) -> str:
    """Wait until *count* events can be shown, and return what is printed."""

    def complete() -> str:
        result = fiq(up.folder, "show", consultation)
        assert f"{consultation}: {count} event" in result.stdout, result.stderr
        return result.stdout

    return eventually_sync(complete)


def alive(pids: list[int]) -> list[int]:
    def lives(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    return [pid for pid in pids if lives(pid)]


def test_up_prints_what_to_paste(up: Up) -> None:
    """The first screen has the addresses and an example for each way in."""
    assert up.state.ingest_url in up.stdout
    assert up.state.log_url in up.stdout
    assert f"{up.state.ingest_url}/docs\n" in up.stdout
    assert [word for word in ("curl", "nats --server", "open_corpus", "fiq show") if word not in up.stdout] == []
    assert "FI_TOKEN" not in up.stdout


def test_up_says_at_once_what_it_starts_and_then_what_is_ready(up: Up) -> None:
    """Also where no bar can be drawn; test_command_line.py has what may be imported before the first line."""
    parts = ["n1", "n2", "n3", "ingest", "persister-1", "persister-2"]
    lines = up.stderr.splitlines()
    assert f"starting {', '.join(parts)} in .fiq" == lines[0]
    assert sorted(f"{part} is ready" for part in parts) == sorted(lines[1:7])


def test_up_names_variables_that_are_no_settings(tmp_path: Path) -> None:
    """A mistyped setting would go unnoticed: the services' warnings are in files."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = fiq(tmp_path, "up", "--port", str(server.getsockname()[1]), env={"FI_PARTITION": "4"})
    assert "no settings, so without effect: FI_PARTITION (FI_PARTITIONS?)\n" in result.stderr


def test_up_says_that_the_usual_port_is_taken(up: Up) -> None:
    """Or a client of the usual port would reach another service."""
    port = up.state.ingest_url.rpartition(":")[2]
    assert f"port {USUAL_PORT} is taken, using {port}\n" in up.stderr


def test_the_nodes_have_the_usual_ports_or_the_next_free_ones(up: Up) -> None:
    """So that a context of the `nats` command line stays valid from one `fiq up` to the next; else it is said."""
    ports = [int(member.url.rpartition(":")[2]) for member in up.state.nodes]
    assert list(range(ports[0], ports[0] + 3)) == ports
    assert 0 == (ports[0] - USUAL_NATS_PORT) % 10
    said = (
        f"the nodes use {ports[0]} to {ports[2]}: a context of the `nats` command line needs  fiq nats-context  again"
    )
    assert (ports[0] != USUAL_NATS_PORT) == (said in up.stderr)


def test_the_printed_examples_work(up: Up) -> None:
    """The curl command, then `fiq show` and the Python code, exactly as they were printed."""
    curl = re.search(r"^  (curl .*?'$)", up.stdout, re.MULTILINE | re.DOTALL)
    python = re.search(r"^  (python - .*?END)$", up.stdout, re.MULTILINE | re.DOTALL)
    assert curl is not None
    assert python is not None
    post(up, "c-1", {"text": "hello"})

    assert "hello" in shown(up, "c-1", 1)
    script = python.group(1).replace("\n  ", "\n").replace("python", sys.executable, 1)
    result = subprocess.run(["sh", "-c", script], cwd=up.folder, capture_output=True, text=True, check=False)
    assert "{'text': 'hello'}" in result.stdout, result.stderr


def test_an_event_goes_all_the_way(up: Up) -> None:
    """What was posted is exported byte for byte, in stream order."""
    for number in range(5):
        post(up, "way", number)
    shown(up, "way", 5)

    result = fiq(up.folder, "export", "way", "--format", "ndjson")

    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert [document["event"]["payload"] for document in documents] == [0, 1, 2, 3, 4]
    sequences = [document["sequence"] for document in documents]
    assert sorted(set(sequences)) == sequences


def test_get_prints_an_event_of_the_service(up: Up) -> None:
    """As JSON, at once after its 202; an unknown one is an error."""
    accepted = post(up, "got", {"text": "a\u202eb"})

    found = fiq(up.folder, "get", "got", accepted["message_id"])
    unknown = fiq(up.folder, "get", "got", "00000000-0000-4000-8000-000000000000")
    elsewhere = fiq(up.folder, "get", "got", accepted["message_id"], "--url", "http://127.0.0.1:1", "--patience", "1")

    document = json.loads(found.stdout)
    assert accepted["message_id"] == document["message_id"]
    assert {"event_type": "MESSAGE_RECEIVED", "payload": {"text": "a\u202eb"}} == document["event"]
    assert document["persisted"] == (document["written"] is not None)
    assert "\u202e" not in found.stdout
    assert (1, "") == (unknown.returncode, unknown.stdout)
    assert "consultation 'got' has no event 00000000-" in unknown.stderr
    assert (1, True) == (elsewhere.returncode, "no answer from http://127.0.0.1:1" in elsewhere.stderr)


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["lines", "json"])
def test_follow_prints_stored_events_and_each_new_one(up: Up, form: list[str]) -> None:
    """A line each, at once, until Ctrl-C."""
    name = f"followed-{len(form)}"
    first = post(up, name, "first")
    command = [*FIQ, "follow", name, *form]
    process = subprocess.Popen(command, cwd=up.folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    second = post(up, name, "second")
    lines.append(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    later = subprocess.Popen(
        [*command, "--after", str(first["sequence"])], cwd=up.folder, stdout=subprocess.PIPE, text=True
    )
    assert later.stdout is not None
    lines.append(later.stdout.readline())
    later.kill()
    later.communicate(timeout=20)

    assert 130 == process.returncode
    if form:
        assert ["first", "second", "second"] == [json.loads(line)["event"]["payload"] for line in lines]
    else:
        expected = [rf" *{one['sequence']}  \S+Z  MESSAGE_RECEIVED  \"(first|second)\"\n" for one in (first, second)]
        assert all(re.fullmatch(row, line) for row, line in zip((*expected, expected[1]), lines, strict=True)), lines


def test_follow_all_prints_events_of_a_type_of_every_consultation(up: Up) -> None:
    """With the consultation that each belongs to."""
    sequences = [
        post(up, name, name, event_type=kind)["sequence"] for name, kind in (("a", "X"), ("b", "Y"), ("c", "X"))
    ]
    command = [*FIQ, "follow", "--all", "--type", "X", "--after", str(sequences[0] - 1), "--since", "1h"]
    process = subprocess.Popen(command, cwd=up.folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in range(2)]
    process.kill()
    process.communicate(timeout=20)

    assert [[str(sequences[0]), "a", "X"], [str(sequences[2]), "c", "X"]] == [[line[0], *line[2:4]] for line in lines]
    assert "name one consultation, or choose all" in fiq(up.folder, "follow").stderr


def test_logs_follow_all_processes(up: Up) -> None:
    """What nodes and services write, and what comes while it runs."""
    started = fiq(up.folder, "logs", "-n", "0")
    assert {"n1", "n2", "n3", "ingest", "persister-1"} <= {line.split()[2] for line in started.stdout.splitlines()}
    command = [*FIQ, "logs", "--follow", "-n", "1", "--grep", "EVENT_QUEUED", "ingest"]
    process = subprocess.Popen(command, cwd=up.folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "EVENT_QUEUED" in process.stdout.readline()
    accepted = post(up, "logged", 1)
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert f"message_id={accepted['message_id']}" in line
    assert 130 == process.returncode


def test_ls_lists_what_was_posted(up: Up) -> None:
    """Without options the corpus is that of ./.fiq."""
    post(up, "listed", 1)
    shown(up, "listed", 1)

    (found,) = json.loads(fiq(up.folder, "ls", "--prefix", "listed", "--json").stdout)

    assert ("listed", 1, found["last"]) == (found["consultation"], found["events"], found["first"])


@pytest.mark.parametrize("form", ["ndjson", "json", "csv"])
def test_an_export_to_a_file_is_the_one_to_stdout(up: Up, form: str) -> None:
    """The file appears complete, and only its owner can read it."""
    post(up, f"file-{form}", "x")
    shown(up, f"file-{form}", 1)
    path = up.folder / f"export.{form}"

    written = fiq(up.folder, "export", f"file-{form}", "-f", form, "-o", str(path))
    printed = fiq(up.folder, "export", f"file-{form}", "-f", form)

    assert written.stdout == ""
    assert printed.stdout.encode() == path.read_bytes().replace(b"\r\n", b"\n")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_failed_export_leaves_no_file(up: Up) -> None:
    """An unknown consultation, and a folder that is not there, are errors without traces."""
    path = up.folder / "nothing.json"

    unknown = fiq(up.folder, "export", "unknown", "-o", str(path))
    nowhere = fiq(up.folder, "export", "c-1", "-o", str(up.folder / "missing" / "file"))

    assert (unknown.returncode, nowhere.returncode) == (1, 1)
    assert "no consultation 'unknown'" in unknown.stderr
    assert unknown.stderr.count("\n") == 1
    assert "cannot write" in nowhere.stderr or "no consultation" in nowhere.stderr
    assert not path.exists()


def test_status_shows_nodes_stream_and_owners(up: Up) -> None:
    """Each partition has one owner among the two persisters, and the corpus has what the stream has."""
    post(up, "status", 1)

    def settled() -> dict[str, Any]:
        result = fiq(up.folder, "status", "--json")
        assert result.returncode == 0, result.stderr
        document: dict[str, Any] = json.loads(result.stdout)
        assert [len(one["owners"]) for one in document["partitions"]] == [1] * 16, document["workers"]
        assert [one["lag"] for one in document["partitions"]] == [0] * 16
        assert max(one["committed"] for one in document["partitions"]) == document["stream"]["last_sequence"]
        assert {(one["epoch"], one["begins"], one["oldest_seconds"]) for one in document["partitions"]} == {
            (1, 1, None)
        }
        return document

    document = eventually_sync(settled)
    assert {owner for one in document["partitions"] for owner in one["owners"]} == {"persister-1", "persister-2"}
    assert sorted(node["role"] for node in document["nodes"]) == ["leader", "replica", "replica"]
    assert document["stream"]["messages"] > 0
    assert document["remarks"] == []


def test_status_prints_tables(up: Up) -> None:
    """For people: nodes, streams and one line a partition."""
    result = fiq(up.folder, "status")

    assert result.returncode == 0, result.stderr
    assert "fi-events:" in result.stdout
    assert len(re.findall(r"^\d\d .*persister-[12] \(pid \d+\)", result.stdout, re.MULTILINE)) == 16


@contextmanager
def frozen(up: Up, role: str) -> Iterator[str]:
    """Freeze a node that has *role* in the stream; thaw it afterwards, and wait until the cluster has it back."""

    def nodes() -> list[dict[str, str]]:
        result = fiq(up.folder, "status", "--json")
        assert result.returncode == 0, result.stderr
        found: list[dict[str, str]] = json.loads(result.stdout)["nodes"]
        assert ["current"] * 3 == [node["condition"] for node in found], found
        assert ["leader", "replica", "replica"] == sorted(node["role"] for node in found)
        return found

    name = next(node["name"] for node in eventually_sync(nodes) if node["role"] == role)
    pid = next(member.pid for member in up.state.members if member.name == name)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield name
    finally:
        os.kill(pid, signal.SIGCONT)
        eventually_sync(nodes, 60)


@pytest.mark.parametrize("role", ["leader", "replica"])
def test_status_answers_within_3_seconds_whichever_node_is_frozen(
    up: Up, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """It names the node. Without the stream's leader it shows what is known by then, and says how to go on."""
    monkeypatch.chdir(up.folder)
    with frozen(up, role) as name:
        began = time.monotonic()
        result = CliRunner().invoke(app, ["status"])
        took = time.monotonic() - began
        assert took < 3.0, took
        assert re.search(rf"^{name} .*does not answer", result.stdout, re.MULTILINE), result.output
        # a persister that is connected to that node does not answer either
        away = "no persister answers (or is connected to the node that does not answer)" in result.stderr
        assert away != bool(re.search(r"^\d\d .*persister-", result.stdout, re.MULTILINE)), result.output
        if role == "leader":
            assert (1, True) == (result.exit_code, "fiq status --watch" in result.stderr)
        else:  # it may lead the placements
            assert result.exit_code == 0 or "placement of partitions is unknown" in result.stderr


def test_status_is_watched_until_ctrl_c(up: Up) -> None:
    """Again and again, each time with the time of day; what cannot be asked now is tried again."""
    command = [*FIQ, "status", "--watch"]
    process = subprocess.Popen(command, cwd=up.folder, stdout=subprocess.PIPE, text=True, env=UNBUFFERED)
    assert process.stdout is not None
    times: list[str] = []
    while len(times) < 2:
        line = process.stdout.readline()
        assert line, "it ended"
        times += re.findall(r"^(\d\d:\d\d:\d\d) UTC$", line)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert 130 == process.returncode
    assert times[0] != times[1]


def test_nats_context_leads_to_the_running_cluster(up: Up, tmp_path: Path) -> None:
    """Without options the context is that of ./.fiq."""
    result = fiq(up.folder, "nats-context", env={"XDG_CONFIG_HOME": str(tmp_path)})

    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "nats/context/fiq.json").read_text())["url"] == up.state.log_url


def test_provision_finds_nothing_to_do(up: Up) -> None:
    """The services made the streams; the command agrees with them."""
    result = fiq(up.folder, "provision", "--folder", ".fiq")

    assert result.returncode == 0, result.stderr
    assert "16 partitions, 3 replicas" in result.stdout


def test_a_second_up_in_the_folder_is_refused(up: Up) -> None:
    """Two stacks on the same stores would destroy them."""
    result = fiq(up.folder, "up")

    assert result.returncode == 1
    assert f"in use by process {up.process.pid}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert up.process.poll() is None


def test_a_killed_persister_is_started_again(up: Up) -> None:
    """Users may kill what they like and watch: the process is replaced, and events keep arriving."""
    before = up.state
    victim = next(member for member in before.members if member.name == "persister-1")

    os.kill(victim.pid, signal.SIGKILL)

    eventually_sync(lambda: up.state != before)
    assert f"persister-1 (pid {victim.pid}) was killed (SIGKILL); starting it again\n" in up.stderr
    eventually_sync(lambda: re.search(r"^persister-1 is back after \d+\.\d s$", up.stderr, re.MULTILINE))
    post(up, "after-the-kill", 1)
    shown(up, "after-the-kill", 1)


def test_status_outlasts_the_election_of_a_leader(up: Up) -> None:
    """Just after the death of the stream's leader the others are asked again."""
    document = json.loads(fiq(up.folder, "status", "--json").stdout)
    leader = next(node["name"] for node in document["nodes"] if node["role"] == "leader")
    victim = next(member for member in up.state.members if member.name == leader)

    os.kill(victim.pid, signal.SIGKILL)

    def answered() -> str:
        result = fiq(up.folder, "status")
        assert result.returncode == 0, result.stderr
        assert "fi-events:" in result.stdout
        return result.stdout

    eventually_sync(answered)
    assert f"{leader} (pid {victim.pid}) was killed (SIGKILL); starting it again\n" in up.stderr
    eventually_sync(lambda: f"\n{leader} is back after " in up.stderr, 60)


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    """A port that was asked for is not replaced by another one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = fiq(tmp_path, "up", "--port", str(port))

    assert result.returncode == 1
    assert f"port {port} is taken" in result.stderr
    assert "--port" in result.stderr


def test_a_taken_port_of_the_nodes_is_refused(tmp_path: Path) -> None:
    """If it was asked for: a context of the `nats` command line may have it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = fiq(tmp_path, "up", "--nats-port", str(port - 2))

    assert result.returncode == 1
    assert "is taken: choose others for the nodes with --nats-port" in result.stderr


def test_a_stack_on_chosen_ports_and_with_tokens(tmp_path: Path) -> None:
    """The nodes have the ports that were asked for, and what is printed to paste has a token."""
    tokens = tmp_path / "tokens"
    first = free_block(max(free_ports(1)), 3)[0]
    assert 0 == fiq(tmp_path, "token", "new", "first", "--file", str(tokens)).returncode
    with running(tmp_path, "--nats-port", str(first), env={"FI_TOKEN_FILE": str(tokens)}) as up:
        assert ",".join(f"nats://{LOOPBACK}:{first + node}" for node in range(3)) == up.state.log_url
        export = re.search(r"^  (export FI_TOKEN=.*)$", up.stdout, re.MULTILINE)
        curl = re.search(r"^  (curl .*?'$)", up.stdout, re.MULTILINE | re.DOTALL)
        assert export is not None
        assert curl is not None
        script = f'fiq() {{ {shlex.join(FIQ)} "$@"; }}\n{export[1]}\nprintf %s $FI_TOKEN'
        token = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

        def posted() -> bool:  # the token is valid within a second
            env = os.environ | {"FI_TOKEN": token}
            return subprocess.check_output(["bash", "-c", curl[1]], env=env, text=True).startswith("HTTP/1.1 202")

        eventually_sync(posted)


def test_ctrl_c_stops_everything_and_the_data_stay(tmp_path: Path) -> None:
    """Exit code 130, no process left; the next `up` in the folder continues with the corpus and the stream."""
    with running(tmp_path) as first:
        post(first, "kept", "first")
        shown(first, "kept", 1)
        pids = first.pids
        first.interrupt()

        assert first.process.wait(60) == 130
        assert alive(pids) == []
        assert "Traceback" not in first.stderr
        assert "stopped; the data stay in .fiq" == first.stderr.splitlines()[-1]
    assert "kept: 1 event\n" in fiq(tmp_path, "show", "kept").stdout
    assert fiq(tmp_path, "status").returncode == 1

    with running(tmp_path) as second:
        post(second, "kept", "second")
        assert "second" in shown(second, "kept", 2)
        second.process.terminate()

        assert second.process.wait(60) == 143


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    """A user in a hurry need not wait for the orderly end."""
    with running(tmp_path) as up:
        pids = up.pids
        up.interrupt()
        eventually_sync(lambda: "stopping" in up.stderr)
        up.interrupt()

        assert up.process.wait(10) == 130
        eventually_sync(lambda: alive(pids) == [], timeout=10)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
def test_nothing_is_left_when_up_itself_is_killed(tmp_path: Path) -> None:
    """kill -9 takes the whole stack along, and its folder can be used again."""
    with running(tmp_path) as up:
        pids = up.pids
        up.process.kill()
        up.process.wait(10)

        eventually_sync(lambda: alive(pids) == [], timeout=10)
    assert "no `fiq up` is running in" in fiq(tmp_path, "status").stderr


def test_it_opens_the_page_that_its_banner_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --open, in the browser that BROWSER names, once everything is ready."""
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o700)
    monkeypatch.setenv("BROWSER", str(browser))
    with running(tmp_path, "--open") as up:
        page = re.search(r"^  page +(\S+)$", up.stdout, re.MULTILINE)
        assert page is not None
        eventually_sync(lambda: (tmp_path / "opened").exists() and (tmp_path / "opened").read_text().strip())
        assert page[1] == (tmp_path / "opened").read_text().strip()
        with urllib.request.urlopen(page[1], timeout=10) as answer:
            assert (200, "text/html; charset=utf-8") == (answer.status, answer.headers["Content-Type"])
