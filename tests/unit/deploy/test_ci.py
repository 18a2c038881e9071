"""What CI asks of the tests of containers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


def docker(folder: Path, **env: str) -> tuple[int, str]:
    """Run `.ci/docker` where the engine is said to be at a socket that nobody listens on; its code and output."""
    nowhere = {"DOCKER_HOST": f"unix://{folder / 'nobody.sock'}"}
    known = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "FIQ_"))}
    done = subprocess.run(
        [ROOT / ".ci" / "docker"], env=known | nowhere | env, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout


def test_an_engine_that_does_not_answer_is_no_reason_to_skip(tmp_path: Path) -> None:
    """Those tests would never run again, and nobody would know."""
    assert (0, "FIQ_REQUIRE_DOCKER=1\n") == docker(tmp_path)


def test_who_wants_no_containers_says_so(tmp_path: Path) -> None:
    """On a machine with a docker command and nothing behind it."""
    assert (0, "") == docker(tmp_path, FIQ_NO_DOCKER="1")
