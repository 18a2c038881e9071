"""The messages that docs/operations.md explains are messages that the program has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: page and section with a list whose entries begin with messages, "…" for what differs
LISTS = {"operations.md": "What each refusal means"}
#: what the source fills in
FILLED_IN = r"…|\bfi-[a-z]+|\bFI_[A-Z_]+"
#: what has fewer words is put together from several texts of the source
WORDS = 3


def messages(page: str) -> list[str]:
    """Return the messages at the beginning of the entries of the page's list."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition(f"\n## {LISTS[page]}\n")[2].partition("\n## ")[0]
    entries = re.findall(r"^- (`[^`]+`(?:, `[^`]+`)*): ", section, re.MULTILINE)
    return [message for entry in entries for message in re.findall(r"`([^`]+)`", entry)]


@cache
def texts() -> str:
    """Return every text of the source, a line each, with "…" for what is filled in."""
    found = []
    for path in [path for top in ("fiq", "services") for path in sorted((ROOT / top).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


@pytest.mark.parametrize(("page", "message"), [(page, message) for page in LISTS for message in messages(page)])
def test_each_message_is_one_of_the_program(page: str, message: str) -> None:
    """An operator searches the page for what the log says, word for word."""
    parts = [part.strip(" :") for part in re.split(FILLED_IN, message)]
    assert [] == [part for part in parts if len(part.split()) >= WORDS and part not in texts()]


@pytest.mark.parametrize("page", LISTS)
def test_each_list_was_found(page: str) -> None:
    """Or nothing would be compared."""
    assert len(messages(page)) >= 10
