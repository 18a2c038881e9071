"""Access control: every request goes through it, before its body is read.

A route states at its registration (:meth:`AccessControl.add`) which scope it needs, or that it is open. A route that
states nothing is always refused. Where the path names a consultation, the token must be for it. A route without one is
for tokens of all consultations, unless its handler checks each consultation itself (``each=True``), with
:meth:`AccessControl.require` or ``request[GRANT].may(scope, consultation)``.

For a request that writes, the backlog is checked before the token's rate: requests that the log refuses must not use
up the rate.

While no token is required, a request must name this machine in ``Host``. Otherwise any web page that the user visits
could read the service: it lets its own name point to 127.0.0.1 (DNS rebinding), and the browser takes both for one
origin. For the same reason a page of another origin must not change anything: a browser sends a POST without a body
for it, and names the origin in ``Origin``.
"""

from __future__ import annotations

import ipaddress
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from hmac import compare_digest
from pathlib import Path

import orjson
from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from fiq.errors import ConfigurationError
from services.core import tokens
from services.core.logs import LogThrottle, get_audit_logger, get_logger
from services.core.tokens import Scope, Token, digest_of
from services.ingest import metrics as reasons
from services.ingest import problems
from services.ingest.admission import RateLimiter
from services.ingest.metrics import IngestMetrics
from services.ingest.problems import REFUSALS, SERVER, ProblemType, Refusals, RequestRefusedError

VARIABLE = "FI_TOKEN_FILE"
#: the digest when no tokens are configured
ANONYMOUS = ""
#: an unknown token is compared with it
_NO_DIGEST = "0" * 64
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
#: as in aiohttp: an answer ends the request, None goes on to the handler
ExpectHandler = Callable[[web.Request], Awaitable[web.StreamResponse | None]]

_audit = get_audit_logger()

#: methods that change nothing
_SAFE_METHODS = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})

#: instead of a scope: no token is needed
OPEN = None
#: as networks of :mod:`ipaddress`
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
#: name and port in ``Host``
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]*)?", re.IGNORECASE | re.ASCII)
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
#: refusals of one address that are logged a second in the long run, and at once
_ADDRESS_RATE, _ADDRESS_BURST = 0.5, 10
#: characters of an IPv6 address that are of its network
_NETWORK_CHARACTERS = 19
WHOAMI_PATH = "/token"
_CHALLENGE = 'Bearer realm="fiq"'
_INVALID = f'{_CHALLENGE}, error="invalid_token"'


class TokenStore:
    """The tokens of the token file.

    A digest is found by its keyed hash, whose key only this process has, and then compared in constant time: timing
    reveals nothing about any token, and does not grow with the number of tokens.

    Attributes:
        path: of the file; empty when no tokens are configured and every request is allowed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._tokens: dict[str, Token] = {}
        self._key = secrets.token_bytes(32)
        #: digests by their hashes
        self._blinded: dict[bytes, str] = {}

    @property
    def required(self) -> bool:
        """Whether requests need a token."""
        return bool(self.path)

    @property
    def names(self) -> set[str]:
        """Names of all tokens, expired ones included."""
        return {token.name for token in self._tokens.values()}

    def load(self) -> None:
        """Read the file. Raises ConfigurationError: it cannot be read or is malformed; the tokens stay as they were."""
        try:
            self._tokens = tokens.parse(_read(self.path))
        except ConfigurationError as error:
            marked = [one if one.startswith(VARIABLE) else f"{VARIABLE}={self.path}: {one}" for one in error.problems]
            raise ConfigurationError(marked) from None
        self._blinded = {self._blind(digest): digest for digest in self._tokens}

    def find(self, secret: str) -> str | None:
        """Return the digest of *secret* if it is a valid token."""
        digest = digest_of(secret)
        ours = self._blinded.get(self._blind(digest), _NO_DIGEST)
        return ours if compare_digest(ours, digest) and self.by_digest(ours) is not None else None

    def by_digest(self, digest: str) -> Token | None:
        """Return the token with *digest*; None if it is unknown or expired."""
        token = self._tokens.get(digest)
        if token is None or (token.expires is not None and token.expires <= datetime.now(UTC)):
            return None
        return token

    def _blind(self, digest: str) -> bytes:
        return blake2b(digest.encode(), key=self._key, digest_size=16).digest()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError([f"{VARIABLE}={path}: {error.strerror or error}"]) from None
    except UnicodeDecodeError:
        raise ConfigurationError([f"{VARIABLE}={path}: it is not text in UTF-8"]) from None


class Grant:
    """What the sender of a request may do.

    Attributes:
        name: of its token; empty when no tokens are configured.
    """

    __slots__ = ("_digest", "_rates", "_tokens", "name")

    def __init__(self, tokens: TokenStore, digest: str, rates: RateLimiter) -> None:
        token = tokens.by_digest(digest)
        self.name = "" if token is None else token.name
        self._tokens = tokens
        self._digest = digest
        self._rates = rates

    def may(self, scope: Scope, consultation: str | None = None) -> bool:
        """Return whether it may now; a token that was revoked or has expired meanwhile may nothing."""
        if not self._tokens.required:
            return True
        token = self._tokens.by_digest(self._digest)
        return token is not None and token.may(scope, consultation)

    @property
    def prefix(self) -> str:
        """Prefix of the ids of its consultations; empty for all of them.

        Raises RequestRefusedError: it has expired since the request came.
        """
        if not self._tokens.required:
            return ""
        token = self._tokens.by_digest(self._digest)
        if token is None:
            raise RequestRefusedError(problems.UNAUTHORIZED, headers={str(hdrs.WWW_AUTHENTICATE): _INVALID})
        return token.prefix

    def describe(self) -> dict[str, object]:
        """Return its name, its scopes, the prefix of its consultations and its expiry, as JSON shows them.

        Raises RequestRefusedError: it has expired since the request came.
        """
        prefix = self.prefix
        token = self._tokens.by_digest(self._digest)
        scopes = [str(scope) for scope in Scope if self.may(scope)]
        expires = None if token is None or token.expires is None else token.expires.isoformat().replace("+00:00", "Z")
        return {"name": self.name, "scopes": scopes, "prefix": prefix, "expires": expires}

    def count_request(self) -> None:
        """Count a request against the token's rate. Raises RequestRefusedError: the rate is exceeded."""
        self._check(self._rates.take(self.name))

    def count_events(self, count: int) -> None:
        """Count *count* further events of a request. Raises RequestRefusedError: the rate is exceeded."""
        self._check(self._rates.take_more(self.name, count))

    @staticmethod
    def _check(wait: float) -> None:
        if wait:
            headers = {"Retry-After": str(math.ceil(wait))}
            raise RequestRefusedError(problems.RATE_LIMITED, headers=headers)


