"""Run the benchmarks: ``python -m benchmarks [--only NAME] [--quick] [--json FILE] [--write PAGE]``.

``--only at-work`` and ``--only drain`` take other checkouts besides this one: ``--product before=DIR``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import orjson

from benchmarks import at_work, dialogues, drains, memory, over_http, page, plot, processes
from benchmarks.bench import FULL, QUICK, Bench, Plan
from benchmarks.results import About, Results
from services.cli.embedded.processes import Cluster
from tests.support.dialogues import DATA

#: benchmarks that share one cluster of this checkout
_ON_CLUSTER = ("batches", "reads")


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = _parser().parse_args(arguments)
    if options.results is not None:
        results: Results = orjson.loads(options.results.read_bytes())
    else:
        results = measure(options, _plan(options))
    encoded = orjson.dumps(results, option=orjson.OPT_INDENT_2) + b"\n"
    print("\n".join(["", *(f"## {key}\n\n{table}" for key, table in page.all_tables(results))]))
    print(f"{page.failures(results)}\n\n## aims\n\n{page.verdicts(results)}")
    if quoted := page.sentence(results):
        print(f"## README\n\n{quoted}\n")
    if options.json is not None:
        options.json.write_bytes(encoded)
    elif options.results is None:
        print(f"```json\n{encoded.decode()}```")
    if options.write is not None:
        page.write(results, options.write)
        if plot.bars(text := options.write.read_text(encoding="utf-8")):
            options.write.with_suffix(".svg").write_text(plot.draw(text), encoding="utf-8")
    return 1 if results["about"]["failed"] else 0


def measure(options: argparse.Namespace, plan: Plan) -> Results:
    """Run the benchmarks that *options* ask for."""
    started = time.monotonic()
    source = dialogues.load(options.data)
    results = Results(about=_about(plan, source, quick=options.quick))
    with tempfile.TemporaryDirectory(prefix="fiq-bench-", dir=options.folder) as name, ExitStack() as stack:
        folder = Path(name)
        results["about"]["machine"] = processes.describe(folder)
        cluster = Cluster(folder / "cluster", max_file_store=processes.MAX_FILE_STORE)
        products = (processes.HERE, *options.product)
        bench = Bench(cluster, plan, options.data, folder, _teller(started), products)
        if _wanted(options, "at-work"):
            results["at_work"] = at_work.at_work(bench, options.targets or at_work.TARGETS)
        if _wanted(options, "drain"):
            results["drain"] = drains.drain(bench)
        if any(_wanted(options, name) for name in _ON_CLUSTER):
            stack.enter_context(cluster)
        if _wanted(options, "batches"):
            results["batches"] = over_http.batches(bench)
        if _wanted(options, "reads"):
            results["reads"] = over_http.reads(bench)
        stack.close()
        if _wanted(options, "memory"):
            results["memory"] = memory.memory(bench)
    results["about"]["failed"] = bench.failed
    results["about"]["seconds"] = round(time.monotonic() - started, 1)
    return results


def _plan(options: argparse.Namespace) -> Plan:
    plan = QUICK if options.quick else FULL
    if options.rounds:
        plan = replace(plan, rounds=options.rounds, drain_rounds=options.rounds)
    if options.seconds:
        plan = replace(plan, seconds=options.seconds)
    if options.clients:
        plan = replace(plan, clients=tuple(sorted(set(options.clients))))
    return plan


def _about(plan: Plan, source: dialogues.Dialogues, *, quick: bool) -> About:
    bodies = source.bodies
    return About(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        quick=quick,
        seconds=0.0,
        machine={},
        data=f"{source.source} ({len(source.consultations):,} consultations, {len(bodies):,} events, "
        f"{dialogues.mean_bytes(bodies):.0f} bytes each on average)",
        rounds=plan.rounds,
        drain_rounds=plan.drain_rounds,
        load_seconds=plan.seconds,
        backlog=plan.backlog,
        failed=[],
    )


def _teller(started: float) -> Callable[[str], None]:
    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {what}", file=sys.stderr, flush=True)

    return tell


def _wanted(options: argparse.Namespace, name: str) -> bool:
    return not options.only or name in options.only


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ("at-work", "drain", "batches", "reads", "memory")
    parser.add_argument("--only", action="append", choices=names, help="measure this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a smoke run: little of everything, under two minutes")
    parser.add_argument("--rounds", type=int, help="how often each target is measured")
    parser.add_argument("--seconds", type=float, help="how long a load lasts")
    parser.add_argument(
        "--clients", type=int, nargs="+", metavar="N", help="concurrent clients at work; 0 is one that pauses"
    )
    parser.add_argument("--targets", nargs="+", choices=at_work.TARGETS, help="what is measured at work")
    parser.add_argument(
        "--product",
        type=processes.Product.parse,
        action="append",
        default=[],
        metavar="LABEL=DIR",
        help="another checkout, with its own .venv, that is measured at work and draining, too; may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of printing them")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write this page, docs/benchmarks.md, and its plot")
    parser.add_argument("--results", type=Path, metavar="FILE", help="measure nothing, take an earlier run's JSON")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with mts-dialog/")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; its disk is what is measured")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
