"""Clients of fiq's HTTP interface: every retry is safe, no event is skipped and none is repeated.

::

    from fiq import Client

    with Client("http://127.0.0.1:7001") as client:
        accepted = client.post("visit-17", {"event_type": "MESSAGE_RECEIVED", "payload": {"text": "hello"}})
        print(accepted.sequence)

:class:`AsyncClient` has the same methods as coroutines and asynchronous generators.
"""

from fiq.client.batches import EventBody
from fiq.client.client import AsyncClient, RetryPolicy
from fiq.client.errors import (
    ClientError,
    ClosedError,
    GaveUpError,
    InvalidArgumentError,
    RefusedError,
    UnexpectedAnswerError,
)
from fiq.client.records import Accepted, BadLine, ConsultationSummary, Problem, StoredEvent
from fiq.client.sync import Client

__all__ = [
    "Accepted",
    "AsyncClient",
    "BadLine",
    "Client",
    "ClientError",
    "ClosedError",
    "ConsultationSummary",
    "EventBody",
    "GaveUpError",
    "InvalidArgumentError",
    "Problem",
    "RefusedError",
    "RetryPolicy",
    "StoredEvent",
    "UnexpectedAnswerError",
]
