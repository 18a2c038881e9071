"""What reaches a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from services.cli import console


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain [bold] text", "plain [bold] text"),
        ("¿Cómo está? 你好 🙂", "¿Cómo está? 你好 🙂"),
        ("\x1b[2J", "\\u001b[2J"),
        ("\x9b2J", "\\u009b2J"),
        ("a\u202eb", "a\\u202eb"),
        ("\U000e0041", "\\udb40\\udc41"),
    ],
)
def test_a_terminal_is_never_commanded_by_data(text: str, expected: str) -> None:
    """Control characters and text direction marks are shown as JSON escapes; letters of any script stay."""
    assert expected == console.printable(text)


class Terminal(io.StringIO):
    """What a terminal shows."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", ["80", "40", "24"])
def test_numbers_keep_all_of_their_digits_however_narrow_the_terminal_is(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """Texts wrap instead, and lose nothing either."""
    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    table = console.table("name", ">lag", "owner")
    table.add_row("N" * 30, "1234567890123", "O" * 60)

    console.show(table)

    assert "1234567890123" in stdout.getvalue()
    assert (30, 60) == (stdout.getvalue().count("N"), stdout.getvalue().count("O"))


def test_tables_are_not_cut_when_stdout_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fiq status | grep` sees whole columns, without colours."""
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    table = console.table("a", ">b")
    table.add_row("x" * 100, "1")

    console.out().print(table)

    assert "x" * 100 in stdout.getvalue()
    assert "\x1b" not in stdout.getvalue()
