"""``fiq doctor``."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import orjson
import typer

from fiq.errors import FiqError
from services.cli import console
from services.cli.console import bar
from services.cli.doctor import corpus, log, machine, nodes
from services.cli.doctor.finding import Finding, Level, error, unknown, warning, worst
from services.cli.errors import CommandError
from services.cli.target import FolderOption, ServerOption, Target, connected, find_cluster, find_corpus
from services.core.settings import load
from services.ingest.settings import Settings as IngestSettings
from services.log.jetstream import stream as names
from services.log.jetstream.connection import Connection
from services.persister.settings import PersisterSettings

_NOT_ASKED = "what only the broker knows was not looked at"
_ASK_AS = "set FI_NATS_SEED_FILE to the seed of the user `ops`"


def doctor(
    server: ServerOption = None,
    folder: FolderOption = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Data directory of a volume on this machine; else FI_DATA_DIR and so on.")
    ] = None,
    monitoring: Annotated[
        str, typer.Option(help="The nodes' monitoring ports, http://host:8222, separated by commas.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document with every finding.")] = False,
) -> None:
    """Check a whole deployment and say what to do.

    The exit code is 1 when anything needs somebody now. Changes nothing.
    """
    from services.cli.doctor.command import Patient, examine  # h5py is slow to import

    target = find_cluster(server, folder, fallback=True)
    urls = [url.strip().rstrip("/") for url in monitoring.split(",") if url.strip()] or _monitoring(target)
    patient = Patient(target, _directory(corpus, folder), urls, os.environ)
    with bar("examining") as show:
        show(0.0, "")
        findings = examine(patient)
    if json:
        document = {"worst": worst(findings), "findings": [asdict(finding) for finding in findings]}
        typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    else:
        _print(findings)
    if worst(findings) is Level.ERROR:
        raise typer.Exit(1)


def _monitoring(target: Target) -> list[str]:
    if target.state is None:
        return []
    return [member.monitoring for member in target.state.members if member.url.startswith("nats://")]


def _directory(corpus: Path | None, folder: Path | None) -> Path | None:
    try:
        return find_corpus(corpus, folder)
    except CommandError:
        if corpus is not None:
            raise
        return None


def _print(findings: Sequence[Finding]) -> None:
    out = console.out()
    for finding in findings:
        out.print(f"{finding.level:<8} {finding.check:<13} {console.printable(finding.what)}", soft_wrap=True)
        if finding.meaning:
            out.print(f"{'':<22} means: {console.printable(finding.meaning)}", soft_wrap=True)
        if finding.action:
            out.print(f"{'':<22} to do: {console.printable(finding.action)}", soft_wrap=True)
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    out.print(", ".join(f"{count} {level}" for level, count in counts.items() if count), soft_wrap=True)


# -- The whole examination: every check, whatever the others met -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined.

    Attributes:
        target: the cluster.
        directory: the data directory; None when there is none here.
        monitoring: URLs of the nodes' monitoring ports; when empty the nodes are asked through the log, and at their
            usual ports where that is not allowed.
        env: settings of the services.
    """

    target: Target
    directory: Path | None
    monitoring: Sequence[str]
    env: Mapping[str, str]


def examine(patient: Patient, *, clock_offset: float = 0.0, held_back: float = corpus.HELD_BACK) -> list[Finding]:
    """Run every check and return the findings, in the order in which an operator thinks.

    Args:
        patient: what is examined.
        clock_offset: seconds that this machine's clock is taken to be ahead; for tests.
        held_back: seconds for which checkpoints may wait.
    """
    return list(_examine(patient, clock_offset, held_back))


def _examine(patient: Patient, clock_offset: float, held_back: float) -> Iterator[Finding]:
    settings = patient.target.settings
    persister, ingest = load(PersisterSettings, patient.env), load(IngestSettings, patient.env)
    yield from machine.versions()
    yield from machine.limits()
    yield from machine.memory(persister)
    yield from machine.secrets(patient.env)

    listed = nodes.addresses(settings.servers, [])
    found = [greeting for address in listed if (greeting := nodes.greet(address)) is not None]
    expected = nodes.addresses(settings.servers, found)
    found += [
        greeting for address in expected if address not in listed and (greeting := nodes.greet(address)) is not None
    ]
    yield from nodes.check_greetings(expected, found, ingest.max_event_bytes)
    yield from nodes.check_certificates(found, settings.ca_file, time.time() + clock_offset)

    seen = None
    try:
        seen, refused = asyncio.run(_ask(patient.target))
        yield from refused
    except CommandError as problem:
        yield error("permissions", str(problem), _NOT_ASKED, _ASK_AS)
    except FiqError as problem:
        yield log.unreachable(problem)
    told = () if seen is None else seen.nodes
    if patient.monitoring or not told:
        others, out_of_reach = nodes.from_ports(nodes.monitoring_urls(patient.monitoring, expected))
        known = {node.name for node in told}
        told = (*told, *(node for node in others if node.name not in known))
        yield from nodes.unreachable(out_of_reach)
    else:
        greeted = {str(greeting.info.get("server_name")) for greeting in found}
        yield from nodes.silent(greeted - {node.name for node in told})
    yield from nodes.check_nodes(told, clock_offset)
    if seen is not None:
        yield from log.check_clocks(seen, clock_offset, [node.name for node in told])
        yield from log.check_stream(seen, settings)
        yield from log.check_dead_letters(seen)
        yield from log.check_placement(seen, persister.volumes)
        yield from corpus.check_workers(seen.workers, patient.directory, held_back)
    yield from _examine_directory(patient.directory, seen)


async def _ask(target: Target) -> tuple[log.LogView, list[Finding]]:
    async with connected(target.settings) as connection:
        try:
            seen = await log.examine(connection, target.settings, target.state)
        except FiqError as problem:
            violations = connection.violations if isinstance(connection, Connection) else []
            if violations:
                raise CommandError(f"this user may not ask: {violations[0]}") from problem
            raise
        violations = connection.violations if isinstance(connection, Connection) else []
    return seen, [_refused(text) for text in violations]


def _refused(violation: str) -> Finding:
    if f'"{names.NODES_PREFIX}.' in violation:
        what = "this user may not ask the nodes: the accounts are those of an older fiq, or it is not `ops`"
        return warning("permissions", what, _NOT_ASKED, f"{_ASK_AS}; `fiq init FOLDER`, and reload the nodes")
    return error("permissions", f"this user may not ask: {violation}", _NOT_ASKED, _ASK_AS)


def _examine_directory(directory: Path | None, seen: log.LogView | None) -> Iterator[Finding]:
    if directory is None:
        yield unknown("corpus", "there is no data directory here", "run fiq doctor on the host of each volume, too")
        return
    yield from machine.data_directory(directory)
    yield from corpus.check_files(directory, seen)
    yield from corpus.check_backup(directory, seen)
