"""A line for each access that is refused, as many of them as anybody can read.

The lines of each token are counted by themselves, and so are those of all strangers together: no stranger hides what is
done with a token. Of the strangers' lines one address gets a part only, so that a loud one leaves room for the others.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

from aiohttp import hdrs, web

from services.contract.logs import get_logger
from services.ingest.lines import Lines
from services.ingest.metrics import Metrics
from services.ingest.rates import Bucket

#: the kind of the lines that no token of ours belongs to
_STRANGERS = ""
#: lines of strangers from one address, a second in the long run and at once
_SOURCE_RATE, _SOURCE_BURST = 1.0, 10
#: addresses that are remembered
_MOST_SOURCES = 1000


class Audit:
    """Writes ``ACCESS_REFUSED``: who, from where, what, why; never a token, of the path its template only."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lines = Lines()
        #: of strangers, the one that was heard of last at the end
        self._sources: OrderedDict[tuple[str | None, str | None], Bucket] = OrderedDict()
        self._log = get_logger("ingest.access").bind()

    def refused(self, request: web.Request, reason: str, name: str | None) -> None:
        """Note that *request* was refused.

        Args:
            request: what was asked for.
            reason: one of :data:`services.ingest.metrics.ACCESS_REASONS`.
            name: of the token, when it is one of ours.
        """
        self._metrics.access_refused[reason].inc()
        forwarded = _forwarded(request)
        told = self._lines.told(name) if name else self._of_stranger(request.remote, forwarded)
        if told is None:
            return
        values: dict[str, object] = {"token": name, "remote": request.remote, "forwarded": forwarded}
        resource = request.match_info.route.resource
        values["method"] = request.method if request.method in hdrs.METH_ALL else "another one"
        values["path"] = None if resource is None else resource.canonical
        present = {key: value for key, value in (values | told).items() if value is not None}
        self._log.warning("ACCESS_REFUSED", reason=reason, **present)

    def _of_stranger(self, remote: str | None, forwarded: str | None) -> dict[str, int] | None:
        source = remote, forwarded
        bucket = self._sources.get(source)
        if bucket is None:
            bucket = self._sources[source] = Bucket(_SOURCE_RATE, _SOURCE_BURST)
            if len(self._sources) > _MOST_SOURCES:
                self._sources.popitem(last=False)
        self._sources.move_to_end(source)
        if bucket.take():
            self._lines.leave_out(_STRANGERS)
            return None
        return self._lines.told(_STRANGERS)


def _forwarded(request: web.Request) -> str | None:
    """Return the address that the nearest proxy names, which is no more than its word, when it is an address."""
    values = request.headers.getall("X-Forwarded-For", ())
    try:
        return str(ipaddress.ip_address(values[-1].rpartition(",")[2].strip())) if values else None
    except ValueError:
        return None
