"""The container tests are skipped without Docker, unless FIQ_REQUIRE_DOCKER says that they must run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def docker(folder: Path, **env: str) -> tuple[int, str]:
    """Run `.ci/docker` with DOCKER_HOST at a socket without a server; return its exit code and output."""
    nowhere = {"DOCKER_HOST": f"unix://{folder / 'no-server.sock'}"}
    known = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "FIQ_"))}
    done = subprocess.run(
        [ROOT / ".ci" / "docker"], env=known | nowhere | env, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout


def test_an_engine_that_does_not_answer_is_no_reason_to_skip(tmp_path: Path) -> None:
    """CI would otherwise skip the container tests for ever, without a failure."""
    assert (0, "FIQ_REQUIRE_DOCKER=1\n") == docker(tmp_path)


def test_no_docker_is_required_with_fiq_no_docker(tmp_path: Path) -> None:
    """For a machine that has a docker command and no engine."""
    assert (0, "") == docker(tmp_path, FIQ_NO_DOCKER="1")


def compose_test(folder: Path, **env: str) -> str:
    """Run a container test with no docker command on the PATH; return pytest's output."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "FIQ_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/compose/test_files.py", "-k"]
    done = subprocess.run(
        [*command, "no_port_is_open_beyond_loopback"],
        cwd=ROOT,
        env=known | {"PATH": str(folder)} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


def test_without_docker_the_tests_of_containers_are_skipped_with_the_reason(tmp_path: Path) -> None:
    """Work on other parts does not need Docker."""
    said = compose_test(tmp_path)
    assert re.search(r"^SKIPPED .*no containers here: there is no docker command$", said, re.MULTILINE), said
    assert "1 skipped" in said


def test_where_docker_is_required_they_fail_without_it(tmp_path: Path) -> None:
    """In CI, a skipped test would never run."""
    said = compose_test(tmp_path, FIQ_REQUIRE_DOCKER="1")
    assert "FIQ_REQUIRE_DOCKER=1, but there is no docker command" in said
    assert "1 error" in said
