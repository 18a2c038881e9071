"""docs/settings.md holds every setting, as the code has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.core.command import SETTINGS, format_default
from services.core.settings import Variable, variables
from services.ingest.settings import Settings
from services.log.settings import LogSettings
from services.persister.settings import PersisterSettings

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"
#: every settings class of the project
CLASSES: tuple[type, ...] = (LogSettings, Settings, PersisterSettings)
#: read by `fiq` alone
OF_THE_CLI = ("FI_URL", "FI_TOKEN")
VARIABLES = {variable.name: variable for cls in CLASSES for variable in variables(cls)}


@pytest.mark.parametrize("variable", VARIABLES.values(), ids=VARIABLES.keys())
def test_each_setting_is_documented_with_its_default(variable: Variable) -> None:
    """Name, default and meaning are in one line, word for word."""
    line = f"- `{variable.name}={format_default(variable.default)}`: {variable.doc}"
    assert line in DOCS.read_text().splitlines()


def test_each_service_knows_the_settings_of_all() -> None:
    """They may share one file of variables: only what nothing reads is worth a warning."""
    assert {name.removeprefix("FI_") for name in (*VARIABLES, *OF_THE_CLI)} == SETTINGS


def test_no_setting_is_documented_that_does_not_exist() -> None:
    """What was renamed or removed must go from the manual too."""
    names = [line.split("`")[1].partition("=")[0] for line in DOCS.read_text().splitlines() if line.startswith("- `")]
    assert sorted(names) == sorted(VARIABLES)


def test_a_setting_that_two_classes_share_means_the_same_in_both() -> None:
    """FI_LOG_LEVEL is read by both services."""
    for cls in CLASSES:
        for variable in variables(cls):
            assert variable == VARIABLES[variable.name]
