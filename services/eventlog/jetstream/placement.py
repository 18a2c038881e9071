"""Which volume a partition lives on: the metadata of the partition's own consumer, where everybody can read it.

Creating the consumer with ``action: create`` claims an unplaced partition. The broker lets exactly one claimant win,
because the metadata name the claimant's volume: the same request again succeeds, another one gets 400/10148.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nats.aio.client import Client

from services.eventlog.errors import LogMismatchError, LogUnavailableError, PlacementError
from services.eventlog.jetstream.api import STREAM_NOT_FOUND, ApiError, JetStreamApi
from services.eventlog.jetstream.definitions import consumer_config
from services.eventlog.jetstream.names import EPOCH_KEY, STREAM, VOLUME_KEY, consumer_name
from services.eventlog.partitions import partition_name
from services.eventlog.protocol import LogIdentity
from services.eventlog.settings import LogSettings

#: the consumer exists with another configuration
_EXISTS = 10148
#: how often a consumer that another volume created at the same moment is asked for, and for how long each, seconds
_TRIES = 10
_TRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a partition lives.

    Attributes:
        partition: its number.
        volume: UUID of the volume that holds its file; empty when the consumer names none.
        epoch: how often it was placed, from 1; the file must say the same.
    """

    partition: int
    volume: str
    epoch: int


class Placements:
    """Reads, claims and renews the places of one store's partitions."""

    def __init__(self, nc: Client, settings: LogSettings) -> None:
        self._api = JetStreamApi(nc)
        self._hasty_api = JetStreamApi(nc, timeout=_TRY_SECONDS)
        self._settings = settings

    async def read(self) -> dict[int, Placement]:
        """Return the placed partitions of the store.

        Raises:
            LogMismatchError: there is no stream.
            LogUnavailableError: the broker did not answer.
        """
        names = {consumer_name(self._settings.store, p): p for p in range(self._settings.partitions)}
        found = {}
        try:
            infos = await self._api.list_consumers(STREAM)
        except ApiError as error:
            if error.err_code != STREAM_NOT_FOUND:
                raise
            raise LogMismatchError(f"stream {STREAM} was deleted: see docs/operations.md, `A lost stream`") from error
        for info in infos:
            partition = names.get(info["name"])
            if partition is not None:
                found[partition] = placement_of(partition, info)
        return found

    async def check_log(self, identity: LogIdentity) -> None:
        """Make sure that the stream is the one of *identity*: a claim on a re-created one would bind it to our volume.

        Raises:
            LogMismatchError: it is another one, or gone.
            LogUnavailableError: the broker did not answer.
        """
        stream = await self._api.stream_info(STREAM)
        if stream is None or stream["created"] != identity.created:
            raise LogMismatchError(
                f"stream {STREAM} is not the one created at {identity.created} that this process began with: it was "
                "deleted or created anew; no partition is claimed on it"
            )

    async def claim(self, partition: int, volume: str, epoch: int) -> Placement:
        """Place *partition* on *volume* unless it is placed already; return where it lives now.

        A creation that times out may still take effect: the next call of the same volume succeeds then.

        Raises:
            LogUnavailableError: the outcome is not known; call again.
            ApiError: the broker refuses.
        """
        name = consumer_name(self._settings.store, partition)
        config = consumer_config(self._settings, partition, {VOLUME_KEY: volume, EPOCH_KEY: str(epoch)})
        try:
            info = await self._api.create_consumer(STREAM, config)
        except ApiError as error:
            if error.err_code != _EXISTS:
                raise
            info = await self._existing(name)
        return placement_of(partition, info)

    async def renew(self, partition: int, volume: str, epoch: int) -> None:
        """Place *partition*, which lives on *volume*, there once more: from now on a file of an older epoch is refused.

        What the consumer has delivered and what is acknowledged stay as they are.

        Raises:
            PlacementError: it lives elsewhere, or was placed anew meanwhile.
            LogUnavailableError: the outcome is not known; look again.
            ApiError: the broker refuses.
        """
        name = consumer_name(self._settings.store, partition)
        info = await self._existing(name)
        found = placement_of(partition, info)
        if found.volume != volume or found.epoch >= epoch:
            raise PlacementError(
                f"partition {partition_name(partition)} lives on volume {found.volume or '(none)'}, epoch "
                f"{found.epoch}, by now: it cannot get epoch {epoch} on volume {volume}"
            )
        # an update replaces all metadata; what the server adds to them is its own affair
        metadata = {VOLUME_KEY: volume, EPOCH_KEY: str(epoch)}
        await self._api.create_consumer(STREAM, {**info["config"], "metadata": metadata}, action="update")

    async def _existing(self, name: str) -> dict[str, Any]:
        """Return the info of a consumer that exists: it does not answer while it has no leader."""
        for _ in range(_TRIES):
            with contextlib.suppress(LogUnavailableError):
                if (info := await self._hasty_api.consumer_info(STREAM, name)) is not None:
                    return info
        raise LogUnavailableError(f"consumer {name} exists but cannot be read yet")


def placement_of(partition: int, info: Mapping[str, Any]) -> Placement:
    """Return where *partition* lives as the *info* of its consumer says."""
    metadata = info["config"].get("metadata") or {}
    epoch = metadata.get(EPOCH_KEY, "")
    return Placement(partition, metadata.get(VOLUME_KEY, ""), int(epoch) if epoch.isdigit() else 0)
