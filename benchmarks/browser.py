"""The page in a real browser: how soon its first view is painted, and what pages that follow cost those who post.

``python -m benchmarks.browser [--consultations 100000] [--rate 500]``, with Debian's Chromium. *First view*: contexts
without a cache open ``/ui``, one after the other, on a stack that has the consultations in HDF5. The times are the
browser's own; the paint is the first frame after the rows were added. *Followers*: a load of a fixed rate on the same
stack, of which each followed consultation gets a tenth, in rounds with and without pages that follow. The processor
time of the browser is shown, because it takes it from the product on the same cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.bench import CONSULTATIONS
from benchmarks.drains import wait_committed
from benchmarks.load import BATCH_EVENTS, LoadJob, Report, busiest, run
from benchmarks.processes import Persister, cpu_seconds
from benchmarks.results import middle, percentile
from services.cli.embedded.stack import Stack
from tests.support.dialogues import DATA

#: from the server's answer to the first rows, milliseconds, at most
FIRST_VIEW_MS = 300.0
#: share of the rate of POST that the pages that follow may cost
FOLLOWERS_COST = 0.1

_CLIENTS = 20
_WARM_UP_SECONDS = 3.0
_FILL_SECONDS = 1800.0
#: how long what a browser does for each new window may take
_SETTLE_MS = 1000.0
#: when the rows are there: the next frame, and what runs after it
_WATCH_ROWS = """
window.firstRows = new Promise((done) => {
  new MutationObserver((_, observer) => {
    if (!document.querySelector("tbody tr")) return;
    observer.disconnect();
    const added = performance.now();
    requestAnimationFrame(() => setTimeout(() => done([added, performance.now()])));
  }).observe(document, { childList: true, subtree: true });
});
"""
#: the page's timeline: milliseconds since the navigation began
_TIMELINE = """async () => {
  const [added, painted] = await firstRows;
  const found = (test) => performance.getEntriesByType("resource").filter((entry) => test(new URL(entry.name)));
  const [list] = found((url) => url.pathname.endsWith("/consultations"));
  const scripts = found((url) => url.pathname.endsWith(".js"));
  return {
    html: performance.getEntriesByType("navigation")[0].responseEnd,
    scripts: Math.max(...scripts.map((entry) => entry.responseEnd)),
    asked: list.startTime, answered: list.responseEnd, added, painted,
    rows: document.querySelectorAll("tbody tr").length,
  };
}"""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a first view reached its steps, milliseconds since the navigation began.

    Attributes:
        html: the HTML was there.
        scripts: the last script was there.
        asked: the list was asked for.
        answered: the list was there.
        added: its rows were in the document.
        painted: the frame with them was done.
        rows: how many.
    """

    html: float
    scripts: float
    asked: float
    answered: float
    added: float
    painted: float
    rows: int


