"""The Prometheus files of deploy/ as tests read them, and a real Prometheus on loopback that uses them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.embedded.processes import LOOPBACK, free_ports
from tests.support.polling import eventually_sync

DEPLOY = Path(__file__).parents[2] / "deploy" / "nats-cluster"
PROMETHEUS = DEPLOY / "prometheus"
#: the files with which promtool tests the rules
RULE_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "fiq.json"
#: a query may take this long on a busy machine, seconds
_QUERY_TIMEOUT = 10.0


def tool(name: str) -> str:
    """Return the path of ``prometheus`` or ``promtool``; where it is missing the test is skipped, but not in CI."""
    program = shutil.which(name)
    if program is None:
        message = f"{name} is not installed (package prometheus)"
        if os.environ.get("FIQ_CI_REQUIRE_TOOLS") or os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return program


def rules(file: str) -> list[dict[str, Any]]:
    """Return the rules of ``rules/<file>``."""
    content = yaml.safe_load((PROMETHEUS / "rules" / file).read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def dashboard_queries() -> list[tuple[str, str]]:
    """Return title and expression of each query of the dashboard, in its order."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", ())]


def metric_names(expression: str) -> set[str]:
    """Return the names of our metrics (``fi_…``) and of our recorded series (``fiq:…``) in *expression*."""
    return set(re.findall(r"\b(?:fi_|fiq:)[a-z0-9_:]+", expression))


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://{LOOPBACK}:{port}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that *expression* has now; one whose value is NaN is no answer."""
        found: list[dict[str, Any]] = self._get("/api/v1/query", query=expression)["result"]
        return [series for series in found if series["value"][1] != "NaN"]

    def alerts(self) -> dict[str, set[str]]:
        """Return the state, ``pending`` or ``firing``, of each alert that is active."""
        found: dict[str, set[str]] = {}
        for alert in self._get("/api/v1/alerts")["alerts"]:
            found.setdefault(alert["labels"]["alertname"], set()).add(alert["state"])
        return found

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {name for name, states in self.alerts().items() if "firing" in states}

    def is_ready(self) -> bool:
        """Whether it takes queries."""
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=_QUERY_TIMEOUT) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=_QUERY_TIMEOUT) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error


@contextmanager
def running_prometheus(
    folder: Path, targets: Mapping[str, Sequence[int]], hurry: Mapping[str, tuple[str, str]]
) -> Iterator[Prometheus]:
    """Run the real server with the files of deploy/, on a copy that scrapes every second and waits for nothing.

    Args:
        folder: empty, for the copy, the data and the log.
        targets: ports on loopback, by job.
        hurry: by alert, a part of its expression and what takes its place.
    """
    program = tool("prometheus")
    config = hurried(folder / "config", hurry)
    port = free_ports(1)[0]
    for job, ports in targets.items():
        addresses = [f"{LOOPBACK}:{one}" for one in ports]
        (config / "targets" / f"{job}.yml").write_text(yaml.safe_dump([{"targets": addresses}]))
    command = [
        program,
        f"--config.file={config / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={LOOPBACK}:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        server = Prometheus(port)
        eventually_sync(lambda: process.poll() is not None or server.is_ready())
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield server
    finally:
        process.kill()
        process.wait()


def hurried(folder: Path, hurry: Mapping[str, tuple[str, str]]) -> Path:
    """Copy the configuration to *folder*: every interval and every ``for`` a second, and *hurry* applied."""
    shutil.copytree(PROMETHEUS, folder)
    config = folder / "prometheus.yml"
    config.write_text(
        re.sub(r"(scrape_interval|scrape_timeout|evaluation_interval): \ds", r"\1: 1s", config.read_text())
    )
    path = folder / "rules" / "alerts.yml"
    content = yaml.safe_load(path.read_text())
    applied = set()
    for rule in (rule for group in content["groups"] for rule in group["rules"]):
        if "for" in rule:
            rule["for"] = "1s"
        if rule["alert"] in hurry:
            old, new = hurry[rule["alert"]]
            assert old in rule["expr"], rule
            rule["expr"] = rule["expr"].replace(old, new)
            applied.add(rule["alert"])
    assert set(hurry) == applied
    path.write_text(yaml.safe_dump(content))
    return folder
