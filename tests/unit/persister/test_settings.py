"""Settings of the persister."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiq.errors import ConfigurationError
from services.core.settings import load
from services.persister.command import main
from services.persister.settings import PersisterSettings


def test_nothing_needs_to_be_set() -> None:
    """The defaults are those of one host."""
    assert PersisterSettings() == load(PersisterSettings, {})


def test_variables_are_read() -> None:
    """Sizes and times have units."""
    env = {"FI_DATA_DIR": "/data", "FI_VOLUMES": "3", "FI_BATCH_BYTES": "1MiB", "FI_RETENTION": "2h", "FI_STORE": "b"}
    settings = load(PersisterSettings, env)
    assert (Path("/data"), 3, 2**20, 7200.0) == (
        settings.data_dir,
        settings.volumes,
        settings.batch_bytes,
        settings.retention,
    )
    assert settings.log.store == "b"


def test_every_wrong_value_is_named_at_once() -> None:
    """Nobody wants to find them one restart after another."""
    with pytest.raises(ConfigurationError) as caught:
        load(PersisterSettings, {"FI_VOLUMES": "0", "FI_BATCH_EVENTS": "x", "FI_STORE": "No", "FI_POISON_STREAK": "-1"})
    named = [problem.partition("=")[0] for problem in caught.value.problems]
    assert ["FI_BATCH_EVENTS", "FI_POISON_STREAK", "FI_STORE", "FI_VOLUMES"] == sorted(named)


def test_ports_beyond_the_last_one_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Worker i takes FI_PERSISTER_PORT + i; the supervisor must not find that out from a dead worker."""
    monkeypatch.setenv("FI_PERSISTER_PORT", "65535")
    assert main(["--workers", "2"]) == 2
    assert "fiq-persister: FI_PERSISTER_PORT=65535: no 2 ports" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "65", "x", "-1", "²"])
def test_a_senseless_number_of_workers_is_wrong_usage(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As argparse says it: exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(["--workers", number])
    assert caught.value.code == 2
    assert "--workers" in capsys.readouterr().err
