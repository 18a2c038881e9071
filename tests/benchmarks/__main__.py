"""Run the benchmarks: ``python -m tests.benchmarks [--only NAME] [--quick] [--json FILE] [--write PAGE]``."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import orjson

from services.cli.cluster import Cluster
from tests.benchmarks import batches, dialogues, drains, machine, memory, page, posts, reads, secured, tables, upgrade
from tests.benchmarks.plan import FULL, QUICK, Plan
from tests.benchmarks.posts import Bench
from tests.benchmarks.results import About, Results
from tests.support.dialogues import DATA

#: room for a few backlogs on each node
_MAX_FILE_STORE = "8GB"


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = _parser().parse_args(arguments)
    if options.results is not None:
        results: Results = orjson.loads(options.results.read_bytes())
    else:
        results = measure(options, QUICK if options.quick else FULL)
    encoded = orjson.dumps(results, option=orjson.OPT_INDENT_2) + b"\n"
    print("\n".join(["", *(f"## {key}\n\n{table}" for key, table in tables.all_tables(results))]))
    print(f"## aims\n\n{tables.verdicts(results)}")
    if options.json is not None:
        options.json.write_bytes(encoded)
    elif options.results is None:
        print(f"```json\n{encoded.decode()}```")
    if options.write is not None:
        page.write(results, options.write)
    return 0


def measure(options: argparse.Namespace, plan: Plan) -> Results:
    """Run the benchmarks that *options* ask for."""
    started = time.monotonic()
    source = dialogues.load(options.data)
    results = Results(about=_about(plan, source, quick=options.quick))
    with tempfile.TemporaryDirectory(prefix="fiq-bench-", dir=options.folder) as name:
        folder = Path(name)
        results["about"]["machine"] = machine.describe(folder)
        with Cluster(folder / "cluster", max_file_store=_MAX_FILE_STORE) as cluster:
            bench = Bench(cluster, plan, options.data, folder, _teller(started))
            if _wanted(options, "latency"):
                results["latency"] = posts.latency(bench)
            if _wanted(options, "throughput"):
                results["throughput"] = posts.throughput(bench)
            if _wanted(options, "batches"):
                results["batches"] = batches.batches(bench)
            if _wanted(options, "security"):
                results["security"] = secured.security(bench)
            if _wanted(options, "persister"):
                results["persister"] = drains.drains(bench)
            if _wanted(options, "reads"):
                results["reads"] = reads.reads(bench)
        if _wanted(options, "memory"):
            results["memory"] = memory.memory(bench)
        if _wanted(options, "upgrade"):
            results["upgrade"] = upgrade.upgrade(bench)
    results["about"]["seconds"] = round(time.monotonic() - started, 1)
    return results


def _about(plan: Plan, source: dialogues.Dialogues, *, quick: bool) -> About:
    bodies = source.bodies
    return About(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=shlex.join(["python", "-m", "tests.benchmarks", *sys.argv[1:]]),
        quick=quick,
        seconds=0.0,
        machine={},
        data=f"{source.source} ({len(source.consultations):,} consultations, {len(bodies):,} events, "
        f"{dialogues.mean_bytes(bodies):.0f} bytes each on average)",
        rounds=plan.rounds,
        backlog=plan.backlog,
    )


def _teller(started: float) -> Callable[[str], None]:
    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {what}", file=sys.stderr, flush=True)

    return tell


def _wanted(options: argparse.Namespace, name: str) -> bool:
    return not options.only or name in options.only


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    names = ("latency", "throughput", "batches", "security", "persister", "reads", "memory", "upgrade")
    parser.add_argument("--only", action="append", choices=names, help="measure this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a smoke run: little of everything, under two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of printing them")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="make this Markdown page, docs/benchmarks.md")
    parser.add_argument("--results", type=Path, metavar="FILE", help="measure nothing, take an earlier run's JSON")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with mts-dialog/")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; its disk is what is measured")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
