"""Logs: one JSON object a line, library lines included, never a reason to fail."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import orjson
import pytest

from services.core.logs import LEVELS, level


def lines(program: str, *, log_level: str = "info") -> list[dict[str, Any]]:
    """Run *program* in a process of its own, because logging is configured once a process, and return its lines."""
    head = f"import logging\nfrom services.core import logs\nlogs.configure('test', level={log_level!r})\n"
    head += "log = logs.get_logger('unit')\n"
    done = subprocess.run([sys.executable, "-c", head + program], capture_output=True, timeout=30, check=True)
    assert done.stderr == b""
    return [orjson.loads(line) for line in done.stdout.splitlines()]


def test_a_line_is_one_json_object_with_service_component_level_and_time() -> None:
    """Each line has these besides its own keys."""
    (line,) = lines("log.info('EVENT_QUEUED', sequence=7)")
    assert line.pop("timestamp").endswith("Z")
    expected = {"event": "EVENT_QUEUED", "component": "unit", "service": "test", "level": "info", "sequence": 7}
    assert expected == line


def test_lines_below_the_level_are_dropped() -> None:
    """FI_LOG_LEVEL=warning silences the line of each accepted event."""
    assert [line["event"] for line in lines("log.info('A')\nlog.warning('B')", log_level="warning")] == ["B"]


def test_the_audit_log_is_written_at_every_level() -> None:
    """Whoever asks for fewer lines must not lose who was shown what."""
    program = "audit = logs.get_audit_logger()\nlog.error('A')\naudit.info('BODIES_SHOWN', events=1)"
    first, second = lines(program, log_level="error")
    assert ("A", "BODIES_SHOWN", "audit", 1) == (first["event"], second["event"], second["component"], second["events"])


def test_what_libraries_log_comes_as_json_without_the_text_of_exceptions() -> None:
    """An exception's text may quote a body."""
    program = "try:\n raise ValueError('a patient')\nexcept ValueError:\n logging.getLogger('lib').exception('oops')"
    (line,) = lines(program)
    values = tuple(line[key] for key in ("event", "message", "error", "component"))
    assert values == ("LIBRARY", "oops", "ValueError", "lib")
    assert "patient" not in str(line)


def test_asyncios_report_of_a_task_that_was_not_awaited_is_one_line_without_its_error() -> None:
    """Behind the first line stands the exception with its text."""
    (line,) = lines("logging.getLogger('asyncio').error('Task was lost\\nfuture: <ValueError(a patient)>')")
    assert line["message"] == "Task was lost"
    assert "patient" not in str(line)


def test_a_log_that_cannot_be_written_fails_nothing() -> None:
    """A reader that went away must not turn a stored event into an error."""
    program = (
        "import os, sys\nfrom services.core import logs\nlogs.configure('test', json=True)\n"
        "reading, writing = os.pipe()\nos.close(reading)\nos.dup2(writing, 1)\n"
        "logs.get_logger('unit').info('A')\nsys.stderr.write('survived')\nsys.stderr.flush()\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"survived")


def test_lines_of_a_running_loop_are_all_written_in_order() -> None:
    """Also those that wait for others when the process ends, and those of threads in between."""
    program = (
        "import asyncio, time\nasync def main():\n"
        " for n in range(500):\n  log.info('A', n=n)\n"
        " await asyncio.to_thread(log.info, 'A', n=500)\n log.info('A', n=501)\nasyncio.run(main())"
    )
    assert [line["n"] for line in lines(program)] == list(range(502))


@pytest.mark.parametrize(("method", "at_once"), [("info", False), ("error", True)])
def test_an_error_is_written_at_once_and_other_lines_together(method: str, at_once: bool) -> None:
    """After a crash the last error must be there; a write for each accepted event would cost too much."""
    program = f"import asyncio, os\nasync def main():\n log.{method}('A')\n os._exit(0)\nasyncio.run(main())"
    assert bool(lines(program)) == at_once


def test_a_line_waits_only_for_a_moment() -> None:
    """In the log of a quiet service, each line appears at once."""
    body = " log.info('A')\n await asyncio.sleep(1)\n os._exit(0)\n"
    program = f"import asyncio, os\nasync def main():\n{body}asyncio.run(main())"
    assert len(lines(program)) == 1


@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_read_in_either_case(name: str) -> None:
    """FI_LOG_LEVEL=INFO is what many write."""
    assert name == level(name.upper())


def test_an_unknown_level_is_refused() -> None:
    """With what is expected."""
    with pytest.raises(ValueError, match="debug, info"):
        level("loud")
