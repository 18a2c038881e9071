"""Links between documents lead somewhere: to a file that exists, and to a heading that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchor of each heading of *page*, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def links(page: Path) -> list[str]:
    """Return where each link of *page* leads that is no URL."""
    found = re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", page.read_text(encoding="utf-8")))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_leads_to_a_heading_that_exists(page: Path) -> None:
    """A reader of an error message or of an alert follows them in a hurry."""
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_file_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    """As `services/…/name.py` or a folder, from the root of the repository; secrets are made by `fiq init`."""
    named = re.findall(r"`((?:fiq|services|tests|benchmarks|deploy|docs)/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert [] == [path for path in named if "/secrets/" not in path and not (ROOT / path).exists()]


def test_each_page_is_reachable_from_the_start_page() -> None:
    """docs/index.md leads to every page; decisions have an index of their own."""
    reached = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links(ROOT / "docs" / "index.md")}
    assert set(PAGES) - {ROOT / "docs" / "index.md"} - set((ROOT / "docs" / "adr").iterdir()) <= reached


def test_each_section_that_a_message_names_exists() -> None:
    """Messages of the program name a page, and a section of it between backquotes."""
    missing = []
    for source in [path for top in ("fiq", "services") for path in (ROOT / top).rglob("*.py")]:
        text = re.sub(r'"\s*\n\s*f?"', "", source.read_text(encoding="utf-8"))
        for page, section in re.findall(r"(docs/[\w-]+\.md), `([^`{]+)`", text):
            if f"\n## {section}\n" not in (whole := (ROOT / page).read_text()) and f"\n### {section}\n" not in whole:
                missing.append((str(source.relative_to(ROOT)), page, section))
    assert missing == []
