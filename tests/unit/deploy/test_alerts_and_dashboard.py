"""The rules of Prometheus and the dashboard of Grafana are tested and documented, and use metrics that exist."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.prometheus import DASHBOARD, DEPLOY, PROMETHEUS, RULE_TESTS, dashboard_queries, metric_names, rules

DOCS = Path(__file__).parents[3] / "docs"
ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
RECORDED = {rule["record"]: rule for rule in rules("recording.yml")}
#: what a paragraph of the runbook needs to say something
PARAGRAPH = 150


@cache
def documented_metrics() -> set[str]:
    """Return each name that /metrics shows: a histogram has three."""
    names = set()
    for entry in re.findall(r"^- (`fi_.*?`): ", (DOCS / "metrics.md").read_text(), re.MULTILINE):
        for name, labels in re.findall(r"`(\w+)([^`]*)`", entry):
            names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if re.search(r"\ble\b", labels) else {name}
    return names


def expressions() -> dict[str, str]:
    """Return every expression of the rules and of the dashboard, by its name or its panel."""
    found = {name: rule["expr"] for name, rule in [*ALERTS.items(), *RECORDED.items()]}
    return found | {f"{title}: {expr}": expr for title, expr in dashboard_queries()}


@cache
def cases_of_alerts() -> list[dict[str, Any]]:
    """Return what the tests of the rules expect."""
    return [
        case
        for path in RULE_TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_shown_to_fire_and_to_stay_quiet(alert: str) -> None:
    """An alert that always fires is as bad as one that never does; one with a `for` is shown to wait as well."""
    fires = [bool(case["exp_alerts"]) for case in cases_of_alerts() if case["alertname"] == alert]
    assert fires.count(True) >= 1
    assert fires.count(False) >= 1 + ("for" in ALERTS[alert])


def test_no_test_is_about_an_alert_that_does_not_exist() -> None:
    """promtool accepts one, and it would prove nothing."""
    assert set(ALERTS) == {case["alertname"] for case in cases_of_alerts()}


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_what_is_wrong_and_where_to_read_on(alert: str) -> None:
    """The link leads to the alert's own paragraph."""
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert {"summary", "description", "runbook_url"} == rule["annotations"].keys()
    assert f"{{{{ $externalLabels.docs }}}}/runbook.md#{alert.lower()}" == rule["annotations"]["runbook_url"]


def test_the_base_of_the_links_is_configurable() -> None:
    """FIQ_DOCS_URL in .env, the address of docs/ wherever operators read it, becomes the external label `docs`."""
    labels = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["external_labels"]
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["prometheus"]
    assert {"docs": "${FIQ_DOCS_URL}"} == labels
    assert {"FIQ_DOCS_URL": "${FIQ_DOCS_URL:-docs}"} == service["environment"]
    assert "--enable-feature=expand-external-labels" in service["command"]


def test_the_runbook_has_a_paragraph_for_each_alert_and_for_nothing_else() -> None:
    """In the order of the rules."""
    sections = re.findall(
        r"^## (\w+)\n\n(.*?)(?=\n## |\Z)", (DOCS / "runbook.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert list(ALERTS) == [heading for heading, _ in sections]
    assert [] == [heading for heading, text in sections if len(text) < PARAGRAPH]


@pytest.mark.parametrize("expression", expressions().values(), ids=expressions().keys())
def test_each_expression_uses_metrics_that_exist(expression: str) -> None:
    """One that was renamed would leave an alert silent and a panel empty."""
    used = metric_names(expression)
    assert set() == used - documented_metrics() - RECORDED.keys()


def test_each_recorded_series_is_used() -> None:
    """By an alert or by the dashboard."""
    everything = set().union(*(metric_names(expression) for expression in expressions().values()))
    assert RECORDED.keys() <= everything


def test_the_dashboard_asks_in_the_order_of_an_operator() -> None:
    """Its panels have ids of their own and queries with references; Grafana drops one of two that are alike."""
    dashboard = json.loads(DASHBOARD.read_text())
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert [
        "Are clients served?",
        "Is the backlog growing?",
        "Who owns what?",
        "Is the cluster whole?",
        "Are disks and commits fast?",
    ] == rows
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        references = [target["refId"] for target in panel.get("targets", ())]
        assert all(references)
        assert len(references) == len(set(references))


def test_the_dashboard_asks_the_data_source_that_is_provisioned() -> None:
    """By its uid, which is fixed."""
    provisioned = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    used = set(re.findall(r'"uid": "(fiq-\w+)"', DASHBOARD.read_text()))
    assert {source["uid"]} == used
