"""The benchmark of the whole product at work: events that are posted while persisters write them.

Each round starts every target anew, on nodes of its own, and posts to it with each number of clients. A target is the
product, the product without persisters, or something that a user might have instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks import commits, processes
from benchmarks.bench import ALONE, ALONE_PAUSE, PARTITIONS, WORKERS, Bench
from benchmarks.commits import CommitLog
from benchmarks.load import Report
from benchmarks.processes import HERE, Product
from benchmarks.results import (
    AT_WORK,
    EMPTY,
    NO_PERSISTER,
    OLD_WAY,
    PLAIN_SERVICE,
    PUBLISH,
    ZEROMQ,
    AtWork,
    middle,
    percentile,
)
from services.cli import monitoring
from services.cli.embedded.processes import ManagedProcess, free_ports

#: all targets, in the order of their turns
TARGETS = (AT_WORK, ZEROMQ, NO_PERSISTER, PLAIN_SERVICE, PUBLISH, EMPTY, OLD_WAY)
#: those of which there is one for each product
_OF_PRODUCTS = (AT_WORK, NO_PERSISTER)

_EVENTS = re.compile(r'^fi_persister_events_total\{.*?partition="(\d+)".*?\} (\S+)$', re.MULTILINE)


@dataclass(slots=True)
class Running:
    """A target that runs.

    Attributes:
        kind: of the load that it gets.
        target: port or URL.
        pids: of its processes, by kind: nodes, ingest, persisters.
        logs: of what commits its events; none when nothing does.
        watched: what commits them.
        ports: of the persisters' metrics.
    """

    kind: str
    target: str
    pids: dict[str, list[int]]
    logs: list[CommitLog] = field(default_factory=list)
    watched: list[ManagedProcess] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Cell:
    """One target with one number of clients, in one round.

    Attributes:
        report: of the load.
        cpu: processor time an event, by kind of process, milliseconds.
        lag: events that were accepted and not committed when the last one was accepted.
        caught_up: seconds from then to the last commit.
        ages_ms: from the receipt of each measured event to its commit.
    """

    report: Report
    cpu: dict[str, float]
    lag: int | None = None
    caught_up: float | None = None
    ages_ms: list[float] = field(default_factory=list)


def at_work(bench: Bench, targets: Sequence[str] = TARGETS) -> list[AtWork]:
    """Measure *targets*, in rounds that take turns."""
    cells: dict[tuple[int, str], list[Cell]] = {}
    for number in range(bench.plan.rounds):
        for place, (target, product) in enumerate(_turns(bench, targets)):
            name = f"{target}, {product.label}" if product.label else target
            folder = bench.folder / f"at-work-{number}-{place}"
            folder.mkdir()
            what = f"at work: round {number + 1}, {name}"
            try:
                found = _measure(bench, target, product, folder, what)
            except (RuntimeError, psutil.Error) as error:  # the other rounds and targets are worth having
                bench.fail(f"{what}: {error}")
                continue
            for clients, cell in found:
                cells.setdefault((clients, name), []).append(cell)
    return [_row(name, clients, of) for (clients, name), of in sorted(cells.items(), key=lambda item: item[0][0])]


def _turns(bench: Bench, targets: Sequence[str]) -> Iterator[tuple[str, Product]]:
    for target in TARGETS:
        if target in targets:
            for product in bench.products if target in _OF_PRODUCTS else (HERE,):
                yield target, product


def _measure(bench: Bench, target: str, product: Product, folder: Path, what: str) -> list[tuple[int, Cell]]:
    """Start a target, post to it with each number of clients, and say what came of it."""
    cells: list[tuple[int, Cell]] = []
    with _start(target, product, folder) as running:
        accepted = 0
        for clients in bench.plan.clients:
            if clients == ALONE and not running.logs:
                continue  # it is measured for the age of its events
            cell = _post(bench, running, clients, accepted)
            accepted += cell.report.accepted
            cells.append((clients, cell))
            bench.tell(f"{what}: {_told(clients, cell)}")
        shares = [_partitions(port) for port in running.ports]
    if running.logs:
        stored = commits.received(folder / "corpus", PARTITIONS) if running.ports else {}
        _check(accepted, shares, stored, running)
        found = list(commits.ages(running.logs, [set(share) for share in shares] or [set()] * WORKERS, stored))
        for _, cell in cells:
            begin, end = cell.report.begin_ns, cell.report.last_ns
            cell.ages_ms = [age / 1e6 for received, age in found if begin <= received <= end]
    return cells


def _post(bench: Bench, running: Running, clients: int, before: int) -> Cell:
    cpu: dict[str, float] = {}

    def take(sign: int) -> None:
        for kind, pids in running.pids.items():
            cpu[kind] = cpu.get(kind, 0.0) + sign * processes.cpu_seconds(pids)

    alone = clients == ALONE
    report = bench.load(
        running.target,
        1 if alone else clients,
        running.kind,
        name=f"bench-{clients}",
        pause=ALONE_PAUSE if alone else 0.0,
        on_ready=lambda: take(-1),
    )
    cell = Cell(report, {})
    if running.logs:
        accepted = before + report.accepted

        def committed() -> bool:
            for process in running.watched:
                processes.check(process)
            return sum(log.read() for log in running.logs) >= accepted

        processes.wait(committed, running.watched[0], bench.plan.drain_timeout, poll=0.1)
        cell.lag = max(0, accepted - commits.committed_until(running.logs, report.last_ns))
        last = max(log.commits[-1].at_ns for log in running.logs if log.commits)
        cell.caught_up = max(0.0, (last - report.last_ns) / 1e9)
    take(1)
    cell.cpu = {kind: 1000 * seconds / max(1, report.accepted) for kind, seconds in cpu.items()}
    return cell


def _check(accepted: int, shares: list[dict[int, int]], stored: dict[int, list[int]], running: Running) -> None:
    """Compare what was accepted with the persisters' logs, metrics and files: the table must not lie.

    Raises:
        RuntimeError: they differ.
    """
    logged = sum(log.read() for log in running.logs)
    counts = [logged]
    if running.ports:
        counts += [sum(sum(share.values()) for share in shares), sum(map(len, stored.values()))]
    # an event whose client got no 202 may be stored, too
    if len(set(counts)) != 1 or logged < accepted:
        raise RuntimeError(f"accepted {accepted}, but committed by log, metrics and files: {counts}")


def _partitions(port: int) -> dict[int, int]:
    """Return how many events a persister has committed, by partition."""
    _, text = monitoring.get(port, "/metrics")
    counts = {int(partition): int(float(value)) for partition, value in _EVENTS.findall(text.decode())}
    return {partition: count for partition, count in counts.items() if count}


# -- targets ----------------------------------------------------------------------------------------------------------


@contextmanager
def _start(target: str, product: Product, folder: Path) -> Iterator[Running]:
    with ExitStack() as stack:
        if target in (EMPTY, OLD_WAY):
            server, port = stack.enter_context(processes.reference("empty" if target == EMPTY else "old", folder))
            yield Running("http", str(port), {"ingest": _pids([server])})
            return
        if target == ZEROMQ:
            sockets = stack.enter_context(TemporaryDirectory(prefix="fiq"))  # paths of sockets are short
            yield _with_persisters(stack, f"zmq+ipc://{sockets}", product, folder)
            return
        nodes = stack.enter_context(processes.nodes(folder, product))
        starters: dict[str, Callable[[ExitStack, str, Product, Path], Running]] = {
            AT_WORK: _with_persisters,
            NO_PERSISTER: _without_persisters,
            PLAIN_SERVICE: _plain_service,
            PUBLISH: lambda _, url, *__: Running("publish", url, {}),
        }
        running = starters[target](stack, nodes.urls[0], product, folder)
        running.pids["nodes"] = nodes.pids
        yield running


def _with_persisters(stack: ExitStack, url: str, product: Product, folder: Path) -> Running:
    settings = {"FI_MAX_BACKLOG": ""}  # as it comes
    ingest, port = stack.enter_context(
        processes.ingest(url, folder, partitions=PARTITIONS, product=product, settings=settings)
    )
    found = stack.enter_context(
        processes.persisters(url, folder / "corpus", count=WORKERS, partitions=PARTITIONS, product=product)
    )
    for one in found:
        processes.wait_ready(one)
    return Running(
        kind="http",
        target=str(port),
        pids={"ingest": _pids([ingest]), "persisters": _pids([one.process for one in found])},
        logs=[CommitLog(one.process.log) for one in found],
        watched=[one.process for one in found],
        ports=[one.port for one in found],
    )


def _without_persisters(stack: ExitStack, url: str, product: Product, folder: Path) -> Running:
    ingest, port = stack.enter_context(processes.ingest(url, folder, partitions=PARTITIONS, product=product))
    return Running("http", str(port), {"ingest": _pids([ingest])})


def _plain_service(stack: ExitStack, url: str, _: Product, folder: Path) -> Running:
    module, (port,) = "benchmarks.peers", free_ports(1)
    web = stack.enter_context(processes.server("plain-web", module, ["web", url, str(port)], port, folder))
    workers = [
        stack.enter_context(
            processes.process(f"plain-{number}", module, ["work", url, str(folder / f"{number}.h5")], folder)
        )
        for number in range(WORKERS)
    ]
    return Running(
        kind="http",
        target=str(port),
        pids={"ingest": _pids([web]), "persisters": _pids(workers)},
        logs=[CommitLog(worker.log) for worker in workers],
        watched=workers,
    )


def _pids(found: list[ManagedProcess]) -> list[int]:
    return [process.pid for process in found if process.pid is not None]


# -- results ----------------------------------------------------------------------------------------------------------


def _told(clients: int, cell: Cell) -> str:
    report = cell.report
    text = f"{clients or 'alone'}: {report.rate:,.0f}/s, p50 {percentile(report.latencies_us, 0.5) / 1000:.1f} ms"
    late = "" if cell.caught_up is None else f", lag {cell.lag:,}, all committed {cell.caught_up:.2f} s later"
    failed = f", {report.failures} FAILED" if report.failures else ""
    return text + late + failed


def _row(target: str, clients: int, cells: list[Cell]) -> AtWork:
    reports = [cell.report for cell in cells]

    def latency(share: float) -> float:
        return middle([percentile(report.latencies_us, share) / 1000 for report in reports])

    def age(share: float) -> float | None:
        return _middle([percentile(cell.ages_ms, share) if cell.ages_ms else None for cell in cells])

    def cpu(kind: str) -> float | None:
        # what an idle process takes says nothing of an event
        return None if clients == ALONE else _middle([cell.cpu.get(kind) for cell in cells])

    rates = [report.rate for report in reports]
    return AtWork(
        target=target,
        clients=clients,
        events_per_s=middle(rates),
        rounds=rates,
        p50_ms=latency(0.5),
        p95_ms=latency(0.95),
        p99_ms=latency(0.99),
        age_p50_ms=age(0.5),
        age_p99_ms=age(0.99),
        lag_events=_middle([cell.lag for cell in cells]),
        caught_up_s=_middle([cell.caught_up for cell in cells]),
        nodes_ms=cpu("nodes"),
        ingest_ms=cpu("ingest"),
        persisters_ms=cpu("persisters"),
        client_ms=middle([1000 * report.cpu_seconds / max(1, report.accepted) for report in reports]),
        samples=sum(report.events for report in reports),
        failures=sum(report.failures for report in reports),
    )


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return middle(known) if known else None
