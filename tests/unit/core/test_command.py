"""The command line of a service."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from fiq.errors import ConfigurationError, PermanentError
from services.core.command import describe, format_default, load_or_exit, parser, report_error, warn_of_unknown
from services.core.logs import get_logger
from services.core.settings import variables
from services.log.settings import LogSettings


def test_help_names_every_setting_with_its_default() -> None:
    """The binary contains its manual."""
    text = parser("p", "d", LogSettings).format_help()
    for variable in variables(LogSettings):
        assert f"{variable.name} (default: {format_default(variable.default)})" in text
    assert describe(LogSettings) in text


def test_wrong_settings_end_the_process_with_2_and_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    """All problems at once, no traceback."""
    with pytest.raises(SystemExit) as caught:
        load_or_exit("p", LogSettings, {"FI_PARTITIONS": "0", "FI_REPLICAS": "2"})
    lines = capsys.readouterr().err.splitlines()
    assert (caught.value.code, len(lines)) == (2, 2)
    assert lines[0].startswith("p: FI_PARTITIONS='0': expected")


def test_unknown_variables_are_named_once_with_the_nearest_setting() -> None:
    """By name, never with their values; those of another service, and of other programs, are not."""
    env = {
        "FI_MAX_BACKLOGS": "secret",
        "FI_QQQQQQ": "secret",
        "FI_PORT": "1",
        "FI_VOLUMES": "2",
        "FIQ_X": "",
        "PATH": "",
    }
    with capture_logs() as entries:
        warn_of_unknown(get_logger("test"), env)
        warn_of_unknown(get_logger("test"), {"FI_PORT": "1"})
    (line,) = entries
    assert ("SETTINGS_UNKNOWN", "warning") == (line["event"], line["log_level"])
    assert ["FI_MAX_BACKLOGS (FI_MAX_BACKLOG?)", "FI_QQQQQQ"] == line["variables"]
    assert "secret" not in str(line)


def test_the_exit_code_tells_wrong_settings_from_failures(capsys: pytest.CaptureFixture[str]) -> None:
    """A supervisor may restart after 1; after 2 it is of no use."""
    assert report_error("p", ConfigurationError(["a"])) == 2
    assert report_error("p", PermanentError("b")) == 1
    assert capsys.readouterr().err == "p: a\np: b\n"


@pytest.mark.parametrize(
    ("default", "expected"), [(True, "1"), (False, "0"), (("a", "b"), "a,b"), (5.0, "5"), (0.25, "0.25"), (7, "7")]
)
def test_defaults_are_shown_as_they_would_be_written(default: object, expected: str) -> None:
    """So that they can be copied into an environment."""
    assert expected == format_default(default)
