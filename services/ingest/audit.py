"""A line for each access that is refused, as many of them as anybody can read."""

from __future__ import annotations

import ipaddress

from aiohttp import hdrs, web

from services.contract.logs import get_logger
from services.ingest.metrics import Metrics
from services.ingest.rates import Bucket

#: lines a second in the long run, and at once; what is beyond them is counted and told with the next line
_RATE, _BURST = 5.0, 50


class Audit:
    """Writes ``ACCESS_REFUSED``: who, from where, what, why; never a token, of the path its template only."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lines = Bucket(_RATE, _BURST)
        self._left_out = 0
        self._log = get_logger("ingest.access").bind()

    def refused(self, request: web.Request, reason: str, name: str | None) -> None:
        """Note that *request* was refused.

        Args:
            request: what was asked for.
            reason: one of :data:`services.ingest.metrics.ACCESS_REASONS`.
            name: of the token, when it is one of ours.
        """
        self._metrics.access_refused[reason].inc()
        if self._lines.take():
            self._left_out += 1
            return
        values: dict[str, object] = {"token": name, "remote": request.remote, "forwarded": _forwarded(request)}
        resource = request.match_info.route.resource
        values["method"] = request.method if request.method in hdrs.METH_ALL else "another one"
        values["path"] = None if resource is None else resource.canonical
        if self._left_out:
            values["left_out"], self._left_out = self._left_out, 0
        present = {key: value for key, value in values.items() if value is not None}
        self._log.warning("ACCESS_REFUSED", reason=reason, **present)


def _forwarded(request: web.Request) -> str | None:
    """Return the address that the nearest proxy names, which is no more than its word, when it is an address."""
    values = request.headers.getall("X-Forwarded-For", ())
    try:
        return str(ipaddress.ip_address(values[-1].rpartition(",")[2].strip())) if values else None
    except ValueError:
        return None
