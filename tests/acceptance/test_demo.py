"""`fiq demo`, as README's first command runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fiq.corpus import open_corpus, verify_corpus
from services.cli import demo
from services.cli.demo import AcceptedPost, Comparison, compare
from services.cli.main import app
from tests.support.polling import eventually_sync


def test_the_demo_proves_that_every_event_is_there_once(tmp_path: Path) -> None:
    """It ends with exit code 0, a table and a corpus that stays; the nodes' stores do not.

    Tokens and a certificate of the shell's environment are for another stack.
    """
    fiq = Path(sys.executable).parent / "fiq"
    command = [str(fiq), "demo", "--events", "1500", "--folder", str(tmp_path / "demo")]
    env = os.environ | dict.fromkeys(("FI_TOKEN_FILE", "FI_TLS_CERT", "FI_TLS_KEY"), str(tmp_path / "missing"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=env)
    assert 0 == done.returncode, done.stderr
    for line in ("killed with SIGKILL", "events accepted (202)", "latency p50 / p99", "every event once, in order"):
        assert line in done.stdout
    with open_corpus(tmp_path / "demo" / "corpus") as corpus:
        assert 1500 == sum(len(consultation) for consultation in corpus.values())
    assert verify_corpus(tmp_path / "demo" / "corpus").clean
    assert not (tmp_path / "demo" / "cluster").exists()


def test_the_demo_fails_when_an_accepted_event_is_not_in_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, and the event's name: one is taken out of what the proof reads."""
    taken: list[str] = []

    def without_one(path: Path, accepted: Iterable[AcceptedPost]) -> Comparison:
        with open_corpus(path) as corpus:
            found = [(name, [(str(one.event_id), one.sequence, one.raw) for one in corpus[name]]) for name in corpus]
        taken.append(found[0][1].pop()[0])
        return compare(found, accepted)

    monkeypatch.setattr(demo, "compare_corpus", without_one)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        done = CliRunner().invoke(app, ["demo", "--events", "200", "--folder", str(tmp_path / "demo")])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert 1 == done.exit_code
    assert f"event {taken[0]} is missing" in done.stderr


def test_an_interrupted_demo_names_what_it_leaves(tmp_path: Path) -> None:
    """The operator does not know its temporary folder otherwise."""
    command = [str(Path(sys.executable).parent / "fiq"), "demo"]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        eventually_sync(lambda: list(tmp_path.glob("fiq-demo-*/cluster")))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    (left,) = tmp_path.glob("fiq-demo-*")
    assert 130 == process.returncode
    assert f"the files stay in {left}\n" in errors
