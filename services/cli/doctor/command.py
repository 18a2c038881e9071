"""``fiq doctor``: every check, in the order in which an operator thinks, whatever the other ones find."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import orjson
import typer

from fiq.errors import FiqError
from fiq.words import count
from services.cli import console
from services.cli.console import bar
from services.cli.doctor import cluster, host
from services.cli.errors import CommandError
from services.cli.status import ClusterSnapshot, take_snapshot
from services.cli.target import FolderOption, ServerOption, Target, connected, find_cluster, find_corpus
from services.core.settings import load
from services.ingest.settings import Settings as IngestSettings
from services.log.findings import Finding, Level, check_dead_letters, error, ok, unknown, warning, worst
from services.log.jetstream.stream import NODES_PREFIX
from services.persister.settings import PersisterSettings

_NOT_CHECKED = "what only the broker knows was not checked"
_ASK_AS = "set FI_NATS_SEED_FILE to the seed of the user `ops`"


@dataclass(frozen=True, slots=True)
class Installation:
    """What is checked.

    Attributes:
        target: the cluster.
        directory: the data directory; None when there is none on this machine.
        monitoring: URLs of the nodes' monitoring ports; when empty the nodes are asked through the log, and at their
            default ports if that is not allowed.
        env: settings of the services.
    """

    target: Target
    directory: Path | None
    monitoring: Sequence[str]
    env: Mapping[str, str]


def doctor(
    server: ServerOption = None,
    folder: FolderOption = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Data directory of a volume on this machine; else FI_DATA_DIR and so on.")
    ] = None,
    monitoring: Annotated[
        str, typer.Option(help="The nodes' monitoring ports, http://host:8222, separated by commas.")
    ] = "",
    all_: Annotated[bool, typer.Option("--all", help="Show the checks that passed, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document with every finding.")] = False,
) -> None:
    """Check a whole deployment and say what to do.

    Says what is wrong, what it means and what to do. Changes nothing. The exit code is 1 if anything needs action now.
    """
    target = find_cluster(server, folder)
    urls = [url.strip().rstrip("/") for url in monitoring.split(",") if url.strip()]
    if not urls and target.state is not None:
        urls = [node.monitoring for node in target.state.nodes]
    with bar("examining") as show:
        show(0.0, "")
        findings = examine(Installation(target, _directory(corpus, folder), urls, os.environ))
    if json:
        document = {"worst": worst(findings), "findings": [asdict(finding) for finding in findings]}
        typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    else:
        _print(findings, passed=all_)
    if worst(findings) is Level.ERROR:
        raise typer.Exit(1)


def _directory(corpus: Path | None, folder: Path | None) -> Path | None:
    try:
        return find_corpus(corpus, folder)
    except CommandError:
        if corpus is not None:
            raise
        return None


def _print(findings: Sequence[Finding], *, passed: bool) -> None:
    """Print the problems, the worst ones first, then with *passed* what is fine, and how many checks passed."""
    out = console.out()
    levels = [Level.ERROR, Level.WARNING, Level.UNKNOWN, *([Level.OK] if passed else [])]
    for finding in (one for level in levels for one in findings if one.level is level):
        out.print(f"{finding.level:<8} {finding.check:<13} {console.printable(finding.what)}", soft_wrap=True)
        if finding.meaning:
            out.print(f"{'':<22} means: {console.printable(finding.meaning)}", soft_wrap=True)
        if finding.action:
            out.print(f"{'':<22} to do: {console.printable(finding.action)}", soft_wrap=True)
    counts = Counter(finding.level for finding in findings)
    found = [count(counts[level], level) for level in (Level.ERROR, Level.WARNING) if counts[level]]
    if counts[Level.UNKNOWN]:
        found.append(f"{counts[Level.UNKNOWN]} unknown")
    found.append(f"{count(counts[Level.OK], 'check')} passed{'' if passed else ' (--all shows them)'}")
    out.print(", ".join(found), soft_wrap=True)


def examine(one: Installation, *, clock_offset: float = 0.0, held_back: float = host.HELD_BACK) -> list[Finding]:
    """Run every check and return the findings.

    Args:
        one: what is checked.
        clock_offset: seconds by which this machine's clock is assumed to be ahead; for tests.
        held_back: seconds for which checkpoints may wait.
    """
    return list(_examine(one, clock_offset, held_back))


def _examine(one: Installation, clock_offset: float, held_back: float) -> Iterator[Finding]:
    settings = one.target.settings
    persister, ingest = load(PersisterSettings, one.env), load(IngestSettings, one.env)
    yield from host.check_versions()
    yield from host.check_open_files()
    yield from host.check_memory(persister)
    yield from host.check_secrets(one.env)
    yield from host.check_users(one.env)

    snapshot: ClusterSnapshot | None
    if settings.uses_zeromq:  # there are no nodes
        snapshot = None
        try:
            snapshot = asyncio.run(take_snapshot(None, settings, one.target.state))
            yield _owners(snapshot)
        except FiqError as problem:
            yield error("owners", str(problem), "clients get 503", "see the message")
    else:
        seen = yield from _examine_cluster(one, clock_offset, ingest, persister.volumes)
        snapshot = None if seen is None else seen.snapshot
    if snapshot is not None:
        yield from host.check_workers(snapshot.workers, one.directory, held_back)

    if one.directory is None:
        yield unknown("corpus", "there is no data directory here", "run fiq doctor on the host of each volume, too")
        return
    # a stack of `fiq up` allows what a deployment must not
    if one.target.state is not None:
        persister = dataclasses.replace(persister, allow_ephemeral=True)
    yield from host.check_directory(one.directory, persister)
    yield from host.check_files(one.directory, snapshot)
    yield from host.check_backup(one.directory, snapshot)


def _owners(snapshot: ClusterSnapshot) -> Finding:
    """Check that each partition has an owner that answers, in a log without a broker."""
    if without := snapshot.without_owner:
        what = f"no persister answers for partitions {', '.join(without)}"
        return error("owners", what, "their clients get 503", "start the persisters, or read their log")
    owned = "each partition has an owner that answers, in all"
    return ok("owners", f"{owned} {len(snapshot.partitions)}; there are no nodes and no stream to check")


def _examine_cluster(
    one: Installation, clock_offset: float, ingest: IngestSettings, volumes: int
) -> Generator[Finding, None, cluster.ClusterReport | None]:
    settings = one.target.settings
    expected, servers = cluster.find_servers(settings.servers)
    if not servers and not one.monitoring:  # there is nothing else to ask, and no user to advise
        what = f"no NATS node answers at {', '.join(expected)}"
        action = "start the nodes, or correct FI_LOG_URL or --server; look at their logs"
        yield error("nodes", what, "clients get 503, persisters wait", action)
        return None
    yield from cluster.check_servers(expected, servers, ingest.max_event_bytes)
    yield from cluster.check_certificates(servers, settings.ca_file, time.time() + clock_offset)

    seen = None
    try:
        seen, refused = asyncio.run(_ask(one.target))
        yield from refused
    except CommandError as problem:
        yield error("permissions", str(problem), _NOT_CHECKED, _ASK_AS)
    except FiqError as problem:
        yield error("nodes", str(problem), "clients get 503, persisters wait", "see the message")

    nodes = () if seen is None else seen.nodes
    if one.monitoring or not nodes:
        others, unreachable = cluster.from_ports(cluster.monitoring_urls(one.monitoring, expected))
        known = {node.name for node in nodes}
        nodes = (*nodes, *(node for node in others if node.name not in known))
        yield from cluster.unreachable_ports(unreachable, users=bool(settings.seed_file))
    else:
        answered = {str(server.info.get("server_name")) for server in servers}
        yield from cluster.silent_nodes(answered - {node.name for node in nodes})
    yield from cluster.check_nodes(nodes, clock_offset)
    yield from cluster.check_node_memory(nodes, ingest.max_window_events, settings.duplicate_window)

    if seen is not None:
        yield from cluster.check_clocks(seen, clock_offset, [node.name for node in nodes])
        yield from cluster.check_stream(seen, settings)
        yield from check_dead_letters(seen.snapshot.log)
        yield from cluster.check_partitions(seen.snapshot, volumes)
    return seen


async def _ask(target: Target) -> tuple[cluster.ClusterReport, list[Finding]]:
    async with connected(target.settings) as connection:
        try:
            seen = await cluster.ask_cluster(connection, target.settings, target.state)
        except FiqError as problem:
            violations = connection.violations
            if violations:
                raise CommandError(f"this user may not ask: {violations[0]}") from problem
            raise
        violations = connection.violations
    return seen, [_refused(text) for text in violations]


def _refused(violation: str) -> Finding:
    if f'"{NODES_PREFIX}.' in violation:
        what = "this user may not ask the nodes: the accounts are those of an older fiq, or it is not `ops`"
        return warning("permissions", what, _NOT_CHECKED, f"{_ASK_AS}; `fiq init FOLDER`, and reload the nodes")
    return error("permissions", f"this user may not ask: {violation}", _NOT_CHECKED, _ASK_AS)
