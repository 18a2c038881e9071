"""What the real Prometheus of the deployment finds to ask. Which alert fires for which fault: test_faults.py."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.support.compose.alerts import Watch
from tests.support.compose.engine import PACE
from tests.support.compose.stack import Deployment
from tests.support.polling import eventually

pytestmark = pytest.mark.timeout(420)


def test_promtool_takes_the_configuration_with_its_rules(stack: Deployment) -> None:
    """Where Prometheus runs, so that every file that it names is looked for and read."""
    said = stack("exec", "-T", "prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    for rules in (stack.folder / "prometheus" / "rules").glob("*.yml"):
        _, found, rest = said.partition(f"Checking /etc/prometheus/rules/{rules.name}\n")
        assert found, said
        assert re.match(r"\s*SUCCESS: [1-9]\d* rules found", rest), said


async def test_every_target_answers(stack: Deployment) -> None:
    """Scaled services are found by their names: two ingests, two persisters."""
    watch = Watch(stack)

    async def all_up() -> bool:
        found = await watch.query('up{job=~"ingest|persister"} == 1')
        return ["ingest", "ingest", "persister", "persister"] == sorted(one["metric"]["job"] for one in found)

    await eventually(all_up, 60, PACE)
    assert await asyncio.to_thread(stack.states) == {"healthy"}


async def test_no_alert_fires_on_a_healthy_deployment(stack: Deployment) -> None:
    """One that always does would be ignored."""
    watch = Watch(stack)
    assert await watch.query("up"), "Prometheus answers nothing"

    async def quiet() -> bool:
        return not await watch.query('ALERTS{alertstate="firing"}')

    await eventually(quiet, 240, PACE)
