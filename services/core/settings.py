"""Settings: one frozen dataclass a service, built from a mapping, never read at import.

::

    @dataclass(frozen=True, slots=True)
    class Settings:
        port: int = setting("FI_PORT", 7001, parse=port, doc="TCP port of the HTTP interface; 0 takes a free one.")
        log: LogSettings = nested(LogSettings)

    settings = load(Settings, os.environ)

All problems are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from fiq.errors import ConfigurationError

T = TypeVar("T")
N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class Variable:
    """A setting as ``--help``, tests and documentation need it.

    Attributes:
        name: of the environment variable.
        default: the value when the variable is not set.
        doc: what it means and what follows from changing it.
    """

    name: str
    default: Any
    doc: str


def setting(name: str, default: T, *, parse: Callable[[str], T], doc: str, secret: bool = False) -> T:
    """Declare a dataclass field that is read from the variable *name*.

    Args:
        name: of the environment variable.
        default: the field's value when the variable is absent or empty.
        parse: turns the text into the value; raises ValueError with what is expected.
        doc: one or two sentences with the operational consequence.
        secret: keep the value out of ``repr``.
    """
    metadata = {"variable": Variable(name, default, doc), "parse": parse, "secret": secret}
    return field(default=default, metadata=metadata, repr=not secret)


def nested(cls: type[T]) -> T:
    """Declare a dataclass field that is a settings class itself."""
    return field(default_factory=cls, metadata={"nested": cls})


def load(cls: type[T], env: Mapping[str, str]) -> T:
    """Build *cls* from *env*.

    Raises ConfigurationError: variables are malformed; it names each, its value and what is expected.
    """
    problems: list[str] = []
    result = _load(cls, env, problems)
    if problems:
        raise ConfigurationError(problems)
    return result


def variables(cls: type[Any]) -> Iterator[Variable]:
    """Yield each variable that *cls* reads, nested classes included, in order of declaration."""
    for item in fields(cls):
        if "nested" in item.metadata:
            yield from variables(item.metadata["nested"])
        elif "variable" in item.metadata:
            yield item.metadata["variable"]


def _load(cls: type[T], env: Mapping[str, str], problems: list[str]) -> T:
    values: dict[str, Any] = {}
    for item in fields(cls):  # type: ignore[arg-type]
        if "nested" in item.metadata:
            values[item.name] = _load(item.metadata["nested"], env, problems)
        elif "variable" in item.metadata:
            values[item.name] = _read(item, env, problems)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise TypeError(f"{cls.__name__}.{item.name} is no setting and has no default")
    return cls(**values)


def _read(item: Field[Any], env: Mapping[str, str], problems: list[str]) -> Any:
    variable: Variable = item.metadata["variable"]
    text = env.get(variable.name, "").strip()
    if not text:
        return variable.default
    try:
        return item.metadata["parse"](text)
    except ValueError as error:
        shown = "(hidden)" if item.metadata["secret"] else repr(text)
        problems.append(f"{variable.name}={shown}: expected {error}")
        return variable.default


# -- parsers: each raises ValueError with the expected form -----------------------------------------------------------


def text(value: str) -> str:
    """Take any text."""
    return value


def boolean(value: str) -> bool:
    """Take 1, true, yes, on or 0, false, no, off."""
    lowered = value.lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off"}:
        return False
    raise ValueError("1/true/yes/on or 0/false/no/off")


def _in_range(convert: Callable[[str], N], low: N, high: N, expected: str) -> Callable[[str], N]:
    def parse(value: str) -> N:
        try:
            found = convert(value)
        except (ValueError, KeyError, OverflowError):
            raise ValueError(expected) from None
        if not low <= found <= high:
            raise ValueError(expected)
        return found

    return parse


def integer(low: int, high: int) -> Callable[[str], int]:
    """Make a parser of whole numbers from *low* to *high*."""
    return _in_range(int, low, high, f"a whole number from {low} to {high}")


def number(low: float, high: float) -> Callable[[str], float]:
    """Make a parser of numbers (``0.5``, ``250``) from *low* to *high*."""
    return _in_range(lambda value: _scaled(value, {"": 1.0}), low, high, f"a number from {low:g} to {high:g}")


#: parser of a TCP port; 0 takes a free one
port = integer(0, 65535)

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def size(low: int, high: int) -> Callable[[str], int]:
    """Make a parser of bytes (``512KiB``, ``4GiB``, ``1000``) from *low* to *high*."""
    expected = f"bytes such as 1048576, 512KiB or 4GiB, from {low} to {high}"
    return _in_range(lambda value: int(_scaled(value.lower().removesuffix("b"), _SIZES)), low, high, expected)


def seconds(low: float, high: float) -> Callable[[str], float]:
    """Make a parser of a time span (``0.5``, ``250ms``, ``24h``), in seconds, from *low* to *high*."""
    expected = f"seconds, or a time such as 250ms, 10m or 24h, from {low:g} to {high:g} seconds"
    return _in_range(lambda value: _scaled(value.lower(), _TIMES), low, high, expected)


def _scaled(value: str, units: Mapping[str, float]) -> float:
    """Return a number with one of *units*. Raises ValueError, KeyError: malformed."""
    digits = value.rstrip("abcdefghijklmnopqrstuvwxyz ")
    return float(digits) * units[value[len(digits) :].strip()]
