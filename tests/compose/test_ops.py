"""What operators run in containers of their own while the services run."""

from __future__ import annotations

import orjson
import pytest

from tests.support.compose.engine import EngineError
from tests.support.compose.stack import NODES, Deployment

pytestmark = pytest.mark.timeout(300)


def test_the_doctor_sees_everything_and_finds_nothing(stack: Deployment) -> None:
    """As docs/operations.md has it: nothing stays unknown, although no monitoring port can be reached."""
    try:
        report = orjson.loads(stack("run", "--rm", "-T", "ops", "fiq", "doctor", "--json"))
    except EngineError as error:  # with what it found
        pytest.fail(str(error))
    findings = report["findings"]
    assert [] == [one for one in findings if one["level"] != "ok"]
    looked_at = [one["check"] for one in findings if one["what"].startswith(NODES)]
    assert sorted(["clocks", "nodes", "sync_interval"] * len(NODES)) == sorted(looked_at)
