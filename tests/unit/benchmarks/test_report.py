"""What a run's results become: aims, tables, the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import page, plot
from benchmarks.page import aims
from benchmarks.results import (
    AT_WORK,
    NO_PERSISTER,
    OLD_WAY,
    PERSISTER,
    PLAIN_SERVICE,
    PUBLISH,
    About,
    AtWork,
    Drain,
    Memory,
    Results,
    percentile,
)


def at_work(target: str, rate: float, p50: float, *, clients: int = 20, ours: bool = False) -> AtWork:
    return AtWork(
        target=target,
        clients=clients,
        events_per_s=rate,
        rounds=[rate - 1, rate, rate + 2],
        p50_ms=p50,
        p95_ms=2 * p50,
        p99_ms=3 * p50,
        age_p50_ms=40.0 if ours else None,
        age_p99_ms=400.0 if ours else None,
        lag_events=70.0 if ours else None,
        caught_up_s=0.5 if ours else None,
        nodes_ms=0.3,
        ingest_ms=0.4,
        persisters_ms=0.2 if ours else None,
        client_ms=0.03,
        samples=9,
        failures=0,
    )


def drain(target: str, rate: float, *, workers: int = 1) -> Drain:
    return Drain(
        target=target, partitions=1, workers=workers, spread=100, events=100_000, events_per_s=rate, rounds=[rate]
    )


@pytest.fixture
def results() -> Results:
    about = About(
        date="2026-01-02",
        command="python -m benchmarks",
        quick=False,
        seconds=600.0,
        machine={"processor": "2 cores"},
        data="generated consultations",
        rounds=3,
        drain_rounds=5,
        load_seconds=6.0,
        backlog=100_000,
        failed=[],
    )
    return Results(
        about=about,
        at_work=[
            at_work(AT_WORK, 1500.0, 12.0, ours=True),
            at_work(NO_PERSISTER, 2000.0, 9.0),
            at_work(PLAIN_SERVICE, 1200.0, 15.0),
            at_work(PUBLISH, 4000.0, 5.0),
            at_work(OLD_WAY, 400.0, 50.0),
        ],
        drain=[drain(PERSISTER, 30_000.0), drain(PERSISTER, 48_000.0, workers=2)],
        memory=[Memory(process="ingest", idle_mb=50.0, filling_mb=60.0, draining_mb=55.0, after_mb=0.0)],
    )


def test_an_aim_compares_a_target_with_its_reference_of_the_same_run(results: Results) -> None:
    """The ratio counts, and the limit belongs to the hits."""
    values = [(round(aim.value, 3), aim.hit) for aim in aims(results)]
    at_work_aims = [(0.75, True), (3.75, False), (1.25, False), (0.5, True), (0.4, True), (2.4, True)]
    assert [*at_work_aims, (1.6, True), (60.0, True)] == values


def test_another_number_of_clients_has_other_aims(results: Results) -> None:
    """One client shows what a request costs, the full load what everything does, a lone event how old it gets."""
    results["at_work"] = [
        at_work(target, 100.0, 3.0, clients=clients, ours=target == AT_WORK)
        for clients in (0, 1, 50)
        for target in (AT_WORK, PLAIN_SERVICE, PUBLISH)
    ]
    texts = [aim.text for aim in aims(results) if aim.text.startswith("at work")]
    assert [text for text in texts if "alone" in text] == ["at work, alone: age at commit, p50 at most 50 ms"]
    assert sum("1 clients" in text for text in texts) == 2
    assert any("50 clients: processor time in all" in text for text in texts)


def test_another_product_is_no_part_of_the_aims(results: Results) -> None:
    """A checkout from before stands in the same table."""
    expected = aims(results)
    results["at_work"].append(at_work("at work, before", 1.0, 99.0, ours=True))
    results["drain"].append(drain("persister, before", 1.0, workers=2))
    assert expected == aims(results)


def test_a_miss_says_by_how_much(results: Results) -> None:
    """3.75x instead of 4x is a miss by a sixteenth of the aim."""
    missed = [aim for aim in aims(results) if not aim.hit]
    assert [-0.0625, -0.166667] == [round(aim.margin, 6) for aim in missed]
    assert "3.75x | **miss** | 6%" in page.verdicts(results)


def test_a_benchmark_that_was_not_run_has_no_table(results: Results) -> None:
    """`--only` leaves the others out, of the aims too."""
    only = Results(about=results["about"], drain=results["drain"])
    assert [key for key, _ in page.all_tables(only)] == ["drain"]
    assert len(aims(only)) == 1


def test_the_table_at_work_stands_first_on_the_page(results: Results) -> None:
    """Before how it was measured: it is what users ask for."""
    text = page.render(results)
    assert text.index(page.at_work(results)) < text.index("2026-01-02")


def test_the_readme_quotes_the_line_of_20_clients(results: Results) -> None:
    """With what a user would have instead."""
    expected = (
        "At work, with 20 clients: 1,500 events/s, p50 12 ms, p99 36 ms, in HDF5 after 40 ms (p50); "
        "in the same run the plain service 1,200 events/s and the HDF5 in the request 400 events/s."
    )
    assert expected == page.sentence(results)
    assert page.sentence(Results(about=results["about"])) == ""


def test_every_line_of_a_table_has_the_same_columns(results: Results) -> None:
    """Or it would not render."""
    for _, tables in page.all_tables(results):
        for table in tables.split("\n\n"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_requests_that_failed_are_counted_on_the_page(results: Results) -> None:
    """The table has no column for them: a run without failures is the rule."""
    assert "No request failed.\n" in page.render(results)
    results["at_work"][1]["failures"] = 7
    assert "Requests that failed: no persister with 20 clients 7.\n" in page.render(results)


def test_what_failed_stands_on_the_page(results: Results) -> None:
    """A target that is missing without a word would look forgotten."""
    results["about"]["failed"] = ["at work: round 1, plain service: it ended\nTraceback"]
    assert "**Failed:** at work: round 1, plain service: it ended\n" in page.render(results)


def test_the_page_holds_machine_date_command_and_every_table(results: Results) -> None:
    """A figure without them means nothing."""
    text = page.render(results)
    for part in ("2026-01-02", "python -m benchmarks", "2 cores", *dict(page.all_tables(results)).values()):
        assert part in text
    assert "{" not in text


def test_the_page_counts_the_aims_and_shows_those_that_were_missed(results: Results) -> None:
    """Those that were met are on stdout."""
    text = page.render(results)
    found = aims(results)
    missed = [aim for aim in found if not aim.hit]
    assert missed
    assert f"{len(found) - len(missed)} of {len(found)} aims are met." in text
    assert [aim.text in text for aim in found] == [aim in missed for aim in found]


def test_making_the_page_again_keeps_what_was_written_by_hand(results: Results, tmp_path: Path) -> None:
    """The reasons of misses are a person's."""
    path = tmp_path / "benchmarks.md"
    page.write(results, path)
    path.write_text(path.read_text().replace(page.MADE_FROM, f"In short.\n\n{page.MADE_FROM}"))
    path.write_text(path.read_text() + "\n## Why\n\nBecause.\n")
    results["about"]["date"] = "2026-02-03"
    page.write(results, path)
    text = path.read_text()
    assert "2026-02-03" in text
    assert text.count("## Why\n\nBecause.\n") == text.count(page.KEPT_FROM) == 1
    assert text.startswith(f"# Benchmarks\n\nIn short.\n\n{page.MADE_FROM}")


def test_the_plot_shows_the_numbers_of_the_page() -> None:
    """docs/benchmarks.svg is what `python -m benchmarks.plot` makes of docs/benchmarks.md."""
    text = plot.PAGE.read_text(encoding="utf-8")
    drawn = {(bar.clients, bar.target) for bar in plot.bars(text)}
    assert {(clients, target) for clients in (1, 20, 50) for target in (AT_WORK, OLD_WAY)} <= drawn
    assert plot.draw(text) == plot.PLOT.read_text(encoding="utf-8")


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.95, 4.0), (0.0, 1.0), (1.0, 4.0)])
def test_a_percentile_is_a_value_that_was_measured(share: float, expected: float) -> None:
    """Nearest rank: nothing is interpolated."""
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == expected
