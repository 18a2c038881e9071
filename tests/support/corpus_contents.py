"""What the corpus of a running stack holds."""

from __future__ import annotations

from pathlib import Path

from fiq.corpus import CorpusError, open_corpus
from tests.support.polling import eventually


def bodies(data: Path, consultation: str) -> list[bytes]:
    """Return the bodies of a consultation's events, in order; none while it is not there."""
    try:
        with open_corpus(data) as corpus:
            return [record.raw for record in corpus[consultation]]
    except CorpusError:
        return []


async def holds(data: Path, consultation: str, expected: list[bytes]) -> None:
    """Wait until as many events of *consultation* are persisted as *expected*, and compare them."""
    await eventually(lambda: len(bodies(data, consultation)) >= len(expected))
    assert expected == bodies(data, consultation)
