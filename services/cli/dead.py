"""``fiq dead``: the dead letters of a running service, over its HTTP interface, with a token of the scope ``ops``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer

from fiq.client import AsyncClient, ClientError, RetryPolicy
from services.cli import console
from services.cli.errors import CommandError
from services.cli.target import CaFileOption, TokenFileOption, UrlOption, find_service, trusting

T = TypeVar("T")

#: how long a request is tried, seconds; and with --wait: longer than the broker remembers ids by default
_DEADLINE, _PATIENCE = 15.0, 900.0

dead = typer.Typer(
    name="dead",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="List, show, requeue and drop dead letters.",
)

FolderOption = Annotated[Path | None, typer.Option(help="Folder of that `fiq up`; ./.fiq by default.")]
SequencesArgument = Annotated[list[int], typer.Argument(help="Sequences of dead letters, as `fiq dead list` has them.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dead.command(name="list")
def list_(
    url: UrlOption = None,
    folder: FolderOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    json: JsonOption = False,
) -> None:
    """Show what was set aside, why, and whether it can go back. Bodies are not shown."""

    async def run(client: AsyncClient) -> list[dict[str, Any]]:
        return [letter async for letter in client.dead_letters()]

    letters = _with_client(url, folder, token_file, ca_file, run)
    if json:
        typer.echo(orjson.dumps(letters, option=orjson.OPT_INDENT_2))
        return
    table = console.table(">sequence", "time", "kind", "consultation", ">bytes", "requeue", "reason")
    for letter in letters:
        table.add_row(
            str(letter["sequence"]),
            str(letter["time"])[:19] + "Z",
            str(letter["kind"]),
            console.printable(str(letter["consultation_id"] or "-")),
            str(letter["bytes"]),
            "no" if letter["obstacle"] else "yes",
            console.printable(str(letter["reason"])),
        )
    if letters:
        console.show(table)
    else:
        typer.echo("no dead letters")


@dead.command()
def show(
    sequence: Annotated[int, typer.Argument(help="Sequence of a dead letter.")],
    url: UrlOption = None,
    folder: FolderOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    json: JsonOption = False,
) -> None:
    """Print one dead letter with its body, which is medical data. The service writes that into its audit log."""
    letter = _with_client(url, folder, token_file, ca_file, lambda client: client.dead_letter(sequence))
    if json:
        typer.echo(console.as_json(letter, indent=2))
        return
    for name, value in letter.items():
        if value is not None and name not in {"body", "events"}:
            typer.echo(f"{name}: {console.printable(str(value))}")
    for event in letter.get("events", ()):
        typer.echo(console.printable(console.as_json(event)))
    if "body" in letter:
        typer.echo(f"\n{console.printable(str(letter['body']))}")


@dead.command()
def requeue(
    sequences: SequencesArgument,
    reason: Annotated[str, typer.Option(help="For the audit log.")] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the log has forgotten the ids: at most FI_DUPLICATE_WINDOW.")
    ] = False,
    url: UrlOption = None,
    folder: FolderOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    json: JsonOption = False,
) -> None:
    """Put events back into the log under their ids.

    When persisters can write them. Safe to repeat.
    """
    deadline = _PATIENCE if wait else _DEADLINE

    async def run(client: AsyncClient) -> list[dict[str, Any]]:
        return await _each(sequences, lambda sequence: client.requeue(sequence, reason))

    _report(_with_client(url, folder, token_file, ca_file, run, deadline=deadline), json=json)


@dead.command()
def drop(
    sequences: SequencesArgument,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")],
    url: UrlOption = None,
    folder: FolderOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    json: JsonOption = False,
) -> None:
    """Remove dead letters for good, with their bodies."""

    async def run(client: AsyncClient) -> list[dict[str, Any]]:
        return await _each(sequences, lambda sequence: client.drop(sequence, reason))

    _report(_with_client(url, folder, token_file, ca_file, run), json=json)


async def _each(sequences: list[int], act: Callable[[int], Awaitable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what *act* says of each of *sequences*; one that fails does not keep the others from it."""
    done = []
    for sequence in sequences:
        try:
            done.append(await act(sequence))
        except ClientError as error:
            done.append({"status": "failed", "sequence": sequence, "reason": str(error)})
    return done


def _report(results: list[dict[str, Any]], *, json: bool) -> None:
    """Print what was done; exit with 1 if anything failed."""
    if json:
        typer.echo(orjson.dumps(results, option=orjson.OPT_INDENT_2))
    for one in results if not json else ():
        if one["status"] == "failed":
            typer.echo(f"fiq: {one['sequence']}: {one['reason']}", err=True)
        elif one["status"] == "requeued":
            where = f"{one['consultation_id']}/{one['message_id']}, now sequence {one['stream_sequence']}"
            typer.echo(f"{one['sequence']} requeued: {where}")
        else:
            typer.echo(f"{one['sequence']} {one['status']}")
    if any(one["status"] == "failed" for one in results):
        raise typer.Exit(1)


def _with_client(
    url: str | None,
    folder: Path | None,
    token_file: Path | None,
    ca_file: Path | None,
    run: Callable[[AsyncClient], Coroutine[Any, Any, T]],
    *,
    deadline: float = _DEADLINE,
) -> T:
    """Return the result of *run* with a client of the service."""
    service = find_service(url, folder, token_file)

    async def with_client() -> T:
        retry = RetryPolicy(deadline=deadline)
        async with AsyncClient(service.url, service.token, retry=retry, context=trusting(ca_file)) as client:
            return await run(client)

    try:
        return asyncio.run(with_client())
    except ClientError as error:
        raise CommandError(f"{service}: {error}") from None