def main() -> None:
    """Fill a stack, measure both, and print tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.browser", description=__doc__)
    parser.add_argument("--consultations", type=int, default=100_000, help="in HDF5, of one event each")
    parser.add_argument("--views", type=int, default=10, help="how often the page is opened")
    parser.add_argument("--rate", type=float, default=500.0, help="events a second that are posted")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each load is measured")
    parser.add_argument("--rounds", type=int, default=3, help="rounds without and with pages")
    parser.add_argument("--pages", type=int, default=3, help="pages that follow, ten at most")
    options = parser.parse_args()
    program = shutil.which("chromium")
    if program is None:
        sys.exit("there is no chromium: apt-get install chromium")
    # no limit of new consultations
    settings = {"FI_NEW_CONSULTATIONS_RATE": "0", "FI_STREAM_MAX_BYTES": "2GiB"}
    with (
        tempfile.TemporaryDirectory(prefix="fiq-browser-") as folder,
        Stack(Path(folder), env=settings) as stack,
        sync_playwright() as playwright,
    ):
        fill(stack, options.consultations)
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]

        def launch() -> closing[Browser]:
            return closing(playwright.chromium.launch(executable_path=program, args=arguments))

        with launch() as browser:
            times = [first_view(browser, stack.ingest.url) for _ in range(options.views)]
        print("\n".join(view_table(times, options.consultations)), end="\n\n", flush=True)
        rounds = []
        for number in range(options.rounds):
            job = replace(load(stack, options.rate, options.seconds), busiest=options.pages)
            rounds.append(posted(stack, replace(job, name=f"alone-{number}")))
            with launch() as browser:
                rounds.append(posted(stack, replace(job, name=f"followed-{number}"), browser))
        print("\n".join(follower_table(rounds, options.rate)))


def fill(stack: Stack, consultations: int) -> None:
    """Post *consultations*, one event each, and wait until HDF5 has them."""
    for first in range(0, consultations, BATCH_EVENTS):
        lines = [
            json.dumps({"event_type": "MESSAGE_RECEIVED", "consultation_id": f"visit-{number:07d}"})
            for number in range(first, min(first + BATCH_EVENTS, consultations))
        ]
        headers = {"Content-Type": "application/x-ndjson"}
        request = urllib.request.Request(stack.ingest.url + "/events/batch", "\n".join(lines).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
    persisters = [Persister(one.process, one.management_port) for one in stack.persisters]
    wait_committed(persisters, consultations, _FILL_SECONDS)


# -- first view ------------------------------------------------------------------------------------------------------


def first_view(browser: Browser, url: str) -> Timeline:
    """Open the page without a cache, and return its timeline."""
    with closing(browser.new_context(viewport={"width": 1280, "height": 800})) as context:
        context.add_init_script(_WATCH_ROWS)
        page = context.new_page()
        page.wait_for_timeout(_SETTLE_MS)
        page.goto(url + "/ui", wait_until="commit")
        return Timeline(**page.evaluate(_TIMELINE))


def view_table(times: Sequence[Timeline], consultations: int) -> list[str]:
    """Return the steps after the server's answer, and the way from the list's answer to its paint."""
    steps = {
        "HTML → last script": [one.scripts - one.html for one in times],
        "HTML → list asked for": [one.asked - one.html for one in times],
        "HTML → list answered": [one.answered - one.html for one in times],
        "HTML → rows added": [one.added - one.html for one in times],
        "**HTML → rows painted**": [one.painted - one.html for one in times],
        "list answered → rows painted": [one.painted - one.answered for one in times],
    }
    reached = middle(steps["**HTML → rows painted**"])
    return [
        f"First view of {consultations:,} consultations, {times[0].rows} rows, {len(times)} contexts without a cache:",
        "",
        "| from → to | median ms | fastest | slowest |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {name} | {middle(ms):.0f} | {min(ms):.0f} | {max(ms):.0f} |" for name, ms in steps.items()),
        "",
        f"Aim: at most {FIRST_VIEW_MS:.0f} ms from the server's answer: {_verdict(reached <= FIRST_VIEW_MS)}.",
    ]


# -- followers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """One load, and what else happened meanwhile.

    Attributes:
        pages: that followed.
        report: of the load.
        shown: events that the pages showed at its end.
        browser: processor time of the browser, share of one core.
        ingest: the same of ingest.
    """

    pages: int
    report: Report
    shown: int = 0
    browser: float = 0.0
    ingest: float = 0.0


def load(stack: Stack, rate: float, seconds: float) -> LoadJob:
    """Return the load of a round."""
    return LoadJob(
        target=str(stack.ingest.port),
        clients=_CLIENTS,
        seconds=seconds,
        warm_up=_WARM_UP_SECONDS,
        limit=10**8,
        folder=str(DATA),
        consultations=CONSULTATIONS,
        rate=rate,
    )


def posted(stack: Stack, job: LoadJob, browser: Browser | None = None) -> Round:
    """Do *job*, while *browser* follows the busiest consultations, each in a page of its own."""
    names = busiest(job.name, job.busiest) if browser else []
    pages = [_follow(browser, f"{stack.ingest.url}/ui#/consultations/{name}?from=end") for name in names if browser]
    watched = {"ingest": stack.ingest.process.pid or 0} | ({"browser": _browser()} if browser else {})
    begin: dict[str, float] = {}

    def note() -> None:
        begin.update({"time": time.monotonic()} | {name: cpu_seconds([pid]) for name, pid in watched.items()})

    report = run("http", job, seconds=job.seconds + job.warm_up, on_ready=note)
    seconds = time.monotonic() - begin["time"]
    shares = {name: (cpu_seconds([pid]) - begin[name]) / seconds for name, pid in watched.items()}
    return Round(len(pages), report, sum(map(_shown, pages)), **shares)


def _follow(browser: Browser, url: str) -> Page:
    page = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US").new_page()
    page.goto(url)
    page.locator(".live", has_text="Live").wait_for()
    return page


def _shown(page: Page) -> int:
    text = page.locator(".summary").text_content() or "0"
    return int(text.split(" ")[0].replace(",", ""))


def _browser() -> int:
    """Return the process id of the browser that this process runs."""
    found = [one for one in psutil.Process().children(recursive=True) if "chrom" in one.name()]
    return min(found, key=lambda one: one.create_time()).pid


def follower_table(rounds: Sequence[Round], rate: float) -> list[str]:
    """Return a row for each round, and whether the aim was met."""
    alone = middle([one.report.rate for one in rounds if not one.pages])
    beside = middle([one.report.rate for one in rounds if one.pages])
    drop = 1 - beside / alone
    return [
        f"{rate:,.0f} events a second offered by {_CLIENTS} clients; a latency begins when the event was due:",
        "",
        "| pages | events/s | p50 ms | p99 ms | refused | shown by the pages | browser, cores | ingest, cores |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *map(_row, rounds),
        "",
        f"Aim: pages cost at most {FOLLOWERS_COST:.0%} of the rate: {drop:.1%}, {_verdict(drop <= FOLLOWERS_COST)}.",
    ]


def _row(one: Round) -> str:
    p50, p99 = (percentile(one.report.latencies_us, share) / 1000 for share in (0.5, 0.99))
    return (
        f"| {one.pages} | {one.report.rate:,.0f} | {p50:.1f} | {p99:.1f} | {one.report.failures} | {one.shown:,} "
        f"| {one.browser:.2f} | {one.ingest:.2f} |"
    )


def _verdict(hit: bool) -> str:
    return "met" if hit else "missed"


if __name__ == "__main__":
    main()
