"""``fiq doctor``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import orjson
import typer

from services.cli import console
from services.cli.doctor.finding import Finding, Level, worst
from services.cli.errors import CommandError
from services.cli.progress import bar
from services.cli.target import FolderOption, ServerOption, Target, find_cluster, find_corpus


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
    """Look at everything that a deployment rests on, and say what is wrong, what it means and what to do.

    The exit code is 1 when anything needs somebody now. Changes nothing.
    """
    from services.cli.doctor.examination import Patient, examine  # h5py is slow to import

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
