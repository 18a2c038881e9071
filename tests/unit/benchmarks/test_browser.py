"""The benchmark of the page: the pace of its load, and what its tables say."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import dialogues
from benchmarks.browser import Round, Timeline, follower_table, view_table
from benchmarks.load import LoadJob, Report, Tally, busiest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the load sees, in its only element."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def job(**changes: float) -> LoadJob:
    values = {"clients": 1, "seconds": 2.0, "warm_up": 0.0, "limit": 10**6, "consultations": 10} | changes
    return LoadJob(target="7001", folder="nowhere", **values)  # type: ignore[arg-type]


def test_a_paced_load_is_due_at_its_rate_whether_or_not_it_is_answered(clock: list[float]) -> None:
    """A request that could not be sent in time is late, and the pace does not wait for it."""
    tally = Tally(job(rate=10.0))
    tally.start()
    waits = []
    for now in (100.0, 100.0, 100.5):
        clock[0] = now
        waits.append(tally.wait())
        assert tally.more()
    assert [0.0, 0.1, -0.3] == pytest.approx(waits)


def test_a_paced_load_ends_with_the_last_request_that_is_due_in_its_time(clock: list[float]) -> None:
    """Twenty at ten a second for two seconds, however fast the answers come."""
    tally = Tally(job(rate=10.0))
    tally.start()
    assert 20 == sum(tally.more() for _ in range(30))
    clock[0] = 102.0
    assert not tally.more()


def test_without_a_rate_nothing_waits(clock: list[float]) -> None:
    """Each client sends when its last request is answered."""
    tally = Tally(job())
    tally.start()
    clock[0] += 1.0
    assert 0.0 == tally.wait()
    assert tally.more()


def test_the_busiest_consultations_get_a_tenth_each(tmp_path: Path) -> None:
    """The others share the rest; the bodies stay as they are."""
    names = busiest("load", 3)
    source = dialogues.load(tmp_path)
    plain = list(itertools.islice(dialogues.posts(source, 20, "load"), 1000))
    found = list(dialogues.with_busiest(iter(plain), names))
    counts = Counter(name for name, _ in found)
    assert [100, 100, 100] == [counts[name] for name in names]
    assert [body for _, body in plain] == [body for _, body in found]


def test_the_first_view_is_judged_by_its_median() -> None:
    """From the server's answer to the paint; one slow context does not miss the aim."""
    times = [
        Timeline(html=10.0, scripts=40.0, asked=50.0, answered=80.0, added=90.0, painted=10.0 + paint, rows=100)
        for paint in (100.0, 120.0, 900.0)
    ]
    lines = view_table(times, 100_000)
    assert "First view of 100,000 consultations, 100 rows, 3 contexts without a cache:" == lines[0]
    assert "| **HTML → rows painted** | 120 | 100 | 900 |" in lines
    assert "| HTML → list asked for | 40 | 40 | 40 |" in lines
    assert "| list answered → rows painted | 50 | 30 | 830 |" in lines
    assert lines[-1].endswith("300 ms from the server's answer: met.")
    slow = [Timeline(0.0, 1.0, 2.0, 3.0, 4.0, 301.0, 100)]
    assert view_table(slow, 1)[-1].endswith("missed.")


@pytest.mark.parametrize(("beside", "verdict"), [(460, "8.0%, met."), (440, "12.0%, missed.")])
def test_followers_are_judged_by_the_drop_of_the_rate(beside: int, verdict: str) -> None:
    """The medians of the rounds with pages and of those without."""
    rounds = [
        Round(0, Report(seconds=1.0, events=500, latencies_us=[4000, 9000])),
        Round(3, Report(seconds=1.0, events=beside, failures=2, latencies_us=[5000, 9000]), 1234, 0.5, 0.25),
    ]
    lines = follower_table(rounds, 500.0)
    assert "| 0 | 500 | 4.0 | 9.0 | 0 | 0 | 0.00 | 0.00 |" in lines
    assert f"| 3 | {beside} | 5.0 | 9.0 | 2 | 1,234 | 0.50 | 0.25 |" in lines
    assert lines[-1].endswith(verdict)
