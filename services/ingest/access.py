"""Who may do what: the one place through which every request goes.

Each route says at its registration (:meth:`Gate.add`) which scope it takes, or that it is open to everybody. One that
says nothing is refused to everybody. Where the path names a consultation, the token must be for it; a route without
one in its path is for tokens of all consultations, unless its handler promises (``each=True``) to call
:meth:`Gate.require` with every consultation that it meets, or to ask ``request[GRANT].may(scope, consultation)``.
"""

from __future__ import annotations

import ipaddress
import math
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from hmac import compare_digest

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from fiq.errors import ConfigurationError
from services.core import tokens
from services.core.logs import get_logger
from services.core.tokens import Scope, Token, digest_of
from services.ingest import metrics as reasons
from services.ingest import problems
from services.ingest.admission import Lines, Rates
from services.ingest.answers import Answers, trace_id_of
from services.ingest.changes import read
from services.ingest.metrics import Metrics
from services.ingest.problems import Problem, RequestRefusedError

VARIABLE = "FI_TOKEN_FILE"
#: the digest of nobody
ANONYMOUS = ""
#: what a token that is not known is compared with
_NOBODY = "0" * 64
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
#: as aiohttp has it: an answer ends the request, None goes on to the handler
ExpectHandler = Callable[[web.Request], Awaitable[web.StreamResponse | None]]

#: in the place of a scope: everybody may, without a token
OPEN = None
_CHALLENGE = 'Bearer realm="fiq"'
_INVALID = f'{_CHALLENGE}, error="invalid_token"'
#: the kind of the log lines that no token of ours belongs to
_STRANGERS = ""


class Tokens:
    """Tokens by their digests.

    The file's digest of a token is found by a hash of it with a key that this process alone has, and only then
    compared, in constant time: how long either takes tells nothing about any token or its digest, and does not grow
    with the number of tokens.

    Attributes:
        path: of the file; empty when no tokens are asked for, and everybody may everything.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._tokens: dict[str, Token] = {}
        self._key = secrets.token_bytes(32)
        #: digests by their hashes
        self._blinded: dict[bytes, str] = {}

    @property
    def asked_for(self) -> bool:
        """Whether a request needs a token."""
        return bool(self.path)

    @property
    def names(self) -> set[str]:
        """Names of all tokens, also of those that have ended."""
        return {token.name for token in self._tokens.values()}

    def load(self) -> None:
        """Read the file. Raises ConfigurationError: it cannot be read, or is none; the tokens stay as they were."""
        try:
            self._tokens = tokens.parse(read(self.path, VARIABLE))
        except ConfigurationError as error:
            marked = [one if one.startswith(VARIABLE) else f"{VARIABLE}={self.path}: {one}" for one in error.problems]
            raise ConfigurationError(marked) from None
        self._blinded = {self._blind(digest): digest for digest in self._tokens}

    def known(self, secret: str) -> str | None:
        """Return the digest of *secret* when it is a token that has not ended."""
        digest = digest_of(secret)
        ours = self._blinded.get(self._blind(digest), _NOBODY)
        return ours if compare_digest(ours, digest) and self.by_digest(ours) is not None else None

    def by_digest(self, digest: str) -> Token | None:
        """Return the token with *digest*, unless it has ended or there is none."""
        token = self._tokens.get(digest)
        if token is None or (token.expires is not None and token.expires <= datetime.now(UTC)):
            return None
        return token

    def _blind(self, digest: str) -> bytes:
        return blake2b(digest.encode(), key=self._key, digest_size=16).digest()


class Grant:
    """What the sender of a request may do.

    Attributes:
        name: of its token; empty when no tokens are asked for.
    """

    __slots__ = ("_digest", "_rates", "_tokens", "name")

    def __init__(self, tokens: Tokens, digest: str, rates: Rates) -> None:
        token = tokens.by_digest(digest)
        self.name = "" if token is None else token.name
        self._tokens = tokens
        self._digest = digest
        self._rates = rates

    def may(self, scope: Scope, consultation: str | None = None) -> bool:
        """Say whether it may now: a token that has been revoked or has ended meanwhile may nothing any more."""
        if not self._tokens.asked_for:
            return True
        token = self._tokens.by_digest(self._digest)
        return token is not None and token.may(scope, consultation)

    @property
    def prefix(self) -> str:
        """What the ids of its consultations begin with; empty for all of them.

        Raises RequestRefusedError: it has ended since the request came.
        """
        if not self._tokens.asked_for:
            return ""
        token = self._tokens.by_digest(self._digest)
        if token is None:
            raise RequestRefusedError(problems.UNAUTHORIZED, headers={str(hdrs.WWW_AUTHENTICATE): _INVALID})
        return token.prefix

    def take(self) -> None:
        """Count a request against the rate of the token.

        Raises RequestRefusedError: it is over its rate; nothing was counted.
        """
        self._check(self._rates.take(self.name))

    def take_more(self, count: int) -> None:
        """Count *count* events more of a request that has been counted as one.

        Raises RequestRefusedError: it is over its rate; nothing was counted.
        """
        self._check(self._rates.take_more(self.name, count))

    @staticmethod
    def _check(wait: float) -> None:
        if wait:
            headers = {"Retry-After": str(math.ceil(wait))}
            raise RequestRefusedError(problems.RATE_LIMITED, headers=headers)


GRANT = web.RequestKey("grant", Grant)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route asks for.

    Attributes:
        scope: a token with it, or :data:`OPEN`.
        each: the handler asks about each consultation by itself.
    """

    scope: Scope | None
    each: bool


