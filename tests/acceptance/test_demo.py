"""`fiq demo`, as README's first command runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from services.corpus import open_corpus, verify_corpus
from tests.support.polling import eventually_sync


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


def test_an_interrupted_demo_names_what_it_leaves(tmp_path: Path) -> None:
    """Its folder is a temporary one that nobody knows."""
    command = [str(Path(sys.executable).parent / "fiq"), "demo"]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        eventually_sync(lambda: list(tmp_path.glob("fiq-demo-*/cluster")))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    (left,) = tmp_path.glob("fiq-demo-*")
    assert 130 == process.returncode
    assert f"what there is stays in {left}\n" in errors
