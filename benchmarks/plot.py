"""Draws the table *At work* of docs/benchmarks.md: ``python -m benchmarks.plot`` writes docs/benchmarks.svg.

The page is the only source of the numbers, so the plot cannot differ from it; a test compares the two. ``python -m
benchmarks --write docs/benchmarks.md`` draws it as well; the summary above the tables is written by hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import CLIENTS, LATENCY, RATE
from benchmarks.results import AT_WORK, OLD_WAY, PLAIN_SERVICE, ZEROMQ

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PLOT = PAGE.with_suffix(".svg")
#: what is drawn if it was measured, with its colour and its name in the legend
TARGETS = {
    AT_WORK: ("#1f6f8b", "fiq"),
    ZEROMQ: ("#6fb1c7", "fiq without a broker"),
    PLAIN_SERVICE: ("#99a8b2", "plain NATS service, no guarantees"),
    OLD_WAY: ("#d98c5f", "HDF5 in the request"),
}
#: sizes in the drawing, pixels
WIDTH, PANEL, BAR, GAP, TOP = 860, 250, 26, 22, 84
_NUMBER = re.compile(r"[\d,.]+")


@dataclass(frozen=True, slots=True)
class Bar:
    """One measured target: events a second and the median latency in milliseconds."""

    clients: int
    target: str
    events_per_s: float
    p50_ms: float


def bars(page: str) -> list[Bar]:
    """Return what is drawn of *page*'s section *At work*, by clients and then as TARGETS has them."""
    section = page.partition("\n## At work\n")[2].partition("\n## ")[0]
    rates, latencies = _numbers(section, RATE), _numbers(section, LATENCY)
    counts = dict.fromkeys(clients for clients, _ in rates)
    return [
        Bar(clients, target, rates[clients, target], latencies[clients, target])
        for clients in sorted(counts)
        for target in TARGETS
        if (clients, target) in rates
    ]


def _numbers(section: str, head: str) -> dict[tuple[int, str], float]:
    """Return the first number in each cell of the table with *head*, by clients and target; without *alone*."""
    lines = section.partition(f"| {head} |")[2].partition("\n\n")[0].splitlines()
    if not lines:
        return {}
    heads = [cell.strip() for cell in lines[0].strip(" |").split("|")]
    found = {}
    for line in lines[2:]:
        target, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        for name, cell in zip(heads, cells, strict=True):
            if name.startswith(CLIENTS.format("")) and (number := _NUMBER.match(cell)):
                found[int(name.removeprefix(CLIENTS.format(""))), target] = float(number[0].replace(",", ""))
    return found


def draw(page: str) -> str:
    """Return the plot of *page*: events a second on the left, median latency on the right."""
    found = bars(page)
    groups = sorted({bar.clients for bar in found})
    tops = [TOP + index * BAR + groups.index(bar.clients) * GAP for index, bar in enumerate(found)]
    height = tops[-1] + BAR + 32
    font = 'font-family="sans-serif" font-size="13"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {font} role="img">',
        "<title>Events a second and median latency of POST, by clients</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    left = 16
    for target, (colour, name) in TARGETS.items():
        if target in {bar.target for bar in found}:
            lines.append(f'<rect x="{left}" y="14" width="13" height="13" fill="{colour}"/>')
            lines.append(f'<text x="{left + 19}" y="25" fill="#222222">{name}</text>')
            left += 19 + 7 * len(name) + 24
    panels = (
        (90, "events a second (more is better)", [bar.events_per_s for bar in found], "{:,.0f}"),
        (500, "p50 of POST, ms (less is better)", [bar.p50_ms for bar in found], "{:.1f}"),
    )
    for x, title, values, form in panels:
        lines.append(f'<text x="{x}" y="62" fill="#222222" font-weight="bold">{title}</text>')
        for bar, y, value in zip(found, tops, values, strict=True):
            width = max(1, round(PANEL * value / max(values)))
            colour, _ = TARGETS[bar.target]
            lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="{BAR - 5}" fill="{colour}"/>')
            lines.append(f'<text x="{x + width + 6}" y="{y + 15}" fill="#222222">{form.format(value)}</text>')
    for clients in groups:
        own = [y for bar, y in zip(found, tops, strict=True) if bar.clients == clients]
        middle = (own[0] + own[-1]) // 2 + 15
        lines.append(f'<text x="12" y="{middle}" fill="#222222">{clients} client{"s" if clients > 1 else ""}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PLOT.write_text(draw(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