class Gate:
    """Lets requests through, or refuses them.

    Args:
        answers: makes the refusals.
        metrics: counts them.
        tokens: who is known.
        rates: how much each may ask for.
        before_write: called before each request that writes; raises RequestRefusedError when the log takes no more.
    """

    def __init__(
        self, answers: Answers, metrics: Metrics, tokens: Tokens, rates: Rates, before_write: Callable[[], None]
    ) -> None:
        self._answers = answers
        self._audit = _Audit(metrics)
        self._tokens = tokens
        self._rates = rates
        self._before_write = before_write
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
        """Add a route to *app*; GET gets HEAD besides.

        Args:
            app: whose middleware :meth:`middleware` is.
            method: of HTTP.
            path: with ``{consultation}`` where it names one.
            handler: called for whom the gate lets through, with ``request[GRANT]`` set unless the route is open.
            scope: what a token needs, or OPEN.
            each: *handler* asks the grant about each consultation by itself.
            expect: answers ``Expect`` in the place of aiohttp's own; it is not called for whom the gate refuses.
        """
        resource = app.router.add_resource(path)
        for one in (hdrs.METH_GET, hdrs.METH_HEAD) if method == hdrs.METH_GET else (method,):
            guarded = None if expect is None else self._guarded(expect)
            route = resource.add_route(one, handler, expect_handler=guarded)
            self._rules[route] = Rule(scope, each)

    def rule(self, route: web.AbstractRoute) -> Rule | None:
        """Return what *route* asks for; None when it has never said so."""
        return self._rules.get(route)

    def require(self, request: web.Request, scope: Scope, consultations: Iterable[str]) -> None:
        """Let *request* go on when its token is for *scope* of all *consultations*, which its path did not name.

        Raises RequestRefusedError: it is not for one of them, whichever.
        """
        grant = request[GRANT]
        if not all(grant.may(scope, consultation) for consultation in consultations):
            self._audit.refused(request, reasons.PREFIX, grant.name)
            headers = {str(hdrs.WWW_AUTHENTICATE): _insufficient(scope)}
            raise RequestRefusedError(problems.FORBIDDEN, headers=headers)

    def middleware(self) -> Middleware:
        """Return what every request goes through, that to an unknown path too."""

        @web.middleware
        async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
            refusal = self._refusal(request)
            return await handler(request) if refusal is None else refusal

        return gate

    def _guarded(self, expect: ExpectHandler) -> ExpectHandler:
        async def guarded(request: web.Request) -> web.StreamResponse | None:
            refusal = self._refusal(request)
            return await expect(request) if refusal is None else refusal

        return guarded

    def _refusal(self, request: web.Request) -> web.StreamResponse | None:
        if GRANT in request:  # was let through before its body was asked for
            return None
        match = request.match_info
        rule = self._rules.get(match.route)
        if rule is not None and rule.scope is OPEN:
            return None
        grant, reason = self._identify(request)
        if grant is None:
            challenge = _CHALLENGE if reason == reasons.MISSING else _INVALID
            return self._refuse(request, problems.UNAUTHORIZED, reason, challenge, None)
        if rule is None:
            if match.http_exception is None:
                return self._refuse(request, problems.FORBIDDEN, reasons.UNSTATED, None, grant)
        elif rule.scope is not None:
            reason = _lacks(grant, rule, rule.scope, match.get("consultation"))
            if reason:
                return self._refuse(request, problems.FORBIDDEN, reason, _insufficient(rule.scope), grant)
        return self._bounded(request, rule, grant)

    def _identify(self, request: web.Request) -> tuple[Grant | None, str]:
        """Return who sent *request*, or nobody and why."""
        if not self._tokens.asked_for:
            return Grant(self._tokens, ANONYMOUS, self._rates), ""
        values = request.headers.getall(hdrs.AUTHORIZATION, ())
        if not values:
            return None, reasons.MISSING
        scheme, _, secret = values[0].partition(" ")
        if len(values) > 1 or scheme.lower() != "bearer":
            return None, reasons.UNKNOWN
        digest = self._tokens.known(secret.strip())
        if digest is None:
            return None, reasons.UNKNOWN
        return Grant(self._tokens, digest, self._rates), ""

    def _bounded(self, request: web.Request, rule: Rule | None, grant: Grant) -> web.StreamResponse | None:
        try:
            if rule is not None and rule.scope is Scope.WRITE:
                self._before_write()  # first: what the log takes not must not count against the token
            grant.take()
        except RequestRefusedError as refusal:
            return self._answers.refused(
                refusal.problem, refusal.detail, headers=refusal.headers, trace_id=trace_id_of(request)
            )
        request[GRANT] = grant
        return None

    def _refuse(
        self, request: web.Request, problem: Problem, reason: str, challenge: str | None, grant: Grant | None
    ) -> web.StreamResponse:
        self._audit.refused(request, reason, None if grant is None else grant.name)
        headers = {} if challenge is None else {str(hdrs.WWW_AUTHENTICATE): challenge}
        return self._answers.refused(problem, headers=headers, trace_id=trace_id_of(request))


