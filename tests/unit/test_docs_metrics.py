"""docs/metrics.md holds every metric, as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from fiq.corpus import StoreStats
from services.ingest.metrics import OUTCOMES, IngestMetrics
from services.log.metrics import PARTS, LogMetrics
from services.log.status import (
    CertificateExpiry,
    LogState,
    NodeReport,
    PartitionState,
    Placement,
    ReplicaReport,
    StreamReport,
    Waiting,
)
from services.persister.metrics import FAILURE_KINDS, QUESTION_OUTCOMES, PersisterMetrics
from services.persister.partition import RunnerState

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def persister_metrics() -> PersisterMetrics:
    """Return metrics with a sample each: without one, a metric shows no labels."""
    metrics = PersisterMetrics()
    partition = metrics.of(0)
    partition.state(RunnerState.FOLLOWING)
    partition.committed(1)
    partition.queue(lambda: 1, lambda: 1)
    partition.store(StoreStats(1, 1, 1, False, 0, "", 0.0, 0, 1, 1, 0, 0, 1, 0, 1, 0.1, 0.1))
    metrics.repairs.labels("gap")
    metrics.questions.labels("find", "answered")
    metrics.info.labels("main", "volume", "host")
    metrics.volume_free.labels("volume")
    metrics.volume_size.labels("volume")
    metrics.volume_held.labels("volume")
    metrics.backup.labels("volume")
    metrics.verified.labels("volume")
    metrics.verify_problems.labels("volume")
    return metrics


def log_metrics() -> CollectorRegistry:
    """The same for what both services show of the log."""
    registry = CollectorRegistry()
    metrics = LogMetrics(registry)
    replica = ReplicaReport("n2", current=True, offline=False, lag=0, seen_seconds=0.1)
    metrics.stream("fi-events", StreamReport("", 16, "n1", (replica,), 1, 1, 1, 1, 1))
    metrics.nodes([NodeReport("n1", 1, 1, jetstream=True, storage=1, storage_limit=1)])
    metrics.certificates([CertificateExpiry("node", "n1", 0.0)])
    placement = Placement(0, "volume", 1, 1, 1, 1)
    partition = PartitionState(0, placement, 1, 1, Waiting(1, 2, stalled=False), 1.0)
    metrics.stores(LogState(processes=(), stores={"main": (partition,)}))
    return registry


def ingest_metrics() -> CollectorRegistry:
    """The same for ingest, which shows a certificate only when it has one."""
    metrics = IngestMetrics()
    metrics.certificate_expiry.labels("name")
    return metrics.registry


#: the section of each service, and its metrics
SECTIONS: dict[str, CollectorRegistry] = {
    "Log": log_metrics(),
    "Ingest": ingest_metrics(),
    "Persister": persister_metrics().registry,
}
#: a metric as in a query: name and labels
_METRIC = r"`(\w+)(?:\{([\w,]+)\})?`"
#: one or more of them, and their meaning
_ENTRY = re.compile(rf"^- ({_METRIC}(?:, {_METRIC})*): \S")


def own_metrics(title: str) -> list[Metric]:
    """Return what a section must hold; what both services have of the log stands in its own."""
    found = [metric for metric in SECTIONS[title].collect() if metric.name.startswith("fi_")]
    return found if title == "Log" else [metric for metric in found if metric.name not in LOG_NAMES]


def full_name(metric: Metric) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def section(title: str) -> list[str]:
    """Return the lines below the heading *title*, up to the next."""
    _, _, rest = DOCS.read_text().partition(f"\n## {title}\n")
    return rest.partition("\n## ")[0].splitlines()


def entries(title: str) -> list[tuple[str, set[str]]]:
    """Return name and labels of each metric that a section lists."""
    found = [(line, _ENTRY.match(line)) for line in section(title) if line.startswith("- ")]
    assert [] == [line for line, entry in found if entry is None]
    metrics = [metric for _, entry in found if entry is not None for metric in re.findall(_METRIC, entry[1])]
    return [(name, set(filter(None, labels.split(",")))) for name, labels in metrics]


LOG_NAMES = {metric.name for metric in SECTIONS["Log"].collect()}
CASES = [(title, metric) for title in SECTIONS for metric in own_metrics(title)]


@pytest.mark.parametrize(("title", "metric"), CASES, ids=[full_name(metric) for _, metric in CASES])
def test_each_metric_is_documented_with_type_and_labels(title: str, metric: Metric) -> None:
    """In its service's section. The type is not written out: `_total` is a counter, the label `le` a histogram's."""
    labels = {label for sample in metric.samples for label in sample.labels}
    ((name, documented),) = [entry for entry in entries(title) if entry[0] == full_name(metric)]
    kind = "counter" if name.endswith("_total") else "histogram" if "le" in labels else "gauge"

    assert kind == metric.type
    assert documented == labels


@pytest.mark.parametrize("title", SECTIONS)
def test_no_metric_is_documented_that_does_not_exist(title: str) -> None:
    """What was renamed or removed must go from the manual too."""
    assert sorted(name for name, _ in entries(title)) == sorted(full_name(metric) for metric in own_metrics(title))


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_outcome_of_a_publish_is_documented(outcome: str) -> None:
    """An alert needs to know the values of a label."""
    assert f"`{outcome}`" in "\n".join(section("Ingest"))


@pytest.mark.parametrize("title", ["Ingest", "Persister"])
def test_both_services_show_the_log(title: str) -> None:
    """Any surviving process shows what is wrong with the rest."""
    assert {metric.name for metric in SECTIONS[title].collect()} >= LOG_NAMES


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_a_look_is_documented(part: str) -> None:
    """The label of the failures."""
    assert f"`{part}`" in "\n".join(section("Log"))


@pytest.mark.parametrize("value", [*RunnerState, *FAILURE_KINDS, *QUESTION_OUTCOMES])
def test_each_state_and_kind_of_failure_is_documented(value: str) -> None:
    """The same for partitions."""
    assert f"`{value}`" in "\n".join(section("Persister"))
