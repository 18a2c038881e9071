"""``fiq get`` and ``fiq follow``: events from the service, those included that are not in HDF5 yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fiq.client import AsyncClient, ClientError, RetryPolicy, StoredEvent
from services.cli import console
from services.cli.errors import CommandError, UsageError
from services.cli.target import CaFileOption, FolderOption, TokenFileOption, UrlOption, find_service, trusting
from services.cli.times import Period, SinceOption

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

    async def ask() -> StoredEvent | None:
        async with _service(url, folder, token_file, ca_file, patience) as client:
            return await client.event(consultation, message)

    event = asyncio.run(ask())
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
    begin = None if since is None else datetime.fromtimestamp(Period.of(since, None).since // 10**9, UTC)

    async def print_all() -> None:
        async with _service(url, folder, token_file, ca_file, patience) as client:
            if consultation is None:
                found = client.follow_all(after, type=event_type, since=begin)
            else:
                found = client.follow(consultation, after or 0, type=event_type, since=begin)
            async with aclosing(found) as events:
                async for event in events:
                    typer.echo(console.as_json(_document(event)) if json else _line(event, named=every))

    asyncio.run(print_all())


@asynccontextmanager
async def _service(
    url: str | None, folder: Path | None, token_file: Path | None, ca_file: Path | None, patience: float
) -> AsyncIterator[AsyncClient]:
    service = find_service(url, folder, token_file)
    retry = RetryPolicy(deadline=patience, attempt_timeout=patience)
    try:
        async with AsyncClient(service.url, service.token, retry=retry, context=trusting(ca_file)) as client:
            yield client
    except ClientError as error:
        token = " (its token: --token-file or FI_TOKEN)" if error.status == 401 else ""
        raise CommandError(f"{error}{token}") from None


def _document(event: StoredEvent) -> dict[str, Any]:
    return {
        "consultation": event.consultation,
        "message_id": str(event.message_id),
        "sequence": event.sequence,
        "received": event.received,
        "persisted": event.persisted,
        "event": event.event,
    }


def _line(event: StoredEvent, *, named: bool) -> str:
    """Return a line as `fiq show` prints it, with the consultation if it is to be *named*."""
    payload = console.as_json(event.event.get("payload"))
    when = f"{event.received[:26]}Z"
    name = f"{event.consultation}  " if named else ""
    return console.printable(f"{event.sequence:>10}  {when}  {name}{event.event.get('event_type', '')}  {payload}")
