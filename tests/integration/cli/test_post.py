"""`fiq post`: what it sends, in which order, and what becomes of it when it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pty
import re
import shlex
import signal
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest
from typer.testing import CliRunner

from fiq.corpus.consultation import EventRecord
from fiq.event import event_id_from_key
from services.cli.corpus import Format
from services.cli.corpus import lines as exported_lines
from services.cli.main import app
from tests.support.memory_service import MemoryService
from tests.support.polling import eventually
from tests.support.scripted_http import refused, scripted

DOCUMENT = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
SECRET = "secret-payload"


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def number(self, row: str) -> float:
        """Return the number in the result's *row*."""
        found = re.search(rf"^{row} +([\d.]+)$", self.out, re.MULTILINE)
        assert found, self
        return float(found[1])


async def started(*arguments: str | Path, **options: Any) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "services.cli.main", "post", *map(str, arguments)]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, **({"stdin": pipe, "stdout": pipe, "stderr": pipe} | options))


async def ended(process: asyncio.subprocess.Process, stdin: bytes | None = None) -> Ended:
    out, err = (text or b"" for text in await process.communicate(stdin))
    assert process.returncode is not None
    assert SECRET.encode() not in out + err
    return Ended(process.returncode, out.decode(), err.decode())


async def post(*arguments: str | Path, stdin: bytes | None = None) -> Ended:
    """Run the command to its end."""
    return await ended(await started(*arguments), stdin)


def posting_to(url: str) -> str:
    """Return what is written to stderr when all is well."""
    return f"fiq: posting to {url} (--url)\n"


def event(number: int, **members: Any) -> bytes:
    return orjson.dumps({"event_type": "A", "n": number, "payload": SECRET, **members})


def written(path: Path, events: list[bytes]) -> Path:
    path.write_bytes(b"".join(body + b"\n" for body in events))
    return path


def names(folder: Path) -> list[str]:
    """Return what is in *folder*."""
    return sorted(path.name for path in folder.iterdir())


async def test_every_line_is_an_event_of_the_consultation_that_it_names(tmp_path: Path) -> None:
    """Byte for byte, in order within a consultation, several batches at a time; empty lines are none."""
    events = [event(number, consultation_id=f"c-{number % 7}") for number in range(300)]
    file = written(tmp_path / "events.ndjson", [*events[:100], b"", *events[100:]])
    service = MemoryService()
    async with scripted(service.step) as server:
        result = await post(file, "--url", server.url, "--batch", "20")
    assert (0, posting_to(server.url)) == (result.code, result.err)
    assert (300, 0, 0) == (result.number("accepted"), result.number("duplicates"), result.number("retried"))
    for consultation in range(7):
        assert events[consultation::7] == service.bodies(f"c-{consultation}")
    assert max(service.sizes) == 20
    assert not file.with_name("events.ndjson.posting").exists()


async def test_a_terminal_shows_how_far_it_is(tmp_path: Path) -> None:
    """A bar for the look through the file and one for the posting, to the last event; nothing of it in a pipe."""
    file = written(tmp_path / "events.ndjson", [event(number) for number in range(3000)])
    service = MemoryService(numbered=False)
    screen, terminal = pty.openpty()
    async with scripted(service.step) as server:
        arguments = (file, "--url", server.url, "--consultation", "c-1", "--batch", "100")
        process = await started(*arguments, stderr=terminal, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"})
        os.close(terminal)
        shown = asyncio.create_task(asyncio.to_thread(everything, screen))
        result = await ended(process)
        text = await shown
    assert 0 == result.code
    bars = re.findall(r"(checking|posting)[^\r\n]*?(\d+)%[^\r\n]*?events: ([\d,]+)", text)
    assert {"checking", "posting"} == {name for name, _, _ in bars}
    assert ("posting", "100", "3,000") == bars[-1]
    done = [int(percent) for name, percent, _ in bars if name == "posting"]
    assert sorted(done) == done
    assert SECRET not in text


def everything(screen: int) -> str:
    """Return what was written to a terminal until its last writer closed it."""
    text = b""
    with open(screen, "rb", buffering=0) as file, contextlib.suppress(OSError):  # EIO: the writer has closed it
        while piece := file.read(65536):
            text += piece
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())


async def test_lines_without_a_consultation_are_of_the_one_that_the_command_names(tmp_path: Path) -> None:
    """Those that name their own stay there."""
    events = [event(1), event(2, consultation_id="c-2"), event(3)]
    service = MemoryService()
    async with scripted(service.step) as server:
        result = await post(
            written(tmp_path / "x", events), "--url", server.url, "--consultation", "c-1", "--concurrency", "1"
        )
    assert 0 == result.code
    assert ([events[0], events[2]], [events[1]]) == (service.bodies("c-1"), service.bodies("c-2"))


