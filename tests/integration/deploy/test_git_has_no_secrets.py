"""Git contains no secrets, and its ignore rules keep those that a deployment makes out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
#: what `fiq init`, `fiq up` and the build of the image leave in the folder of a checkout
SECRETS = (
    ".env",
    ".docker-build/ca.pem",
    ".fiq/corpus/00.h5",
    "deploy/nats-cluster/.env",
    "deploy/nats-cluster/secrets/ca.key",
    "deploy/nats-cluster/secrets/clients/default.token",
    "fiq/secrets/users/ops.seed",
)


def git(*arguments: str) -> list[str]:
    """Run a command of git that succeeds, and return its lines. Ignores of this machine's user do not count."""
    command = ["git", "-c", "core.excludesFile=", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()


@pytest.fixture(autouse=True)
def checkout() -> None:
    """Skip where this is no git checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout, or there is no git")


def test_git_ignores_secrets() -> None:
    """Not even with `git add .`: the rule is in the .gitignore of the repository."""
    found = [line.split("\t") for line in git("check-ignore", "-v", "--no-index", *SECRETS)]

    assert dict.fromkeys(SECRETS, ".gitignore") == {path: rule.partition(":")[0] for rule, path in found}


def test_git_has_no_ignored_file() -> None:
    """None was added by force or before the rule."""
    assert [] == git("ls-files", "--cached", "--ignored", "--exclude-standard")
