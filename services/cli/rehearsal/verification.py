"""The proof: every accepted event is in the corpus once, byte for byte, in stream order, and nothing else is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from services.cli.rehearsal.load import Accepted

#: problems that are named one by one; the rest is counted
_NAMED = 10


@dataclass(slots=True)
class Verdict:
    """What the comparison found.

    Attributes:
        persisted: events in the corpus.
        consultations: groups in the corpus.
        problems: what is wrong; nothing when all is well. No payloads.
    """

    persisted: int = 0
    consultations: int = 0
    problems: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Return the first problems, and how many there are more."""
        more = len(self.problems) - _NAMED
        return self.problems[:_NAMED] + ([f"and {more} more"] if more > 0 else [])


#: an event of the corpus: its id, its sequence, its body
Found = tuple[str, int, bytes]


def verify(path: Path, accepted: Iterable[Accepted]) -> Verdict:
    """Compare the corpus at *path* with what clients were told.

    Raises:
        CorpusError: the corpus cannot be read.
    """
    from services.corpus import open_corpus  # h5py takes long to import, and most commands need none of it

    with open_corpus(path) as corpus:
        found = (
            (name, [(str(event.event_id), event.sequence, event.raw) for event in corpus[name]])
            for name in sorted(corpus.consultations())
        )
        return compare(found, accepted)


def compare(found: Iterable[tuple[str, list[Found]]], accepted: Iterable[Accepted]) -> Verdict:
    """Compare the consultations of a corpus, each with its events in their order, with what clients were told."""
    wanted: dict[str, dict[str, Accepted]] = defaultdict(dict)
    for one in accepted:
        wanted[one.post.consultation][one.post.key] = one
    verdict = Verdict()
    for name, events in found:
        verdict.consultations += 1
        verdict.persisted += len(events)
        verdict.problems += _compare(name, events, wanted.pop(name, {}))
    verdict.problems += [f"{name}: not in the corpus" for name in sorted(wanted)]
    return verdict


def _compare(name: str, events: list[Found], wanted: dict[str, Accepted]) -> list[str]:
    problems = []
    if len({key for key, _, _ in events}) != len(events):
        problems.append(f"{name}: an event is there twice")
    if [sequence for _, sequence, _ in events] != sorted({sequence for _, sequence, _ in events}):
        problems.append(f"{name}: events are not in stream order")
    for key, sequence, body in events:
        one = wanted.get(key)
        if one is None:
            problems.append(f"{name}: event {key} was never accepted")
        elif body != one.post.body:
            problems.append(f"{name}: event {key} has another body")
        elif sequence > one.sequence:  # an earlier attempt, whose answer was lost, may have brought it
            problems.append(f"{name}: event {key} has sequence {sequence}, but its client was told {one.sequence}")
    missing = wanted.keys() - {key for key, _, _ in events}
    return problems + [f"{name}: event {key} is missing" for key in sorted(missing)]
