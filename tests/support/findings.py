"""What the doctor found, as tests look at it."""

from __future__ import annotations

from collections.abc import Iterable

from services.log.findings import Finding, Level, worst


def only(findings: Iterable[Finding], level: Level) -> Finding:
    """Return the one finding of that level, which must be the worst."""
    found = list(findings)
    assert level == worst(found), found
    (one,) = [finding for finding in found if finding.level is level]
    assert one.action, "a finding says what to do"
    return one


def fine(findings: Iterable[Finding]) -> None:
    """Make sure that something was looked at, and nothing is wrong."""
    found = list(findings)
    assert found
    assert worst(found) is Level.OK, found
