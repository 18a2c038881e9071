"""An upgrade that clients do not notice."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.compose.clients import Client
from tests.support.compose.stack import Deployment

pytestmark = pytest.mark.timeout(600)

CLIENTS = 4


async def test_a_client_that_retries_once_sees_no_failure(stack: Deployment) -> None:
    """Nodes, persisters and ingests are restarted one after the other under load; nothing is lost either."""
    client = Client(stack.url, stack.token)
    async with client.posting(CLIENTS):
        await asyncio.to_thread(stack.rolling_restart)
    assert [] == client.failed
    assert len(client.accepted) > 100
    stack.accepted.update(client.accepted)
    await stack.is_whole()
    await stack.is_verified()
