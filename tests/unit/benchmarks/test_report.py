"""What a run's results become: aims, tables, the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import page, tables
from tests.benchmarks.aims import aims
from tests.benchmarks.results import (
    APPEND,
    EMPTY,
    PERSISTER,
    POST,
    PUBLISH,
    PULL,
    RESTARTED,
    UNDISTURBED,
    About,
    Drain,
    Latency,
    Memory,
    Results,
    Throughput,
    Upgrade,
    Upgrades,
    percentile,
)


def latency(target: str, p50: float) -> Latency:
    return Latency(
        target=target, clients=50, p50_ms=p50, p95_ms=2 * p50, p99_ms=3 * p50, events_per_s=1e3, samples=9, failures=0
    )


def throughput(target: str, rate: float) -> Throughput:
    return Throughput(target=target, clients=50, events_per_s=rate, rounds=[rate], failures=0)


def drain(target: str, rate: float, *, partitions: int = 1) -> Drain:
    return Drain(
        target=target,
        partitions=partitions,
        workers=1,
        spread=100,
        events=100_000,
        events_per_s=rate,
        rounds=[rate],
        batch_events=4000.0 if target == PERSISTER else 0.0,
        batch_consultations=120.0 if target == PERSISTER else 0.0,
    )


def phase(name: str, p99: float) -> Upgrade:
    return Upgrade(
        phase=name,
        clients=8,
        seconds=30.0,
        p50_ms=5.0,
        p95_ms=7.0,
        p99_ms=p99,
        most_ms=2 * p99,
        events=4000,
        retried=3,
        failures=0,
    )


@pytest.fixture
def results() -> Results:
    about = About(
        date="2026-01-02",
        command="python -m tests.benchmarks",
        quick=False,
        seconds=600.0,
        machine={"processor": "2 cores"},
        data="generated consultations",
        rounds=3,
        backlog=100_000,
    )
    return Results(
        about=about,
        latency=[latency(POST, 15.0), latency(PUBLISH, 12.0)],
        throughput=[throughput(POST, 4000.0), throughput(EMPTY, 10_000.0)],
        upgrade=Upgrades(missing="", phases=[phase(UNDISTURBED, 9.0), phase(RESTARTED, 640.0)]),
        persister=[drain(PERSISTER, 20_000.0), drain(PULL, 30_000.0), drain(APPEND, 500.0)],
        memory=[Memory(process="ingest", idle_mb=50.0, filling_mb=60.0, draining_mb=55.0, after_mb=0.0)],
    )


def test_an_aim_compares_a_target_with_its_reference_of_the_same_run(results: Results) -> None:
    """The ratio counts, and the limit belongs to the hits."""
    values = {aim.text: (round(aim.value, 3), aim.hit) for aim in aims(results)}
    assert list(values.values()) == [(1.25, True), (0.4, False), (0.667, True), (40.0, True), (60.0, True)]


def test_a_miss_says_by_how_much(results: Results) -> None:
    """0.4x instead of 0.5x is a miss by a fifth of the aim."""
    missed = [aim for aim in aims(results) if not aim.hit]
    assert [round(aim.margin, 6) for aim in missed] == [-0.2]
    assert "0.40x | **miss** | 20%" in tables.verdicts(results)


def test_a_row_with_more_partitions_is_no_part_of_the_aims(results: Results) -> None:
    """The aims compare one partition with one."""
    results["persister"].append(drain(PERSISTER, 1.0, partitions=16))
    assert all(aim.hit for aim in aims(results) if "persister" in aim.text)


def test_a_benchmark_that_was_not_run_has_no_table(results: Results) -> None:
    """`--only` leaves the others out, of the aims too."""
    only = Results(about=results["about"], throughput=results["throughput"])
    assert [key for key, _ in tables.all_tables(only)] == ["throughput"]
    assert len(aims(only)) == 1


def test_every_line_of_a_table_has_the_same_columns(results: Results) -> None:
    """Or it would not render."""
    for _, table in tables.all_tables(results):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_rolling_restart_stands_beside_the_time_before_it(results: Results) -> None:
    """The same stack and the same clients, in one run."""
    before, during = tables.upgrade(results).splitlines()[2:]
    assert "| before it | 8 | 30 | 5.0 | 7.0 | 9.0 | 18.0 | 4,000 | 3 | 0 |" == before
    assert "| 640.0 | 1280.0 |" in during


def test_without_docker_the_page_says_so_instead_of_a_number(results: Results) -> None:
    """A row that is missing without a word would look forgotten."""
    results["upgrade"] = Upgrades(missing="there is no docker command", phases=[])
    assert "Not measured: there is no docker command.\n" in page.render(results)


def test_ratios_stand_beside_the_target_that_they_judge(results: Results) -> None:
    """The reference needs none but its own."""
    persister, pull, _ = tables.persister(results).splitlines()[2:]
    assert "0.67x | 40x" in persister
    assert "x |" not in pull


def test_the_page_holds_machine_date_command_and_every_table(results: Results) -> None:
    """A figure without them means nothing."""
    text = page.render(results)
    for part in ("2026-01-02", "python -m tests.benchmarks", "2 cores", *dict(tables.all_tables(results)).values()):
        assert part in text
    assert "{" not in text


def test_making_the_page_again_keeps_what_was_written_by_hand(results: Results, tmp_path: Path) -> None:
    """The reasons of misses are a person's."""
    path = tmp_path / "benchmarks.md"
    page.write(results, path)
    path.write_text(path.read_text() + "\n## Why\n\nBecause.\n")
    results["about"]["date"] = "2026-02-03"
    page.write(results, path)
    text = path.read_text()
    assert "2026-02-03" in text
    assert text.count("## Why\n\nBecause.\n") == text.count(page.KEPT_FROM) == 1


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.95, 4.0), (0.0, 1.0), (1.0, 4.0)])
def test_a_percentile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    """Nearest rank: nothing is interpolated."""
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == expected
