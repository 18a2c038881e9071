"""How far the position of an idle partition may move although no event of it stands there.

A consumer that has nothing pending proves nothing: its leader counts what *its* replica of the stream holds, which may
lag behind what the stream's leader has acknowledged to clients. (Measured: with that as the proof, `fiq demo` lost 2 of
4,000 events at a failover.) So the stream's leader is asked for the partition's next event. Only it answers
``STREAM.MSG.GET``, and what it holds up to its last sequence is final.
"""

from __future__ import annotations

from typing import Any

from services.eventlog.jetstream.api import ApiError, JetStreamApi
from services.eventlog.jetstream.names import STREAM, filter_subject

_NO_MESSAGE = 10037


async def empty_up_to(api: JetStreamApi, partition: int, after: int) -> int:
    """Return a sequence up to which the stream holds no event of *partition* behind position *after*.

    That is *after* itself when it holds one, or when the leadership changed while the question was asked.

    Raises:
        LogUnavailableError: no answer.
    """
    first = await api.stream_info(STREAM)
    if first is None or first["state"]["last_seq"] <= after:
        return after
    try:
        await api.request(f"STREAM.MSG.GET.{STREAM}", {"seq": after + 1, "next_by_subj": filter_subject(partition)})
    except ApiError as error:
        if error.err_code != _NO_MESSAGE:
            raise
    else:
        return after
    second = await api.stream_info(STREAM)
    if second is None or _leadership(first) != _leadership(second):
        return after
    return int(first["state"]["last_seq"])


def _leadership(info: dict[str, Any]) -> tuple[str, str]:
    return info["created"], (info.get("cluster") or {}).get("leader", "")
