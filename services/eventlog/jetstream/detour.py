"""Reads a partition's next event through the API, where the consumer cannot deliver it.

nats-server 2.15.1 stores a subject with a carriage return, but its own routes do not carry it: the node that receives
it closes the route ("Bad or Missing Reply Indicator"), the consumer on the other side falls silent, and every reset
brings the same message again. The API answers in JSON, which escapes it; so the message can be set aside like any
other poison.
"""

from __future__ import annotations

from base64 import b64decode

from nats.aio.client import Client

from services.eventlog.jetstream.api import ApiError, JetStreamApi
from services.eventlog.jetstream.names import STREAM, filter_subject
from services.eventlog.protocol import Delivery

_NO_MESSAGE = 10037


async def next_event(nc: Client, partition: int, after: int) -> Delivery | None:
    """Return the first event of *partition* behind position *after*, without a token; None when there is none.

    Raises:
        LogUnavailableError: no answer.
    """
    request = {"seq": after + 1, "next_by_subj": filter_subject(partition)}
    try:
        message = (await JetStreamApi(nc).request(f"STREAM.MSG.GET.{STREAM}", request))["message"]
    except ApiError as error:
        if error.err_code == _NO_MESSAGE:
            return None
        raise
    consultation = message["subject"][len(filter_subject(partition)) - 1 :]
    headers = await nc._process_headers(b64decode(message.get("hdrs", "")))
    return Delivery(int(message["seq"]), consultation, headers, b64decode(message.get("data", "")), token="")
