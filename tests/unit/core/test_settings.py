"""Settings: read from a mapping, all problems at once, secrets hidden."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.errors import ConfigurationError
from services.core.settings import boolean, integer, load, nested, port, seconds, setting, size, text, variables


@dataclass(frozen=True, slots=True)
class Inner:
    name: str = setting("T_NAME", "anonymous", parse=text, doc="A name.")


@dataclass(frozen=True, slots=True)
class Outer:
    count: int = setting("T_COUNT", 3, parse=integer(1, 9), doc="How many.")
    token: str = setting("T_TOKEN", "", parse=text, doc="Secret.", secret=True)
    pin: int = setting("T_PIN", 1, parse=integer(1, 9), doc="Secret.", secret=True)
    inner: Inner = nested(Inner)


def test_an_empty_environment_gives_the_defaults() -> None:
    """Absent, empty and blank mean the same."""
    assert Outer() == load(Outer, {})
    assert Outer() == load(Outer, {"T_COUNT": "", "T_NAME": "  "})


def test_values_come_from_the_mapping_and_reach_nested_classes() -> None:
    """White space around a value is dropped."""
    settings = load(Outer, {"T_COUNT": " 5 ", "T_NAME": "x", "OTHER": "y"})
    assert (settings.count, settings.inner.name) == (5, "x")


def test_all_problems_are_reported_at_once_with_name_value_and_expectation() -> None:
    """The operator corrects all of them before the next start."""
    with pytest.raises(ConfigurationError) as caught:
        load(Outer, {"T_COUNT": "ten", "T_PIN": "123"})
    assert caught.value.problems == (
        "T_COUNT='ten': expected a whole number from 1 to 9",
        "T_PIN=(hidden): expected a whole number from 1 to 9",
    )


def test_repr_hides_secrets() -> None:
    """Settings may end up in a log line."""
    assert "hush" not in repr(load(Outer, {"T_TOKEN": "hush"}))


def test_variables_walks_nested_classes_in_order() -> None:
    """That is what manuals and --help are made of."""
    assert [variable.name for variable in variables(Outer)] == ["T_COUNT", "T_TOKEN", "T_PIN", "T_NAME"]


def test_a_field_that_is_no_setting_needs_a_default() -> None:
    """A mistake of ours, found by the first test that loads the class."""

    @dataclass(frozen=True)
    class Wrong:
        forgotten: int

    with pytest.raises(TypeError, match=r"Wrong\.forgotten"):
        load(Wrong, {})


@pytest.mark.parametrize(
    ("parse", "value", "expected"),
    [
        (boolean, "1", True),
        (boolean, "Yes", True),
        (boolean, "off", False),
        (port, "0", 0),
        (port, "65535", 65535),
        (size(0, 2**50), "1000", 1000),
        (size(0, 2**50), "512KiB", 512 * 1024),
        (size(0, 2**50), "4 GiB", 4 * 2**30),
        (size(0, 2**50), "1.5mb", 1_500_000),
        (seconds(0, 1e9), "0.5", 0.5),
        (seconds(0, 1e9), "250ms", 0.25),
        (seconds(0, 1e9), "24h", 86400.0),
        (seconds(0, 1e9), "2 m", 120.0),
    ],
)
def test_values_are_read_as_written(parse: Callable[[str], Any], value: str, expected: object) -> None:
    """Units are optional, in either case, with or without a space."""
    assert expected == parse(value)


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        (boolean, "maybe"),
        (port, "65536"),
        (port, "-1"),
        (port, "7001.0"),
        (integer(1, 2), "0"),
        (size(1, 100), "101"),
        (size(1, 100), "1e400"),
        (size(1, 100), "nan"),
        (size(1, 100), "KiB"),
        (seconds(1, 2), "0.5"),
        (seconds(1, 2), "1 fortnight"),
        (seconds(1, 2), "inf"),
    ],
)
def test_what_is_no_value_is_refused_with_what_is_expected(parse: Callable[[str], Any], value: str) -> None:
    """The parser's message completes the sentence "expected …"."""
    with pytest.raises(ValueError, match=r"from|or"):
        parse(value)


@given(st.text(max_size=20))
def test_no_text_makes_a_parser_fail_in_another_way(value: str) -> None:
    """A wrong setting is a clear message, never a traceback."""
    for parse in (boolean, port, size(0, 10), seconds(0, 10)):
        with contextlib.suppress(ValueError):
            parse(value)
