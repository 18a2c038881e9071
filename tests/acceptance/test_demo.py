"""`fiq demo`, as README's first command runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from services.corpus import open_corpus, verify_corpus


def test_the_demo_proves_that_every_event_is_there_once(tmp_path: Path) -> None:
    """It ends with exit code 0, a table and a corpus that stays; the nodes' stores do not."""
    fiq = Path(sys.executable).parent / "fiq"
    command = [str(fiq), "demo", "--events", "1500", "--folder", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert 0 == done.returncode, done.stderr
    for line in ("killed with SIGKILL", "events accepted (202)", "latency p50 / p99", "every event once, in order"):
        assert line in done.stdout
    with open_corpus(tmp_path / "demo" / "corpus") as corpus:
        assert 1500 == sum(len(consultation) for consultation in corpus.values())
    assert verify_corpus(tmp_path / "demo" / "corpus").clean
    assert not (tmp_path / "demo" / "cluster").exists()