def _insufficient(scope: Scope) -> str:
    return f'{_CHALLENGE}, error="insufficient_scope", scope="{scope}"'


def _lacks(grant: Grant, rule: Rule, scope: Scope, consultation: str | None) -> str:
    """Return what *grant* lacks for a route with *rule*, as a reason; nothing when it lacks nothing."""
    if not grant.may(scope):
        return reasons.SCOPE
    # "" begins with no prefix but the empty one: a route of no consultation is for tokens of all of them
    if not rule.each and not grant.may(scope, consultation or ""):
        return reasons.PREFIX
    return ""


class _Audit:
    """Writes ``ACCESS_REFUSED``: who, from where, what, why; never a token, of the path its template only.

    As many as anybody can read: those of each token, and of all strangers together, so that no stranger hides what is
    done with a token.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lines = Lines()
        self._log = get_logger("ingest.access").bind()

    def refused(self, request: web.Request, reason: str, name: str | None) -> None:
        """Note that *request* was refused.

        Args:
            request: what was asked for.
            reason: one of :data:`services.ingest.metrics.ACCESS_REASONS`.
            name: of the token, when it is one of ours.
        """
        self._metrics.access_refused[reason].inc()
        told = self._lines.told(name or _STRANGERS)
        if told is None:
            return
        values: dict[str, object] = {"token": name, "remote": request.remote, "forwarded": _forwarded(request)}
        resource = request.match_info.route.resource
        values["method"] = request.method if request.method in hdrs.METH_ALL else "another one"
        values["path"] = None if resource is None else resource.canonical
        present = {key: value for key, value in (values | told).items() if value is not None}
        self._log.warning("ACCESS_REFUSED", reason=reason, **present)


def _forwarded(request: web.Request) -> str | None:
    """Return the address that the nearest proxy names, which is no more than its word, when it is an address."""
    values = request.headers.getall("X-Forwarded-For", ())
    try:
        return str(ipaddress.ip_address(values[-1].rpartition(",")[2].strip())) if values else None
    except ValueError:
        return None


#: where handlers find the gate
GATE = web.AppKey("gate", Gate)
