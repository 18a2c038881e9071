"""``fiq doctor``: the findings of its checks, which are in :mod:`cluster` and :mod:`host`; :mod:`command` runs them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    #: nothing is lost or refused yet
    WARNING = "warning"
    #: something is lost, refused or stopped, or will be with the next fault
    ERROR = "error"
    #: it could not be checked from here
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of one check.

    Attributes:
        check: what was checked: versions, nodes, clocks, …
        level: how bad it is.
        what: what was found.
        meaning: what follows from it; empty when all is well.
        action: what to do; empty when all is well.
    """

    check: str
    level: Level
    what: str
    meaning: str = ""
    action: str = ""


def ok(check: str, what: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(check, Level.OK, what)


def warning(check: str, what: str, meaning: str, action: str) -> Finding:
    """Return a finding to act on some day."""
    return Finding(check, Level.WARNING, what, meaning, action)


def error(check: str, what: str, meaning: str, action: str) -> Finding:
    """Return a finding to act on now."""
    return Finding(check, Level.ERROR, what, meaning, action)


def unknown(check: str, what: str, action: str) -> Finding:
    """Return what could not be checked, and how it could be."""
    return Finding(check, Level.UNKNOWN, what, "", action)


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level of all; unknown is better than a warning, and worse than fine."""
    order = (Level.OK, Level.UNKNOWN, Level.WARNING, Level.ERROR)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)
