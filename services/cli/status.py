"""``fiq status``."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.filesize import decimal

from services.cli import console
from services.cli.overview import Overview, collect
from services.cli.target import FolderOption, ServerOption, Target, find_cluster
from services.log.jetstream import stream as names
from services.log.status import StreamReport


def status(
    server: ServerOption = None,
    folder: FolderOption = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Data directory, to compare with what is committed there; FI_STORE names the store."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Show nodes, stream, and each partition's lag and owner."""
    target = find_cluster(server, folder)
    overview = asyncio.run(collect(target, corpus or _data_dir(target)))
    if json:
        typer.echo(orjson.dumps(asdict(overview), option=orjson.OPT_INDENT_2))
    else:
        _print(overview)


def _data_dir(target: Target) -> Path | None:
    return None if target.state is None else Path(target.state.data_dir)


def _print(overview: Overview) -> None:
    out = console.out()
    if overview.nodes:
        _print_nodes(overview)
    for name, stream in ((names.STREAM, overview.stream), (names.DEAD_STREAM, overview.dead)):
        if stream is not None:
            out.print(f"stream {name}: {_fill(stream)}")
    if overview.partitions:
        out.print()
        _print_partitions(overview)
    for remark in overview.remarks:
        console.err().print(f"fiq: {remark}", soft_wrap=True)


def _fill(stream: StreamReport) -> str:
    sequences = f", sequences {stream.first_sequence} to {stream.last_sequence}" if stream.messages else ""
    limit = f" of {decimal(stream.max_bytes)} ({stream.bytes / stream.max_bytes:.1%})" if stream.max_bytes > 0 else ""
    return f"{stream.messages} messages{sequences}, {decimal(stream.bytes)}{limit}"


def _print_nodes(overview: Overview) -> None:
    table = console.table("node", "role", "condition", "address")
    for node in overview.nodes:
        table.add_row(node.name, node.role, node.condition, node.url)
    console.out().print(table)
    console.out().print()


def _print_partitions(overview: Overview) -> None:
    pids = {worker.name: worker.pid for worker in overview.workers}
    table = console.table("partition", ">committed", ">lag", ">oldest", "owner", "volume")
    for one in overview.partitions:
        owners = ", ".join(f"{owner} (pid {pids[owner]})" for owner in one.owners) or "nobody"
        committed = "-" if one.committed is None else str(one.committed)
        oldest = "-" if one.oldest_seconds is None else f"{one.oldest_seconds:.0f} s"
        volume = one.volume or "not placed"
        if one.begins > 1:
            volume += f", from sequence {one.begins} on"
        table.add_row(one.name, committed, str(one.lag), oldest, owners, volume)
    console.out().print(table)
