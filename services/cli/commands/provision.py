"""``fiq provision``."""

from __future__ import annotations

import asyncio

import typer

from services.cli.target import FolderOption, ServerOption, Target, connected, find_cluster
from services.eventlog.jetstream import names
from services.eventlog.jetstream.names import Role
from services.eventlog.jetstream.provision import provision as provision_log
from services.eventlog.protocol import LogIdentity


def provision(server: ServerOption = None, folder: FolderOption = None) -> None:
    """Create the streams, or check that they are what the settings ask for. Changes nothing that is right already.

    The FI_… settings of the log apply: FI_PARTITIONS, FI_REPLICAS, FI_STREAM_MAX_BYTES and so on.
    """
    target = find_cluster(server, folder, fallback=True)
    identity = asyncio.run(_provision(target))
    settings = target.settings
    typer.echo(
        f"stream {identity.name}, created {identity.created}: {settings.partitions} partitions, "
        f"{settings.replicas} replicas, {settings.max_bytes} bytes at most; dead letters in {names.DEAD_STREAM}"
    )


async def _provision(target: Target) -> LogIdentity:
    async with connected(target.settings, Role.PROVISIONER) as connection:
        return await provision_log(connection, target.settings)
