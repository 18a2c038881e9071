"""``fiq demo``: the main job on an embedded cluster, kills in the middle, and the proof that nothing is missing."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from services.cli import console, monitoring
from services.cli.embedded.stack import Stack
from services.cli.errors import CommandError
from services.cli.rehearsal import Chaos, Load, Outcome, Post, Verdict, drained, generate, verify
from services.log.settings import LogSettings

#: shares of the load after which something is killed
_LEADER_AT, _PERSISTER_AT = 0.3, 0.6
#: what was accepted must be in HDF5 within this after the last post, seconds
_DRAIN_TIMEOUT = 60.0
#: limit of the demo's stream, bytes
_STREAM_BYTES = "256MiB"


@dataclass(frozen=True, slots=True)
class Result:
    """What the run brought, for the table."""

    outcome: Outcome
    verdict: Verdict
    killed: list[str]
    dropped: int
    load_seconds: float
    drain_seconds: float


def demo(
    events: Annotated[int, typer.Option(min=100, max=200_000, help="Events to post.")] = 4000,
    clients: Annotated[int, typer.Option(min=1, max=500, help="Clients that post at the same time.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the generated consultations and their order.")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="Where to put everything; a new temporary folder by default.")
    ] = None,
) -> None:
    """Post events while parts are killed, then verify HDF5.

    The stream's leader and one persister are killed with SIGKILL in the middle. At the end every accepted event must
    be in HDF5 exactly once, byte for byte and in order; the exit code is 1 if not. The corpus is kept, and its place
    printed.
    """
    place = _prepare(folder)
    try:
        _rehearse(place, events, clients, seed)
    except BaseException:
        typer.echo(f"what there is stays in {place}", err=True)
        raise


def _rehearse(place: Path, events: int, clients: int, seed: int) -> None:
    consultations = generate(events, seed=seed)
    stack = Stack(place, env={"FI_STREAM_MAX_BYTES": _STREAM_BYTES, "FI_TOKEN_FILE": ""})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops in the same order as Ctrl-C
    with _progress() as progress:
        try:
            _start(stack, progress)
            result = asyncio.run(
                _run(stack, consultations, Load(stack.ingest.url, clients=clients, seed=seed), progress)
            )
        finally:
            stack.stop()
    _print(result, stack)
    if result.verdict.problems:
        raise CommandError(
            "\n  ".join(["the corpus is not what was accepted:", *result.verdict.summary(), f"logs: {stack.logs}"])
        )
    shutil.rmtree(stack.cluster.folder)  # the nodes' stores have done their work; corpus and logs stay


def _prepare(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="fiq-demo-"))
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder} is not empty: the demo starts with an empty corpus; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console.err())


def _start(stack: Stack, progress: Progress) -> None:
    task = progress.add_task("starting", total=len(stack.parts))
    stack.start(lambda _: progress.update(task, advance=1))


async def _run(stack: Stack, consultations: Sequence[Sequence[Post]], load: Load, progress: Progress) -> Result:
    total = sum(len(posts) for posts in consultations)
    posting = progress.add_task("posting", total=total)
    chaos = Chaos(stack, tell=lambda line: progress.console.print(f"  {line}"))
    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        group.create_task(_hurt(chaos, load, total))
        group.create_task(_show(load, progress, posting))
        outcome = await load.run(consultations)
    posted = time.monotonic()
    await chaos.recovered()
    persisting = progress.add_task("persisting", total=total)
    settings = LogSettings(servers=tuple(stack.cluster.urls))
    done = await drained(
        settings, timeout=_DRAIN_TIMEOUT, on_lag=lambda lag: progress.update(persisting, completed=max(0, total - lag))
    )
    drained_at = time.monotonic()
    checking = progress.add_task("verifying", total=1)
    verdict = await asyncio.to_thread(verify, stack.data_dir, outcome.accepted.values())
    if not done:
        verdict.problems.insert(0, f"not everything was acknowledged within {_DRAIN_TIMEOUT:g} s")
    progress.update(checking, advance=1)
    dropped = await asyncio.to_thread(_dropped, stack)
    return Result(outcome, verdict, chaos.killed, dropped, posted - started, drained_at - posted)


async def _hurt(chaos: Chaos, load: Load, total: int) -> None:
    """Kill both while clients post, whether or not the first one is back when the second one's turn comes."""
    async with asyncio.TaskGroup() as group:
        await _reached(load, int(_LEADER_AT * total))
        group.create_task(chaos.kill_leader())
        await _reached(load, int(_PERSISTER_AT * total))
        group.create_task(chaos.kill_persister(0))


async def _reached(load: Load, count: int) -> None:
    while len(load.outcome.accepted) < count:  # noqa: ASYNC110 - thousands of events a second: no event for each
        await asyncio.sleep(0.01)


async def _show(load: Load, progress: Progress, task: TaskID) -> None:
    while not load.finished:
        progress.update(task, completed=len(load.outcome.accepted))
        await asyncio.sleep(0.1)
    progress.update(task, completed=len(load.outcome.accepted))


def _dropped(stack: Stack) -> int:
    """Return how many duplicates the persisters dropped, from their metrics (a killed one's count is gone)."""
    count = 0.0
    for service in stack.persisters:
        _, body = monitoring.get(service.management_port, "/metrics")
        for family in text_string_to_metric_families(body.decode()):
            if family.name == "fi_persister_duplicates":
                count += sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
    return int(count)


def _print(result: Result, stack: Stack) -> None:
    outcome, verdict = result.outcome, result.verdict
    table = console.table("what", ">value", title="fiq demo")
    rows = (
        ("killed with SIGKILL", ", ".join(result.killed)),
        ("events accepted (202)", str(len(outcome.accepted))),
        ("posts repeated on purpose", str(outcome.repeated)),
        ("tries made again after a failure", str(outcome.retries)),
        ("duplicates dropped by the broker", str(outcome.duplicates)),
        ("duplicates dropped by persisters", str(result.dropped)),
        ("events in HDF5", f"{verdict.persisted} in {verdict.consultations} consultations"),
        ("latency p50 / p99", f"{outcome.percentile(0.5) * 1e3:.1f} / {outcome.percentile(0.99) * 1e3:.1f} ms"),
        ("longest time without a 202", f"{outcome.longest_gap:.1f} s"),
        ("posting, then persisting the rest", f"{result.load_seconds:.1f} s, {result.drain_seconds:.1f} s"),
        ("verdict", "every event once, in order" if not verdict.problems else f"{len(verdict.problems)} problems"),
    )
    for row in rows:
        table.add_row(*row)
    out = console.out()
    out.print(table)
    out.print(f"\ncorpus: {stack.data_dir}", soft_wrap=True)
    out.print(f"read it: {sys.argv[0]} show demo-00000 --corpus {stack.data_dir}", soft_wrap=True)
