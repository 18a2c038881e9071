"""The posting side of the service, in memory: keeps each key's first event, and fails when it is told to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from uuid import UUID

import orjson
from aiohttp import web

from fiq.event import event_id_from_key
from tests.support import scripted_http


@dataclass
class MemoryService:
    """Give :meth:`step` to :func:`tests.support.scripted_http.scripted`.

    Attributes:
        events: (consultation, event id) and body, in the order in which they were stored.
        batches: whether it has the batch resources.
        most: events of a batch that it takes.
        refuses: bodies that it takes never.
        fails: requests that it answers with 503, once each, by number from 1.
        gate: what it waits for before it answers, when there is one.
        numbered: results have sequences, which takes long where there are many events.
        sizes: events of each request.
    """

    batches: bool = True
    most: int = 1000
    refuses: bytes | None = None
    fails: set[int] = field(default_factory=set)
    gate: asyncio.Event | None = None
    numbered: bool = True
    events: dict[tuple[str, UUID], bytes] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    most_at_once: int = 0
    _under_way: int = 0

    def bodies(self, consultation: str) -> list[bytes]:
        """Return what is stored of a consultation, in order."""
        return [body for (owner, _), body in self.events.items() if owner == consultation]

    async def step(self, request: web.BaseRequest) -> web.StreamResponse:
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            return await self._answered(request)
        finally:
            self._under_way -= 1

    async def _answered(self, request: web.BaseRequest) -> web.StreamResponse:
        is_batch = request.path.endswith("/batch")
        if is_batch and not self.batches:
            return await scripted_http.refused(404, "not-found")(request)
        lines = self._lines(request, await request.read())
        self.sizes.append(len(lines))
        if len(self.sizes) in self.fails:
            return await scripted_http.refused(503, "log-unavailable")(request)
        if len(lines) > self.most:
            return await scripted_http.refused(413, "too-many-events")(request)
        wrong = [{"line": number, "reason": "too bad"} for number, _, _, body in lines if body == self.refuses]
        if wrong:
            return await scripted_http.refused(422, "invalid-batch", lines=wrong)(request)
        if self.gate is not None:
            await self.gate.wait()
        results = [self._stored(consultation, event_id, body) for _, consultation, event_id, body in lines]
        document: dict[str, object] = {"results": results} if is_batch else results[0]
        return web.json_response({"status": "accepted", **document}, status=202)

    def _lines(self, request: web.BaseRequest, raw: bytes) -> list[tuple[int, str, UUID, bytes]]:
        key, parts = request.headers["Idempotency-Key"], request.path.split("/")
        if parts[-1] != "batch":
            return [(1, parts[2], event_id_from_key(key), raw)]
        found = []
        for number, body in enumerate(raw.split(b"\n"), start=1):
            if body:
                event = orjson.loads(body)
                consultation = parts[2] if parts[1] == "consultations" else event["consultation_id"]
                event_id = event_id_from_key(event.get("event_id") or f"{key}:{number}")
                found.append((number, consultation, event_id, body))
        return found

    def _stored(self, consultation: str, event_id: UUID, body: bytes) -> dict[str, object]:
        known = (consultation, event_id) in self.events
        first = self.events.setdefault((consultation, event_id), body)
        assert first == body
        sequence = list(self.events).index((consultation, event_id)) + 1 if self.numbered else 1
        result = {"message_id": str(event_id), "consultation_id": consultation, "sequence": sequence}
        return result | ({"duplicate": True} if known else {})
