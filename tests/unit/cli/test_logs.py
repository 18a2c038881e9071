"""`fiq logs`: one readable stream from the logs of all processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.main import app

LINES: dict[str, list[dict[str, Any] | str]] = {
    "logs/ingest.log": [
        {"event": "INGEST_STARTED", "level": "info", "timestamp": "2026-11-27T16:00:01.000000Z", "port": 7001},
        {"event": "EVENT_QUEUED", "level": "info", "timestamp": "2026-11-27T16:00:04.500000Z", "consultation": "c-1"},
        "Traceback (most recent call last):",
    ],
    "logs/persister-1.log": [
        {
            "event": "EVENT_PERSIST_FAILED",
            "level": "error",
            "timestamp": "2026-11-27T16:00:03.000000Z",
            "reason": "no space left",
            "partitions": [1, 2],
            "service": "persister",
            "component": "rounds",
        },
    ],
    "cluster/n1.log": [
        "[585] 2026/11/27 16:00:00.293140 [INF] Starting nats-server",
        "[585] 2026/11/27 16:00:02.000000 [WRN] a \x1b[2J warning",
    ],
}
SHOWN = [
    "2026-11-27 16:00:00.293  n1           info     Starting nats-server",
    "2026-11-27 16:00:01.000  ingest       info     INGEST_STARTED port=7001",
    "2026-11-27 16:00:02.000  n1           warning  a \\u001b[2J warning",
    '2026-11-27 16:00:03.000  persister-1  error    EVENT_PERSIST_FAILED reason="no space left" partitions="[1, 2]"',
    "2026-11-27 16:00:04.500  ingest       info     EVENT_QUEUED consultation=c-1",
    "2026-11-27 16:00:04.500  ingest       info     Traceback (most recent call last):",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stack that has ended; the machine's clock shows UTC."""
    for name, lines in LINES.items():
        path = tmp_path / ".fiq" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    return tmp_path / ".fiq"


def shown(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, ["logs", *arguments])
    assert 0 == result.exit_code, result.stderr
    return result.stdout.splitlines()


def test_the_logs_of_all_processes_are_merged_by_time() -> None:
    """Events with their values, nodes' lines as they are, and no control character reaches the terminal."""
    assert SHOWN == shown()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["n1"], [0, 2]),
        (["n1", "persister-1"], [0, 2, 3]),
        (["--level", "warning"], [2, 3]),
        (["--level", "error"], [3]),
        (["--grep", "c-1"], [4]),
        (["--grep", "INGEST_STARTED"], [1]),
        (["-n", "2"], [4, 5]),
        (["-n", "1", "--level", "warning"], [3]),
        (["-n", "0"], [0, 1, 2, 3, 4, 5]),
        (["--since", "2026-11-27T16:00:02Z"], [2, 3, 4, 5]),
        (["--since", "2026-11-27T16:00:01Z", "--until", "2026-11-27T16:00:03Z"], [1, 2]),
        (["--until", "2026-11-26"], []),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_lines_are_chosen_by_process_level_text_time_and_number(arguments: list[str], expected: list[int]) -> None:
    """The last ones are those of what was chosen."""
    assert [SHOWN[number] for number in expected] == shown(*arguments)


def test_json_has_an_object_for_each_line() -> None:
    """Values keep their types."""
    found: list[dict[str, Any]] = [json.loads(line) for line in shown("--json", "--level", "error")]

    expected = {"time": "2026-11-27T16:00:03.000000Z", "process": "persister-1", "level": "error"}
    assert [expected | {"event": "EVENT_PERSIST_FAILED", "reason": "no space left", "partitions": [1, 2]}] == found


def test_of_a_huge_log_only_its_end_is_read(folder: Path) -> None:
    """Unless all lines are asked for; the line that the limit cuts is left out."""
    line = json.dumps({"event": "OLD", "level": "info", "timestamp": "2026-11-27T15:00:00.000000Z", "x": "x" * 1000})
    path = folder / "logs" / "ingest.log"
    path.write_text(f"{line}\n" * 20_000 + path.read_text())

    assert len(shown("-n", "30000", "ingest")) < 20_000 < len(shown("-n", "0", "ingest"))
    assert all(" OLD " in line for line in shown("-n", "30000", "ingest")[:-3])


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [(["--folder", "elsewhere"], "there are no logs in elsewhere"), (["n9"], "it has n1, ingest, persister-1")],
)
def test_what_is_not_there_is_said(arguments: list[str], advice: str) -> None:
    """With what there is."""
    result = CliRunner().invoke(app, ["logs", *arguments])
    assert (1, "", True) == (result.exit_code, result.stdout, advice in result.stderr)


def test_lines_of_nodes_are_in_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """nats-server writes it; all is shown in UTC."""
    monkeypatch.setenv("TZ", "EST5")
    time.tzset()
    try:
        assert "2026-11-27 21:00:00.293  n1           info     Starting nats-server" == shown("n1")[0]
    finally:
        os.environ["TZ"] = "UTC"
        time.tzset()
