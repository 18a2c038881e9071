"""Settings of the persister."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiq.errors import ConfigurationError
from services.core.settings import load
from services.persister.__main__ import main
from services.persister.settings import BASE_BYTES, PersisterSettings, bounds, fit_memory, needed_bytes

DEFAULTS = PersisterSettings()


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
    """Not one restart after another."""
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


# -- the memory of the container --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 2**40, needed_bytes(DEFAULTS)])
def test_with_enough_memory_nothing_changes(limit: int | None) -> None:
    """What was set stays."""
    assert DEFAULTS == fit_memory(DEFAULTS, limit)


def test_a_small_limit_makes_all_bounds_smaller_so_that_they_fit() -> None:
    """By the same factor: none is given up for another."""
    limit = 256 * 2**20
    bounded = fit_memory(DEFAULTS, limit)
    assert limit - 2**20 < needed_bytes(bounded) <= limit
    shares = {bounded.buffer_bytes / DEFAULTS.buffer_bytes, bounded.known_ids / DEFAULTS.known_ids}
    assert max(shares) - min(shares) < 0.001


@pytest.mark.parametrize("limit", [1, BASE_BYTES])
def test_what_progress_needs_is_left(limit: int) -> None:
    """A limit that no process can keep must not stop all progress."""
    bounded = fit_memory(DEFAULTS, limit)
    assert (2**21, 2**20, 64, 100_000) == (
        bounded.buffer_bytes,
        bounded.batch_bytes,
        bounded.open_consultations,
        bounded.known_ids,
    )


def test_a_bound_that_is_smaller_already_is_never_raised() -> None:
    """The least values are for what is made smaller here."""
    small = load(PersisterSettings, {"FI_KNOWN_IDS": "1000", "FI_BATCH_BYTES": "64KiB"})
    bounded = fit_memory(small, BASE_BYTES)
    assert (1000, 2**16) == (bounded.known_ids, bounded.batch_bytes)


def test_workers_get_the_bounds_of_their_parent() -> None:
    """It divides the memory; each of them sees the container's whole limit only."""
    bounded = fit_memory(DEFAULTS, 200 * 2**20)
    assert bounded == load(PersisterSettings, bounds(bounded))
