"""docs/errors.md holds every error class of every errors.py, and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "errors.md"
SOURCES = sorted(path for top in ("fiq", "services") for path in (ROOT / top).rglob("errors.py"))
#: package -> its error classes, in order
CLASSES = {
    path.parent.name: [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    ]
    for path in SOURCES
}
#: name of an error -> a sentence when it is raised, and sentences what to do
ENTRIES = dict(re.findall(r"^- `(\w+)`: (.+)$", DOCS.read_text(), re.MULTILINE))
#: these are never raised themselves
ROOTS = {"FiqError", "CorpusError"}


@pytest.mark.parametrize("name", [name for names in CLASSES.values() for name in names])
def test_each_error_is_documented_with_its_remedy(name: str) -> None:
    """A reader of a log finds out what to do."""
    when, _, remedy = ENTRIES[name].partition(". ")
    assert when
    assert remedy or name in ROOTS


@pytest.mark.parametrize("package", CLASSES)
def test_each_package_has_a_section(package: str) -> None:
    """With all of its errors, in whatever order reads best."""
    sections = dict(re.findall(r"^## (\w+)[^\n]*\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.MULTILINE | re.DOTALL))
    assert sorted(CLASSES[package]) == sorted(re.findall(r"^- `(\w+)`", sections[package], re.MULTILINE))


def test_no_error_is_documented_that_does_not_exist() -> None:
    """What was renamed or removed must go from the manual too."""
    assert set(ENTRIES) == {name for names in CLASSES.values() for name in names}
