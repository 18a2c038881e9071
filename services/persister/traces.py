"""Which traces came with a batch: found again in the log, and linked from the batch's span."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fiq.event import Event
from fiq.trace import trace_of_message
from services.core.logs import EVENT_TRACED
from services.core.tracing import Spans
from services.log.protocol import EVENT_LOG

if TYPE_CHECKING:
    from services.persister.rounds import Batch

#: lines of one batch, at most; a batch may be thousands of events, each of a trace of its own
MAX_LINES = 64


@dataclass(slots=True)
class _Found:
    sequence: int
    event: Event
    count: int = 0


class Traces:
    """Shows the traces of what was committed.

    Args:
        spans: makes spans of the batches, if anybody wants them.
    """

    def __init__(self, spans: Spans | None = None) -> None:
        self._spans = spans

    def show(self, log: Any, partition: str, batch: Batch, seconds: float) -> None:
        """Log one line for each sampled trace of a batch, up to a limit, and make the batch's span.

        Args:
            log: of the partition.
            partition: its name.
            batch: what was committed.
            seconds: that it took.
        """
        traced = [numbered for numbered in batch.events if numbered[1].trace is not None]
        if traced:
            _log_lines(log, traced, batch)
        if self._spans is not None:
            traces = [event.trace for _, event in traced if event.trace is not None and event.trace.sampled]
            self._spans.persisted(EVENT_LOG, partition, traces, events=len(batch.events), seconds=seconds)


def trace_id_in(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return what a log line says of the trace that a message's *headers* name, if they name one."""
    trace = trace_of_message(headers or {})
    return {} if trace is None else {"trace_id": trace.trace_id}


def _log_lines(log: Any, traced: list[tuple[int, Event]], batch: Batch) -> None:
    set_aside = {conflict.sequence for conflict in batch.conflicts}
    found: dict[str, _Found] = {}
    for sequence, event in traced:
        if event.trace is not None and event.trace.sampled and sequence not in set_aside:
            found.setdefault(event.trace.trace_id, _Found(sequence, event)).count += 1
    for trace_id, first in list(found.items())[:MAX_LINES]:
        log.info(
            EVENT_TRACED,
            trace_id=trace_id,
            consultation_id=first.event.consultation,
            message_id=str(first.event.event_id),
            sequence=first.sequence,
            events=first.count,
        )
    if len(found) > MAX_LINES:
        log.info("TRACES_LEFT_OUT", traces=len(found) - MAX_LINES)
