"""The commands that ask a running service over HTTP: ``fiq get`` and ``follow``, and ``fiq dead``.

The first two show events, those included that are not in HDF5 yet. ``fiq dead`` is about the dead letters; it needs a
token of the scope ``ops``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar
from uuid import UUID

import orjson
import typer

from fiq.client import AsyncClient, ClientError, InvalidArgumentError, RetryPolicy, StoredEvent
from services.cli import console
from services.cli.errors import CommandError, UsageError
from services.cli.target import (
    CaFileOption,
    FolderOption,
    TokenFileOption,
    UrlOption,
    check_consultation,
    find_service,
    trusting,
)
from services.cli.times import Period, SinceOption

T = TypeVar("T")

PatienceOption = Annotated[float, typer.Option(min=1, max=86400, help="How long the service may not answer, seconds.")]


def get(
    consultation: Annotated[str, typer.Argument(help="Id of the consultation.")],
    message: Annotated[str, typer.Argument(help="Message id of the event, a UUID.")],
    url: UrlOption = None,
    folder: FolderOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    patience: PatienceOption = 10,
) -> None:
    """Print one event as JSON, in HDF5 or not yet."""
    check_consultation(consultation)
    message_id, asked = _message_id(message), _patient(patience)
    event = _ask(url, folder, token_file, ca_file, lambda client: client.event(consultation, message_id), retry=asked)
    if event is None:
        raise CommandError(f"consultation {consultation!r} has no event {message}")
    for line in console.as_json(_document(event), indent=2).splitlines():
        typer.echo(console.printable(line))


def follow(
    consultation: Annotated[str | None, typer.Argument(help="Id of the consultation; or --all.")] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Events of all consultations; without --after new ones only."),
    ] = False,
    event_type: Annotated[str | None, typer.Option("--type", help="Only events of this type.")] = None,
    since: SinceOption = None,
    after: Annotated[int | None, typer.Option(min=0, help="Only events whose sequence is greater than this.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print each event as a JSON object on one line.")] = False,
    url: UrlOption = None,
    folder: FolderOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    patience: PatienceOption = 60,
) -> None:
    """Print a consultation's events as they come.

    First those that are stored, then each new one, once and in order, until Ctrl-C.
    """
    if (consultation is not None) == every:
        raise UsageError("name one consultation, or choose all of them with --all")
    if consultation is not None:
        check_consultation(consultation)
    begin = None if since is None else datetime.fromtimestamp(Period.of(since, None).since // 10**9, UTC)

    async def print_all() -> None:
        async with _service(url, folder, token_file, ca_file, _patient(patience)) as client:
            if consultation is None:
                found = client.follow_all(after, type=event_type, since=begin)
            else:
                found = client.follow(consultation, after or 0, type=event_type, since=begin)
            async with aclosing(found) as events:
                async for event in events:
                    typer.echo(console.as_json(_document(event)) if json else _line(event, named=every))

    asyncio.run(print_all())


def _message_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a message id, which is a UUID") from None


def _document(event: StoredEvent) -> dict[str, Any]:
    return {
        "consultation": event.consultation,
        "message_id": str(event.message_id),
        "sequence": event.sequence,
        "received": event.received,
        "persisted": event.persisted,
        "written": event.written,
        "event": event.event,
    }


def _line(event: StoredEvent, *, named: bool) -> str:
    """Return a line as `fiq show` prints it, with the consultation if it is to be *named*."""
    payload = console.as_json(event.event.get("payload"))
    when = f"{event.received[:26]}Z"
    name = f"{event.consultation}  " if named else ""
    return console.printable(f"{event.sequence:>10}  {when}  {name}{event.event.get('event_type', '')}  {payload}")


# -- fiq dead ---------------------------------------------------------------------------------------------------------

#: how a request is tried; and with --wait: for longer than the broker remembers ids by default
_RETRY, _WAITING = RetryPolicy(deadline=15.0), RetryPolicy(deadline=900.0)

dead = typer.Typer(
    name="dead",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="List, show, requeue and drop dead letters.",
)

SequencesArgument = Annotated[list[int], typer.Argument(help="Sequences of dead letters, as `fiq dead list` has them.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dead.command(name="list")
def list_(
    url: UrlOption = None,
    folder: FolderOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    json: _JsonOption = False,
) -> None:
    """Show what was set aside, why, and whether it can go back. Bodies are not shown."""

    async def run(client: AsyncClient) -> list[dict[str, Any]]:
        return [letter async for letter in client.dead_letters()]

    letters = _ask(url, folder, token_file, ca_file, run, retry=_RETRY)
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
    json: _JsonOption = False,
) -> None:
    """Print one dead letter with its body, which is medical data. The service writes that into its audit log."""
    letter = _ask(url, folder, token_file, ca_file, lambda client: client.dead_letter(sequence), retry=_RETRY)
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
    json: _JsonOption = False,
) -> None:
    """Put events back into the log under their ids.

    When persisters can write them. Safe to repeat.
    """
    retry = _WAITING if wait else _RETRY

    async def run(client: AsyncClient) -> list[dict[str, Any]]:
        return await _each(sequences, lambda sequence: client.requeue(sequence, reason))

    _report(_ask(url, folder, token_file, ca_file, run, retry=retry), json=json)


@dead.command()
def drop(
    sequences: SequencesArgument,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")],
    url: UrlOption = None,
    folder: FolderOption = None,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    json: _JsonOption = False,
) -> None:
    """Remove dead letters for good, with their bodies."""

    async def run(client: AsyncClient) -> list[dict[str, Any]]:
        return await _each(sequences, lambda sequence: client.drop(sequence, reason))

    _report(_ask(url, folder, token_file, ca_file, run, retry=_RETRY), json=json)


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


# -- the client of the service ----------------------------------------------------------------------------------------


def _patient(seconds: float) -> RetryPolicy:
    """Return the policy for a service that may not answer for *seconds*."""
    return RetryPolicy(deadline=seconds, attempt_timeout=seconds)


def _ask(
    url: str | None,
    folder: Path | None,
    token_file: Path | None,
    ca_file: Path | None,
    run: Callable[[AsyncClient], Coroutine[Any, Any, T]],
    *,
    retry: RetryPolicy,
) -> T:
    """Return the result of *run* with a client of the service."""

    async def ask() -> T:
        async with _service(url, folder, token_file, ca_file, retry) as client:
            return await run(client)

    return asyncio.run(ask())


@asynccontextmanager
async def _service(
    url: str | None, folder: Path | None, token_file: Path | None, ca_file: Path | None, retry: RetryPolicy
) -> AsyncIterator[AsyncClient]:
    """Open a client of the service.

    Raises UsageError: an argument is malformed; CommandError: FI_URL or the token is, or the service refused a request
    or did not answer.
    """
    service = find_service(url, folder, token_file)
    try:
        client = AsyncClient(service.url, service.token, retry=retry, context=trusting(ca_file))
    except InvalidArgumentError as error:
        raise CommandError(f"{service}: {error}") from None
    try:
        async with client:
            yield client
    except InvalidArgumentError as error:
        raise UsageError(str(error)) from None
    except ClientError as error:
        token = " (its token: --token-file or FI_TOKEN)" if error.status == 401 else ""
        raise CommandError(f"{service}: {error}{token}") from None
