"""A client of fiq's HTTP interface: every retry is safe, nothing is skipped and nothing is repeated.

::

    from fiq.client import AsyncClient

    async with AsyncClient("http://127.0.0.1:7001") as client:
        accepted = await client.post("visit-17", {"event_type": "MESSAGE_RECEIVED", "payload": {"text": "hello"}})
        print(accepted.sequence)
"""

from fiq.client.client import AsyncClient
from fiq.client.errors import ClientError, GaveUpError, RefusedError, UnexpectedAnswerError
from fiq.client.exchange import RetryPolicy
from fiq.client.records import Accepted, BadLine, Problem, StoredEvent

__all__ = [
    "Accepted",
    "AsyncClient",
    "BadLine",
    "ClientError",
    "GaveUpError",
    "Problem",
    "RefusedError",
    "RetryPolicy",
    "StoredEvent",
    "UnexpectedAnswerError",
]
