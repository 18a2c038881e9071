"""Measures fiq against named references in the same run: ``python -m benchmarks``, or ``make bench``.

Nothing here is asserted. `docs/benchmarks.md` says how it is measured and what came out.
"""
