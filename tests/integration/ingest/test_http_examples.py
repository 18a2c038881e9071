"""The commands of docs/http.md, run in their order against a running stack: they answer what the page says.

In the answers of the page `…` stands for anything. An answer without a command before it is what the command before
gets when it is sent again.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.embedded.processes import Cluster
from tests.support.persisters import PARTITIONS, Persister
from tests.support.polling import eventually_sync
from tests.support.service import Service

PAGE = Path(__file__).parents[3] / "docs" / "http.md"
#: a block of the page: what it is in, and its text
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: exit code of curl at its `--max-time`
_TIMEOUT = 28


def examples(text: str) -> Iterator[tuple[str, str]]:
    """Return each command with the answer that is shown for it; empty when none is."""
    command = last = ""
    for kind, block in _BLOCK.findall(text):
        if kind == "sh":
            if command:
                yield command, ""
            command = last = block
        else:
            yield command or last, block
            command = ""
    if command:
        yield command, ""


class Shell:
    """Runs commands of the page, against other ports than they name."""

    def __init__(self, home: Path, port: int, management_port: int) -> None:
        (home / ".curlrc").write_text("include\nsilent\nshow-error\n")
        self.environment = os.environ | {"CURL_HOME": str(home)}
        self._ports = {":7001": f":{port}", ":7101": f":{management_port}"}

    def run(self, command: str) -> str:
        """Return what *command* writes. One that follows does not end: it must still be receiving after two seconds."""
        for documented, used in self._ports.items():
            command = command.replace(documented, used)
        follows = command.startswith("curl -N ")
        command = command.replace("curl -N ", "curl -N --max-time 2 ")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (_TIMEOUT if follows else 0) == done.returncode, f"{command}\n{done.stderr}"
        return done.stdout.replace("\r\n", "\n")

    def checked(self, command: str, shown: str) -> str:
        """Run *command* until it answers what is *shown*, and return that; one that posts is run once only."""

        def answer() -> str:
            answered = self.run(command)
            check(answered, shown)
            return answered

        posts = " -d " in command or " --data" in command
        return answer() if posts else eventually_sync(answer)  # what was accepted is persisted a moment later


def check(answer: str, shown: str) -> None:
    """Compare an *answer* with the one that is *shown*: head and body, the body of a success, or nothing."""
    if not shown.startswith("HTTP/"):
        statuses = re.findall(r"^HTTP/1\.1 (\d+)", answer, re.MULTILINE)
        assert statuses
        assert {"200", "202"} >= set(statuses), answer
        shown = f"\n\n{shown}"
    head, _, body = answer.partition("\n\n")
    shown_head, _, shown_body = shown.partition("\n\n")
    for line in shown_head.splitlines():
        assert any(_alike(line, other) for other in head.splitlines()), f"{line} is not in {head}"
    assert not shown_body or _alike(shown_body, body), f"{shown_body}\n---\n{body}"


def _alike(shown: str, text: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in shown.replace("\n", "").split("…"))
    return re.fullmatch(pattern, text.replace("\n", "")) is not None


async def test_the_page_says_what_is_answered(fresh_log: Cluster, tmp_path: Path) -> None:
    """Each block of commands is run, none left out."""
    if shutil.which("curl") is None:
        assert "CI" not in os.environ, "CI has curl"
        pytest.skip("the examples need curl")
    settings = {"FI_PORT": "0", "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "1MiB"}
    settings |= {"FI_LOG_URL": fresh_log.url, "FI_PARTITIONS": str(PARTITIONS)}
    with (
        Persister(tmp_path / "persister", fresh_log, tmp_path / "data", FI_DEAD_MAX_BYTES="1MiB") as persister,
        Service(tmp_path, "services.ingest", **settings) as service,
    ):
        await persister.ready()
        started = await asyncio.to_thread(service.wait_for, "INGEST_STARTED")
        await asyncio.to_thread(_run_all, Shell(tmp_path, started["port"], started["management_port"]))


def _run_all(shell: Shell) -> None:
    text = PAGE.read_text()
    ran = []
    for command, shown in examples(text):
        assert "curl" in command
        ran.append(command)
        if shown.startswith('{"event_type":'):  # not the answer, but what it stores
            shell.run(command)
            assert shown.strip() in shell.run("curl 'http://127.0.0.1:7001/consultations/c-1/events?limit=1000'")
            continue
        answer = shell.checked(command, shown)
        if len(ran) == 1:
            location = re.search(r"^Location: .*/(.+)$", answer, re.MULTILINE)
            assert location is not None
            shell.environment["MESSAGE_ID"] = location[1]
    assert {block for kind, block in _BLOCK.findall(text) if kind == "sh"} == set(ran)
    assert len(set(ran)) >= 10
