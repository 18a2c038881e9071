"""``fiq doctor``: :mod:`command` runs the checks of :mod:`cluster`, :mod:`host` and :mod:`services.log.findings`."""
