"""Generated consultations: the text of nobody, in the shape of the real thing."""

from __future__ import annotations

import random
from dataclasses import dataclass
from uuid import UUID

import orjson

_OPENINGS = ("What brings you in today?", "How have you been since the last visit?", "Where does it hurt?")
_QUESTIONS = ("Since when?", "Does it get worse at night?", "Any fever?", "Do you take anything for it?", "How strong?")
_ANSWERS = ("For about {n} days.", "No, I don't think so.", "Yes, mostly in the morning.", "{n} out of ten.", "A bit.")
_SUMMARY = "Symptoms for {n} days. Advised rest and a follow-up in {m} weeks."


@dataclass(frozen=True, slots=True)
class Post:
    """One request.

    Attributes:
        consultation: id of the consultation.
        key: the idempotency key, a UUID, so that it is the event's id too.
        body: the JSON document.
    """

    consultation: str
    key: str
    body: bytes


def generate(events: int, *, seed: int, per_consultation: int = 10) -> list[list[Post]]:
    """Return consultations with *events* events in all, the same for the same *seed*.

    Args:
        events: how many events.
        seed: of the pseudo-random generator.
        per_consultation: mean number of events in a consultation.
    """
    chance = random.Random(seed)  # noqa: S311 - no secrets
    consultations: list[list[Post]] = []
    left = events
    while left > 0:
        count = min(left, chance.randint(2, 2 * per_consultation - 2))
        consultations.append(_consultation(f"demo-{len(consultations):05d}", count, chance))
        left -= count
    return consultations


def post(consultation: str, body: dict[str, object], chance: random.Random) -> Post:
    """Return the request that posts *body*, with a key drawn from *chance*."""
    return Post(consultation, str(UUID(int=chance.getrandbits(128), version=4)), orjson.dumps(body))


def _consultation(name: str, count: int, chance: random.Random) -> list[Post]:
    events: list[dict[str, object]] = [_message("Doctor", chance.choice(_OPENINGS))]
    while len(events) < count - 1:
        doctor = len(events) % 2 == 0
        text = chance.choice(_QUESTIONS if doctor else _ANSWERS).format(n=chance.randint(1, 9))
        events.append(_message("Doctor" if doctor else "Patient", text))
    summary = _SUMMARY.format(n=chance.randint(1, 9), m=chance.randint(1, 4))
    events.append({"event_type": "CONSULTATION_SUMMARIZED", "payload": {"text": summary}})
    return [post(name, event, chance) for event in events[:count]]


def _message(speaker: str, text: str) -> dict[str, object]:
    return {"event_type": "MESSAGE_RECEIVED", "payload": {"speaker": speaker, "text": text}}