async def test_the_keys_are_those_of_the_file_and_the_lines(tmp_path: Path) -> None:
    """An event_id is a line's own key; the others have the file's SHA-256, the block, the number in it."""
    events = [event(1), b"", event(3, event_id="mine")]
    file = written(tmp_path / "x", events)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    service = MemoryService()
    async with scripted(service.step) as server:
        await post(file, "--url", server.url, "--consultation", "c-1")
    assert [event_id_from_key(f"{digest}.0:1"), event_id_from_key("mine")] == [key for _, key in service.events]


async def test_exported_events_are_posted_byte_for_byte_under_their_own_ids(tmp_path: Path) -> None:
    """So what is stored already is not stored again, and spaces, long numbers and members like ours stay."""
    bodies = [
        b'{"event_type": "A", "payload": {"dose": 1.10, "n": 123456789012345678901234567890}}',
        b'{"event_type":"x\\",\\"event\\":","event":{"event":1},"event_id":"not this"}',
    ]
    records = [EventRecord(f"c-{n}", 7 + n, n, n + 1, UUID(int=n + 1).bytes, body) for n, body in enumerate(bodies)]
    file = tmp_path / "exported.ndjson"
    file.write_bytes(b"".join(exported_lines(records, Format.NDJSON)))
    service = MemoryService()
    async with scripted(service.step) as server:
        result = await post(file, "--exported", "--url", server.url)
    assert (0, posting_to(server.url)) == (result.code, result.err)
    assert {(f"c-{n}", UUID(int=n + 1)): body for n, body in enumerate(bodies)} == service.events


@pytest.mark.parametrize(
    "line", [b"{}", b'{"event_type":"A"}', b'{"consultation":"c","event_id":"x","event":{}}', b"x"]
)
async def test_what_was_not_exported_is_refused(tmp_path: Path, line: bytes) -> None:
    """By its number, and nothing is sent."""
    file = tmp_path / "x"
    file.write_bytes(line + b"\n")
    result = await post(file, "--exported", "--url", "http://127.0.0.1:1")
    assert (1, True) == (result.code, "line 1: it is not a line of `fiq export" in result.err)


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "one by one"])
async def test_posting_again_repeats_nothing(tmp_path: Path, batches: bool) -> None:
    """Whether the service takes batches or not, today or after an update: the keys are the same."""
    file = written(tmp_path / "x", [event(number, consultation_id=f"c-{number % 9}") for number in range(90)])
    service = MemoryService(batches=batches)
    async with scripted(service.step) as server:
        first = await post(file, "--url", server.url)
        service.batches = True
        second = await post(file, "--url", server.url)
    assert (0, 0) == (first.code, second.code)
    assert (0, 90, 90) == (first.number("duplicates"), second.number("duplicates"), len(service.events))


async def test_a_batch_that_the_service_finds_too_large_is_sent_in_parts(tmp_path: Path) -> None:
    """Its limits are its own."""
    events = [event(number) for number in range(30)]
    service = MemoryService(most=4)
    async with scripted(service.step) as server:
        result = await post(written(tmp_path / "x", events), "--url", server.url, "--consultation", "c-1")
    assert (0, events) == (result.code, service.bodies("c-1"))


async def test_blocks_of_a_long_file_do_not_mix(tmp_path: Path) -> None:
    """A key has the number of the block in it: line 10,001 is line 1 of the second."""
    events = [event(number) for number in range(10_050)]
    service = MemoryService(numbered=False)
    async with scripted(service.step) as server:
        options = ("--url", server.url, "--consultation", "c-1", "--key", "k", "--batch", "300")
        result = await post(written(tmp_path / "x", events), *options)
    assert (0, events) == (result.code, service.bodies("c-1"))
    assert event_id_from_key("k.1:50") == list(service.events)[-1][1]


async def test_a_file_with_bad_lines_is_not_sent(tmp_path: Path) -> None:
    """Each is named by its number, none is quoted."""
    bad = [
        event(1),
        b'{"no":"type"}',
        b"",
        f"{SECRET}".encode(),
        event(5, consultation_id="a/b"),
        event(6, consultation_id=7),
        event(7, event_id="two words"),
        b"[]",
    ]
    async with scripted(MemoryService().step) as server:
        result = await post(written(tmp_path / "x", bad), "--url", server.url, "--consultation", "c-1")
        nameless = await post(written(tmp_path / "y", [event(1)]), "--url", server.url)
    assert (1, "") == (result.code, result.out)
    assert ["2", "4", "5", "6", "7", "8"] == re.findall(r"^line (\d+): ", result.err, re.MULTILINE)
    assert "6 of 7 lines cannot be events; nothing was sent" in result.err
    assert "line 4: it is not JSON in UTF-8, from its column 1 on\n" in result.err
    assert (1, True) == (nameless.code, "--consultation" in nameless.err)
    assert "1 of 1 line cannot be an event; nothing was sent" in nameless.err
    assert [] == server.seen


