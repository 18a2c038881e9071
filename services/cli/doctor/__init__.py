"""``fiq doctor``: its checks are in :mod:`cluster` and :mod:`host`, :mod:`command` runs them.

What can be seen in a snapshot of the log is judged in :mod:`services.log.findings`.
"""

from services.log.findings import Finding, Level, error, ok, unknown, warning, worst

__all__ = ["Finding", "Level", "error", "ok", "unknown", "warning", "worst"]