GRANT = web.RequestKey("grant", Grant)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route needs: a token with *scope*, or :data:`OPEN`; with *each* its handler checks each consultation."""

    scope: Scope | None
    each: bool


class AccessControl:
    """Allows requests, or refuses them.

    Args:
        refusals: makes the answers.
        metrics: counts refusals.
        tokens: of clients.
        rates: of each token.
        log_checks: called before each request that writes; each raises RequestRefusedError while a limit of the log is
            reached.
        hosts: names in ``Host`` that are accepted, besides those of this machine, while no token is required.
        proxies: networks of proxies whose ``X-Forwarded-For`` is believed.
    """

    def __init__(
        self,
        refusals: Refusals,
        metrics: IngestMetrics,
        tokens: TokenStore,
        rates: RateLimiter,
        log_checks: Sequence[Callable[[], None]],
        *,
        hosts: Iterable[str] = (),
        proxies: Collection[Network] = (),
    ) -> None:
        self._refusals = refusals
        self._proxies = proxies
        self._audit = _AuditLog(metrics, self.forwarded)
        self._hosts = _LOCAL_NAMES.union(hosts)
        self._tokens = tokens
        self._rates = rates
        self._log_checks = log_checks
        self._rules: dict[web.AbstractRoute, Rule] = {}

    def add(
        self,
        app: web.Application,
        method: str,
        path: str,
        handler: Handler,
        scope: Scope | None,
        *,
        each: bool = False,
        expect: ExpectHandler | None = None,
    ) -> None:
        """Add a route to *app*; GET includes HEAD.

        Args:
            app: with the middleware of :meth:`middleware`.
            method: of HTTP.
            path: with ``{consultation}`` where it names one.
            handler: called for allowed requests, with ``request[GRANT]`` unless the route is open.
            scope: that a token needs, or OPEN.
            each: *handler* checks each consultation itself.
            expect: answers ``Expect`` instead of aiohttp, for allowed requests.
        """
        resource = app.router.add_resource(path)
        for one in (hdrs.METH_GET, hdrs.METH_HEAD) if method == hdrs.METH_GET else (method,):
            guarded = None if expect is None else self._guarded(expect)
            route = resource.add_route(one, handler, expect_handler=guarded)
            self._rules[route] = Rule(scope, each)

    def rule(self, route: web.AbstractRoute) -> Rule | None:
        """Return what *route* needs; None if it was not added here."""
        return self._rules.get(route)

    def require(self, request: web.Request, scope: Scope, consultations: Iterable[str]) -> None:
        """Check that the token of *request* has *scope* for all *consultations*.

        Raises RequestRefusedError: it has not, for at least one of them.
        """
        grant = request[GRANT]
        if not all(grant.may(scope, consultation) for consultation in consultations):
            raise self._forbidden(request, reasons.PREFIX, scope, grant)

    def forwarded(self, request: web.BaseRequest) -> Address | None:
        """Return the client's address as the nearest proxy reports it; None if no trusted proxy does."""
        values: Sequence[str] = request.headers.getall("X-Forwarded-For", ())
        peer = _address(request.remote) if values and self._proxies else None
        if peer is None or not any(peer in network for network in self._proxies):
            return None
        return _address(values[-1].rpartition(",")[2].strip())

    @property
    def required(self) -> bool:
        """Whether requests need a token."""
        return self._tokens.required

    def middleware(self) -> Middleware:
        """Return the middleware that every request goes through, also to an unknown path."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            try:
                self._check(request)
            except RequestRefusedError as refusal:
                return self._refusals.answer_error(refusal, request)
            return await handler(request)

        return check

    def _guarded(self, expect: ExpectHandler) -> ExpectHandler:
        async def guarded(request: web.Request) -> web.StreamResponse | None:
            self._check(request)
            return await expect(request)

        return guarded

    def _check(self, request: web.Request) -> None:
        if GRANT in request:  # allowed by the handler of Expect
            return
        if not self._tokens.required:
            self._check_host(request.headers.get(hdrs.HOST))
            _check_origin(request)
        match = request.match_info
        rule = self._rules.get(match.route)
        if rule is not None and rule.scope is OPEN:
            return
        grant = self.identify(request)
        if rule is None:
            if match.http_exception is None:
                raise self._refused(request, problems.FORBIDDEN, reasons.UNSTATED, name=grant.name)
        elif rule.scope is not None:
            reason = _lacks(grant, rule, rule.scope, match.get("consultation"))
            if reason:
                raise self._forbidden(request, reason, rule.scope, grant)
            if rule.scope is Scope.WRITE:
                for check in self._log_checks:
                    check()
        grant.count_request()
        request[GRANT] = grant

    def _check_host(self, value: str | None) -> None:
        """Raise RequestRefusedError unless ``Host`` names this machine; browsers always send it."""
        if value is None:
            return
        found = _HOST.fullmatch(value)
        name = "" if found is None else found[1].lower()
        if name not in self._hosts and not getattr(_address(name.strip("[]")), "is_loopback", False):
            raise RequestRefusedError(problems.UNKNOWN_HOST)

    def identify(self, request: web.Request) -> Grant:
        """Return what the sender of *request* may do. Raises RequestRefusedError: it has no valid token."""
        if not self._tokens.required:
            return Grant(self._tokens, ANONYMOUS, self._rates)
        values = request.headers.getall(hdrs.AUTHORIZATION, ())
        if not values:
            raise self._refused(request, problems.UNAUTHORIZED, reasons.MISSING, _CHALLENGE)
        scheme, _, secret = values[0].partition(" ")
        is_bearer = len(values) == 1 and scheme.lower() == "bearer"
        digest = self._tokens.find(secret.strip()) if is_bearer else None
        if digest is None:
            raise self._refused(request, problems.UNAUTHORIZED, reasons.UNKNOWN, _INVALID)
        return Grant(self._tokens, digest, self._rates)

    def _forbidden(self, request: web.Request, reason: str, scope: Scope, grant: Grant) -> RequestRefusedError:
        """Log and count that the token lacks something; return the error to raise, which says what."""
        if reason == reasons.SCOPE:
            detail = f"The token lacks the scope {scope}."
        elif "consultation" in request.match_info or self._rules[request.match_info.route].each:
            detail = f"The token is for consultations with the prefix {grant.prefix} only."
        else:
            detail = (
                f"The token is for consultations with the prefix {grant.prefix}; this needs a token for all of them."
            )
        return self._refused(request, problems.FORBIDDEN, reason, _insufficient(scope), grant.name, detail)

    def _refused(
        self,
        request: web.Request,
        problem: ProblemType,
        reason: str,
        challenge: str | None = None,
        name: str | None = None,
        detail: str | None = None,
    ) -> RequestRefusedError:
        """Log and count a refusal; return the error to raise."""
        self._audit.refused(request, reason, name)
        headers = {} if challenge is None else {str(hdrs.WWW_AUTHENTICATE): challenge}
        return RequestRefusedError(problem, detail, headers=headers)


def _insufficient(scope: Scope) -> str:
    return f'{_CHALLENGE}, error="insufficient_scope", scope="{scope}"'


def _lacks(grant: Grant, rule: Rule, scope: Scope, consultation: str | None) -> str:
    """Return why *grant* does not allow a route with *rule*; empty if it does."""
    if not grant.may(scope):
        return reasons.SCOPE
    # "" has the empty prefix only: a route without a consultation is for tokens of all consultations
    if not rule.each and not grant.may(scope, consultation or ""):
        return reasons.PREFIX
    return ""


class _AuditLog:
    """Logs ``ACCESS_REFUSED``: who, from where, what and why; never a token, and only the path's template.

    Lines are throttled for each known token, and for all unknown clients together, which so cannot hide what is done
    with a known token. Before that, each address of unknown clients has a smaller budget of its own.
    """

    def __init__(self, metrics: IngestMetrics, forwarded: Callable[[web.BaseRequest], Address | None]) -> None:
        self._metrics = metrics
        self._forwarded = forwarded
        self._throttle = LogThrottle()
        self._addresses = LogThrottle(_ADDRESS_RATE, _ADDRESS_BURST)
        self._log = get_logger("ingest.access").bind()

    def refused(self, request: web.Request, reason: str, name: str | None) -> None:
        """Log and count a refusal.

        Args:
            request: that was refused.
            reason: one of :data:`services.ingest.metrics.ACCESS_REASONS`.
            name: of the token, if it is known.
        """
        self._metrics.access_refused[reason].inc()
        forwarded = self._forwarded(request)
        sender = forwarded or _address(request.remote)
        left_out = self._addresses.allow(_network(sender)) if name is None else {}
        allowed = None if left_out is None else self._throttle.allow(name or "")
        if left_out is None or allowed is None:
            return
        if left_out:
            allowed = {"left_out": left_out["left_out"] + allowed.get("left_out", 0)}
        values: dict[str, object] = {"token": name, "remote": request.remote}
        values["forwarded"] = None if forwarded is None else str(forwarded)
        resource = request.match_info.route.resource
        values["method"] = request.method if request.method in hdrs.METH_ALL else "another one"
        values["path"] = None if resource is None else resource.canonical
        present = {key: value for key, value in (values | allowed).items() if value is not None}
        self._log.warning("ACCESS_REFUSED", reason=reason, **present)


@lru_cache(maxsize=128)
def _address(text: str | None) -> Address | None:
    """Return the address in *text*, an IPv4 one also where IPv6 embeds it; None if it is not an address."""
    try:
        found = ipaddress.ip_address(text or "")
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _network(address: Address | None) -> str:
    """Return what the clients of one sender have in common: an IPv4 address, or the network of an IPv6 one."""
    return "" if address is None else address.exploded[:_NETWORK_CHARACTERS]


def _check_origin(request: web.Request) -> None:
    """Raise RequestRefusedError for a request that changes something and comes from a page of another origin."""
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is None or request.method in _SAFE_METHODS:
        return
    if origin.rpartition("://")[2].lower() != request.headers.get(hdrs.HOST, "").lower():
        raise RequestRefusedError(problems.CROSS_ORIGIN)


# -- the audit log -----------------------------------------------------------------------------------------------------


def audit(event: str, request: web.Request, **values: object) -> None:
    """Write a line of the audit log: *event*, who sent *request*, and *values*, which must not hold anything of a body.

    The token is absent where none is configured.
    """
    name = request[GRANT].name
    who: dict[str, object] = {"token": name} if name else {}
    forwarded = request.app[ACCESS].forwarded(request)
    if forwarded is not None:
        who["forwarded"] = str(forwarded)
    _audit.info(event, **who, remote=request.remote, **values)


def bodies_shown(request: web.Request, events: int, **values: object) -> None:
    """Write the audit line of a read whose answer has the bodies of *events* events; none for an answer without any."""
    if events and request.method != hdrs.METH_HEAD:
        audit("BODIES_SHOWN", request, events=events, **values)


ACCESS = web.AppKey("access", AccessControl)


async def describe_token(request: web.Request) -> web.StreamResponse:
    """Answer with what the request's token allows; without one, with whether one is needed."""
    access, refusals = request.app[ACCESS], request.app[REFUSALS]
    found: dict[str, object] = {"required": access.required, "name": "", "scopes": [], "prefix": "", "expires": None}
    if not access.required or hdrs.AUTHORIZATION in request.headers:
        try:
            grant = access.identify(request)
            grant.count_request()
            found |= grant.describe()
        except RequestRefusedError as refusal:
            return refusals.answer_error(refusal, request)
    headers = {"Content-Type": "application/json", "Server": SERVER, "Cache-Control": "no-store"}
    return web.Response(body=orjson.dumps(found), headers=headers)