async def test_a_token_that_is_missing_is_asked_for_by_its_option(tmp_path: Path) -> None:
    """The user of the command knows options, not headers."""
    file = written(tmp_path / "x", [event(1, consultation_id="c-1")])
    async with scripted(refused(401, "unauthorized")) as server:
        result = await post(file, "--url", server.url)
    assert 1 == result.code
    assert "line 1: refused: 401 /problems/unauthorized" in result.err
    assert "--token-file or FI_TOKEN" in result.err


async def test_from_a_pipe_lines_go_as_they_come() -> None:
    """A bad one ends it; those before it are accepted. The printed key repeats none of them."""
    lines = b"\n".join([event(1), event(2), b"{}", event(4)])
    service = MemoryService()
    async with scripted(service.step) as server:
        arguments = ("-", "--url", server.url, "--consultation", "c-1")
        result = await post(*arguments, stdin=lines)
        found = re.search(r"--key (\S+)", result.err)
        assert found is not None
        again = await post(*arguments, "--key", found[1], stdin=lines.replace(b"{}", event(3)))
    assert 1 == result.code
    assert "line 3: event_type is required" in result.err
    assert "2 lines accepted in this run" in result.err
    assert (0, 2) == (again.code, again.number("duplicates"))
    assert [event(number) for number in (1, 2, 3, 4)] == service.bodies("c-1")


async def test_a_file_on_stdin_has_the_keys_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be read twice as well, but there is no file for the progress."""
    monkeypatch.chdir(tmp_path)
    written(Path("x"), [event(1), event(2)])
    service = MemoryService()
    command = f"'{sys.executable}' -m services.cli.main post"
    async with scripted(service.step) as server:
        options = f"--url {server.url} --consultation c-1"
        await (await asyncio.create_subprocess_shell(f"{command} x {options}")).wait()
        service.refuses = event(1)
        process = await asyncio.create_subprocess_shell(f"{command} - {options} < x", stderr=asyncio.subprocess.PIPE)
        result = await process.communicate()
    assert b"line 1: too bad" in result[1]
    assert b"0 lines accepted in this run; the same command continues and repeats none" in result[1]
    assert 1 == len({request.key for request in server.seen})
    assert ["x"] == names(tmp_path)


async def test_an_open_pipe_is_posted_before_it_ends() -> None:
    """Each line is posted when it arrives; an incomplete one waits."""
    service = MemoryService()
    async with scripted(service.step) as server:
        process = await started("-", "--url", server.url, "--consultation", "c-1")
        assert process.stdin is not None
        process.stdin.write(event(1) + b"\n" + event(2))
        await process.stdin.drain()
        await eventually(lambda: service.bodies("c-1") == [event(1)])
        process.send_signal(signal.SIGINT)
        result = await ended(process)
        assert (130, [event(1)]) == (result.code, service.bodies("c-1"))
        told = result.err.rpartition("continue with:  ")[2].strip()
        assert re.fullmatch(rf"fiq post - --url {server.url} --consultation c-1 --key \S+", told)
        again = await post(*shlex.split(told)[2:], stdin=event(1) + b"\n" + event(2))
    assert (0, 1) == (again.code, again.number("duplicates"))
    assert [event(1), event(2)] == service.bodies("c-1")


async def test_a_pipe_that_was_killed_goes_on_under_the_key_that_was_told_first() -> None:
    """Nothing else knows a key that was made for the run."""
    service = MemoryService()
    async with scripted(service.step) as server:
        arguments = ("-", "--url", server.url, "--consultation", "c-1")
        process = await started(*arguments)
        assert process.stdin is not None
        process.stdin.write(event(1) + b"\n")
        await process.stdin.drain()
        await eventually(lambda: service.bodies("c-1") == [event(1)])
        process.kill()
        found = re.search(r"--key (\S+)", (await ended(process)).err)
        assert found is not None
        again = await post(*arguments, "--key", found[1], stdin=event(1) + b"\n" + event(2))
    assert (0, 1, posting_to(server.url)) == (again.code, again.number("duplicates"), again.err)
    assert [event(1), event(2)] == service.bodies("c-1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_posting_that_was_stopped_goes_on_and_repeats_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Also not the batch that was on its way: whether it was stored or not, its keys are the same."""
    events = [event(n, consultation_id="c-1") for n in range(40)]
    file = written(tmp_path / "events.ndjson", events)
    service = MemoryService()
    hold = asyncio.Event()

    async def step(request: Any) -> Any:
        answer = await service.step(request)
        if len(service.sizes) == 2:  # stored, and never answered
            await hold.wait()
        return answer

    async with scripted(step) as server:
        process = await started(file, "--url", server.url, "--batch", "10", "--concurrency", "1")
        await eventually(lambda: len(service.events) == 20)
        process.send_signal(number)
        stopped = await ended(process)
        hold.set()
        state = tmp_path / "events.ndjson.posting"
        assert 0o600 == stat.S_IMODE(state.stat().st_mode)
        assert SECRET not in state.read_text()
        again = await post(file, "--url", server.url)
    assert (128 + number, "") == (stopped.code, stopped.out)
    assert f"{number.name}: 10 lines accepted in this run; lines 1 to 10 are all accepted" in stopped.err
    assert "the same command continues" in stopped.err
    assert (0, 30, 10) == (again.code, again.number("accepted"), again.number("duplicates"))
    assert events == service.bodies("c-1")
    assert not state.exists()


