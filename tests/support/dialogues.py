"""Real doctor-patient dialogues as consultations; generated ones where the data are not there.

MTS-Dialog (Ben Abacha, Yim, Fan and Lin, EACL 2023, CC BY 4.0): a row is a consultation, a line of its dialogue an
event, its summary a last event.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterator
from pathlib import Path

from services.cli.demo import Post, generate, post

#: the folder of the data, next to the checkout
DATA = Path(__file__).parents[2].parent / "shared" / "data"
#: about as many events as the real dialogues have
STAND_IN_EVENTS = 14_000

_SPEAKER = re.compile(r"\s*([A-Za-z][A-Za-z_ ]{0,40}?)\s*:\s*(.*)")


def consultations(folder: Path = DATA, *, seed: int = 0) -> list[list[Post]]:
    """Return the consultations in *folder*, with keys drawn from *seed*."""
    chance = random.Random(seed)
    found = [_consultation(name, row, chance) for name, row in _rows(folder)]
    return found or generate(STAND_IN_EVENTS, seed=seed)


def source(folder: Path = DATA) -> str:
    """Say which data :func:`consultations` returns."""
    return "the real dialogues of MTS-Dialog" if _files(folder) else "generated consultations"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("mts-dialog/*.csv"))


def _rows(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for number, path in enumerate(_files(folder)):
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                yield f"mts-{number}-{row['ID']}", row


def _consultation(name: str, row: dict[str, str], chance: random.Random) -> list[Post]:
    events: list[dict[str, object]] = []
    for speaker, text in _turns(row["dialogue"]):
        events.append({"event_type": "MESSAGE_RECEIVED", "payload": {"speaker": speaker, "text": text}})
    summary = {"section": row["section_header"], "text": row["section_text"]}
    events.append({"event_type": "CONSULTATION_SUMMARIZED", "payload": summary})
    return [post(name, event, chance) for event in events]


def _turns(dialogue: str) -> Iterator[tuple[str, str]]:
    """Yield speaker and text of each line; a line without a speaker is the last one's."""
    speaker = ""
    for line in filter(None, map(str.strip, dialogue.splitlines())):
        match = _SPEAKER.fullmatch(line)
        if match is not None:
            speaker = match[1]
        yield speaker, line if match is None else match[2]
