"""Progress bars of the commands that read or write a whole corpus; on stderr, and only where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from services.cli import console


@contextmanager
def bar(description: str) -> Iterator[Callable[[float, str], None]]:
    """Show a bar while the block runs; yield what sets its fraction (0 to 1) and the text behind it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    on = console.err()
    with Progress(*columns, console=on, transient=True, disable=not on.is_terminal) as progress:
        task = progress.add_task(description, total=1.0, detail="")
        yield lambda fraction, detail: progress.update(task, completed=fraction, detail=detail)
