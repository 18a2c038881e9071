"""What operators run in containers of their own while the services run."""

from __future__ import annotations

import orjson
import pytest
from typer.testing import CliRunner

from services.cli.main import app
from tests.support.compose.engine import EngineError
from tests.support.compose.stack import NODES, Deployment
from tests.support.polling import eventually_sync

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


def test_an_operator_lists_dead_letters_with_a_token(stack: Deployment) -> None:
    """As docs/runbook.md has it: the service is found without a URL; the first token may not, and is told so."""
    made = CliRunner().invoke(app, ["token", "new", "operator", "--scopes", "ops", "--deployment", str(stack.folder)])
    assert 0 == made.exit_code
    run = ("run", "--rm", "-T", "-e")

    def listed() -> str:
        return stack(*run, f"FI_TOKEN={made.stdout.strip()}", "ops", "fiq", "dead", "list", "--json")

    assert isinstance(orjson.loads(eventually_sync(listed)), list)
    with pytest.raises(EngineError, match="lacks the scope ops"):
        stack(*run, f"FI_TOKEN={stack.token}", "ops", "fiq", "dead", "list")