async def test_a_crash_repeats_nothing_either(tmp_path: Path) -> None:
    """SIGKILL leaves no time to note how far it came: the keys alone see to it."""
    events = [event(n, consultation_id=f"c-{n % 5}") for n in range(3000)]
    file = written(tmp_path / "events.ndjson", events)
    service = MemoryService()
    async with scripted(service.step) as server:
        process = await started(file, "--url", server.url, "--batch", "3")
        await eventually(lambda: len(service.events) > 50)
        process.kill()
        await process.communicate()
        assert 3000 > len(service.events)
        again = await post(file, "--url", server.url)
    assert (0, 3000) == (again.code, len(service.events))
    for consultation in range(5):
        assert events[consultation::5] == service.bodies(f"c-{consultation}")


async def test_a_refused_line_is_named_and_its_correction_goes_on(tmp_path: Path) -> None:
    """By the number in the file. As the file has changed then, the command asks for the key instead of repeating."""
    events = [event(n, consultation_id="c-1") for n in range(10)]
    file = written(tmp_path / "events.ndjson", events)
    service = MemoryService(refuses=events[7])
    async with scripted(service.step) as server:
        arguments = (file, "--url", server.url, "--batch", "4")
        refusal = await post(*arguments)
        service.refuses = None
        events[7] = event(77, consultation_id="c-1")
        written(file, events)
        unsaid = await post(*arguments)
        found = re.search(r"--key (\S+)", unsaid.err)
        assert found is not None
        said = await post(*arguments, "--key", found[1])
    assert (1, True) == (refusal.code, "line 8: too bad (/problems/invalid-batch)" in refusal.err)
    assert (1, True) == (unsaid.code, "has changed since" in unsaid.err)
    assert (0, events) == (said.code, service.bodies("c-1"))


async def test_a_service_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    """After --patience; what to do then is said."""
    file = written(tmp_path / "x", [event(n) for n in range(3)])
    async with scripted(refused(503, "log-full")) as server:
        result = await post(file, "--url", server.url, "--consultation", "c-1", "--patience", "1")
    assert 1 == result.code
    assert "lines 1 to 3: not done within 1 s: 503 /problems/log-full" in result.err
    assert "0 lines accepted in this run" in result.err
    assert "the same command continues" in result.err


async def test_a_service_that_does_not_answer_is_reported_while_it_is_tried(tmp_path: Path) -> None:
    """Once, with the URL and how long it is tried, so that a wrong port shows before --patience is over."""
    file = written(tmp_path / "x", [event(1, consultation_id="c-1")])
    result = await post(file, "--url", "http://127.0.0.1:1", "--patience", "6")
    assert 1 == result.code
    assert 1 == result.err.count("http://127.0.0.1:1 accepts nothing at the moment")


async def test_an_exported_file_without_its_option_is_recognised(tmp_path: Path) -> None:
    """A file of `fiq export` is no file of events; the message names the option."""
    file = tmp_path / "x"
    file.write_bytes(b'{"consultation":"c","event_id":"x","event_type":"A","event":{}}\n')
    result = await post(file, "--url", "http://127.0.0.1:1")
    assert (1, True) == (result.code, "add --exported" in result.err)


