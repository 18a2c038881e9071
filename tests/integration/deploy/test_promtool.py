"""Prometheus's own checker accepts the configuration and the rules, and runs the tests of the rules."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.prometheus import PROMETHEUS, RULE_TESTS, tool


def promtool(*arguments: str, cwd: Path = PROMETHEUS) -> None:
    done = subprocess.run([tool("promtool"), *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert 0 == done.returncode, done.stdout + done.stderr


def test_promtool_accepts_the_configuration() -> None:
    """Names of services need not resolve where it is checked."""
    promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_promtool_accepts_the_rules() -> None:
    """All of them; a complaint of its linter is an error."""
    promtool("check", "rules", "--lint-fatal", *sorted(str(path) for path in (PROMETHEUS / "rules").glob("*.yml")))


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: str(path.stem))
def test_promtool_runs_the_tests_of_the_rules(path: Path) -> None:
    """What fires each alert, and what does not."""
    promtool("test", "rules", path.name, cwd=path.parent)
