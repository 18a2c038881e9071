"""What a command writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # rich takes a while to import, and many commands print plain lines
    from rich.console import Console
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]

#: categories of characters that may control a terminal: controls, formats (text direction), surrogates
_UNSAFE = frozenset({"Cc", "Cf", "Cs"})


def out() -> Console:
    """Return a console on the current stdout; wide enough for tables when that is no terminal."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)


def err() -> Console:
    """Return a console on the current stderr."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, markup=False)


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; a column whose name starts with ``>`` holds numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        name = column.removeprefix(">")
        number = column.startswith(">")
        made.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return made


def show(table: Table) -> None:
    """Print *table* to stdout. In a narrow terminal texts wrap; numbers are never cut."""
    for column in table.columns:
        if column.justify == "right":
            column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))
    out().print(table)


def as_json(value: Any, *, indent: int | None = None) -> str:
    """Return *value* as JSON with every digit of its integers, on one line unless *indent* is given."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=None if indent else (",", ":"))


def printable(text: str) -> str:
    """Return *text* with each character that may control a terminal written as its JSON escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escape(character) if unicodedata.category(character) in _UNSAFE else character for character in text
    )


def _escape(character: str) -> str:
    # surrogate pairs beyond the 16-bit plane, as JSON has them
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[index]:02x}{units[index + 1]:02x}" for index in range(0, len(units), 2))


@contextmanager
def bar(description: str) -> Iterator[Callable[[float, str], None]]:
    """Show a progress bar on stderr, if that is a terminal; yield a function that sets its fraction and text."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    on = err()
    with Progress(*columns, console=on, transient=True, disable=not on.is_terminal) as progress:
        task = progress.add_task(description, total=1.0, detail="")
        yield lambda fraction, detail: progress.update(task, completed=fraction, detail=detail)
