"""The events that are posted: real dialogues where they are, generated consultations otherwise."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from fiq.event import Event
from tests.support.dialogues import DATA, consultations, source

#: events of a consultation in a backlog: what makes 500 events in a row touch 10 consultations possible
CONSULTATION_EVENTS = 50
#: length of the stretch whose number of consultations is controlled
STRETCH = 500

_SEED = 20230501
#: when the events of a backlog were "received", nanoseconds since the Unix epoch; its value plays no role
_RECEIVED_NS = 1_700_000_000_000_000_000


@dataclass(frozen=True, slots=True)
class Dialogues:
    """What is posted.

    Attributes:
        source: what the text is, for the report.
        consultations: the JSON bodies of each consultation, in order.
    """

    source: str
    consultations: list[list[bytes]]

    @property
    def bodies(self) -> list[bytes]:
        """All bodies, consultation by consultation."""
        return [body for consultation in self.consultations for body in consultation]


def load(folder: Path = DATA) -> Dialogues:
    """Read MTS-Dialog from *folder*; generate consultations when it is not there."""
    bodies = [[post.body for post in posts] for posts in consultations(folder)]
    return Dialogues(source(folder), bodies)


def backlog(dialogues: Dialogues, events: int, spread: int) -> Iterator[Event]:
    """Yield *events* events such that each 500 in a row, from a multiple of 500 on, touch *spread* consultations.

    A consultation has 50 events, whatever the spread: *spread* of them are open at a time, each gets the same number
    of every 500 events in a shuffled order, and new ones take their places when they are complete. So only the
    interleaving differs between spreads. The bodies are the dialogues' lines in their order, joined to consultations
    of that length, and begin again when they are used up.
    """
    chance = random.Random(_SEED)
    bodies = dialogues.bodies
    shares = [place for place in range(spread) for _ in range(STRETCH // spread)]
    told = [0] * spread
    generation = [0] * spread
    for number in range(events):
        within = number % STRETCH
        if within == 0:
            chance.shuffle(shares)
        place = shares[within]
        index = generation[place] * spread + place
        body = bodies[(index * CONSULTATION_EVENTS + told[place]) % len(bodies)]
        event_id = UUID(int=chance.getrandbits(128), version=4)
        yield Event(f"b{spread}-{index:06d}", event_id, _RECEIVED_NS + number, body)
        told[place] += 1
        if told[place] == CONSULTATION_EVENTS:
            told[place], generation[place] = 0, generation[place] + 1


def posts(dialogues: Dialogues, at_a_time: int, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield consultation and body without end, *at_a_time* consultations in turn.

    A consultation has 50 events; when it is complete a new one takes its place. The first ones have fewer, so that
    afterwards new ones begin evenly. The bodies are the dialogues' lines in their order, again and again.
    """
    bodies = dialogues.bodies
    for number in itertools.count():
        turn, place = divmod(number, at_a_time)
        generation, told = divmod(turn + place * CONSULTATION_EVENTS // at_a_time, CONSULTATION_EVENTS)
        index = generation * at_a_time + place
        yield f"{name}-{index:06d}", bodies[(index * CONSULTATION_EVENTS + told) % len(bodies)]


def with_busiest(found: Iterator[tuple[str, bytes]], names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield what was *found*, but give a tenth of it to each of the consultations *names*, ten at most."""
    for number, (consultation, body) in enumerate(found):
        place = number % 10
        yield names[place] if place < len(names) else consultation, body


def mean_bytes(bodies: Sequence[bytes]) -> float:
    """Return the mean length of *bodies*."""
    return sum(map(len, bodies)) / max(1, len(bodies))