async def test_failures_that_pass_are_counted(tmp_path: Path) -> None:
    """They cost time, nothing else."""
    events = [event(n) for n in range(40)]
    service = MemoryService(fails={1, 3})
    async with scripted(service.step) as server:
        result = await post(
            written(tmp_path / "x", events), "--url", server.url, "--consultation", "c-1", "--batch", "10"
        )
    assert (0, 2, 0) == (result.code, result.number("retried"), result.number("duplicates"))
    assert events == service.bodies("c-1")


async def test_consultations_are_sent_side_by_side(tmp_path: Path) -> None:
    """As many batches as --concurrency says, each consultation's one after the other."""
    events = [event(n, consultation_id=f"c-{n}") for n in range(200)]
    service = MemoryService(gate=asyncio.Event())
    async with scripted(service.step) as server:
        process = await started(written(tmp_path / "x", events), "--url", server.url, "--concurrency", "3")
        await eventually(lambda: service.most_at_once == 3)
        assert service.gate is not None
        service.gate.set()
        assert 0 == (await ended(process)).code
    assert 3 == service.most_at_once


async def test_where_it_posts_to_is_said_before_the_first_event(tmp_path: Path) -> None:
    """An address from the environment, too: whoever listens there gets the events."""
    service, said = MemoryService(), asyncio.Event()

    async def step(request: Any) -> Any:
        await said.wait()
        return await service.step(request)

    async with scripted(step) as server:
        file = written(tmp_path / "x", [event(1, consultation_id="c-1")])
        process = await started(file, cwd=Path.cwd(), env=os.environ | {"FI_URL": server.url})
        assert process.stderr is not None
        line = await asyncio.wait_for(process.stderr.readline(), 20)
        assert [] == service.bodies("c-1")
        said.set()
        result = await ended(process)
    assert f"fiq: posting to {server.url} (FI_URL)\n" == line.decode()
    assert (0, 1) == (result.code, result.number("accepted"))


@pytest.mark.parametrize("way", ["file", "environment"])
async def test_the_token_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """From a file, or from FI_TOKEN; it is in no argument, where other users of the machine would see it."""
    (tmp_path / "token").write_text("t0ken\n")
    monkeypatch.setenv("FI_TOKEN", "t0ken" if way == "environment" else "another")
    option: list[str | Path] = ["--token-file", tmp_path / "token"] if way == "file" else []
    async with scripted(MemoryService().step) as server:
        file = written(tmp_path / "x", [event(1)])
        result = await post(file, "--url", server.url, "--consultation", "c-1", *option)
    assert (0, "Bearer t0ken") == (result.code, server.seen[0].headers["Authorization"])


@pytest.mark.parametrize(
    ("arguments", "code", "advice"),
    [
        (["nowhere.ndjson"], 1, "cannot read nowhere.ndjson"),
        (["x", "--token-file", "nowhere"], 1, "cannot read nowhere"),
        (["x", "--consultation", "a/b"], 2, "a consultation id is"),
        (["x", "--key", "two words"], 2, "an idempotency key is"),
        (["x", "--key", "k" * 201], 2, "--key is at most"),
        (["x"], 1, "name the service with --url or FI_URL"),
        (["x", "--folder", "nowhere"], 1, "fiq up"),
        (["x", "--url", "nonsense", "--consultation", "c-1"], 2, "http://host:port"),
        (["x", "--url", "https://x", "--ca-file", "nowhere", "--consultation", "c"], 1, "cannot read certificates"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, advice: str
) -> None:
    """Without a traceback, with exit code 1; 2 if an argument is malformed."""
    monkeypatch.chdir(tmp_path)
    written(Path("x"), [event(1)])
    result = CliRunner().invoke(app, ["post", *arguments])
    assert (code, "") == (result.exit_code, result.stdout)
    assert result.stderr.startswith("fiq: ")
    assert advice in result.stderr


async def test_the_documented_exit_codes_are_those_that_the_command_has(tmp_path: Path) -> None:
    """docs/cli.md says what each means to a script."""
    (line,) = re.findall(r"^Exit codes: (.*)$", DOCUMENT, re.MULTILINE)
    documented = {int(code) for code in re.findall(r"\b\d+\b", line)}
    file = written(tmp_path / "x", [event(1)])
    async with scripted(MemoryService().step, refused(401, "unauthorized")) as server:
        options = ("--url", server.url, "--consultation", "c-1")
        seen = {(await post(file, *options)).code, (await post(file, *options)).code, (await post(file, "--nope")).code}
    assert documented == seen | {128 + signal.SIGINT, 128 + signal.SIGTERM}
