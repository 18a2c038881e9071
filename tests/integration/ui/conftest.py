"""A real browser on the page of a real stack. Every test fails if the page logs an error or breaks its policy."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from services.cli.embedded.processes import LOOPBACK, free_ports
from services.cli.embedded.stack import Stack
from services.core.tokens import digest_of
from tests.support.polling import eventually_sync

#: tokens by name: scopes, prefix and expiry as in a token file; each one's secret is its name, 43 characters long
TOKENS = {
    "everything": "read,write,ops *",
    "clinic": "read,write clinic-*",
    "reader": "read *",
    "operator": "ops *",
    "expired": "read * 2001-01-01T00:00:00Z",
}


def secret(name: str) -> str:
    """Return the secret of a token of :data:`TOKENS`."""
    return name.ljust(43, "x")


@dataclass
class Service:
    """The HTTP interface that a page is on, as another client sees it."""

    url: str
    log: Path
    token: str = ""

    def post(self, consultation: str, body: str | bytes, key: str = "", *, batch: bool = False) -> dict[str, Any]:
        """Post an event, or a batch of NDJSON, and return the answer."""
        headers = {"Content-Type": "application/x-ndjson" if batch else "application/json"}
        if key:
            headers["Idempotency-Key"] = key
        path = f"/consultations/{consultation}/events{'/batch' if batch else ''}"
        data = body.encode() if isinstance(body, str) else body
        return dict(json.loads(self.ask(path, data, headers)))

    def say(self, consultation: str, text: str, speaker: str = "Doctor", key: str = "") -> dict[str, Any]:
        """Post what somebody said."""
        document = {"event_type": "MESSAGE_RECEIVED", "payload": {"speaker": speaker, "text": text}}
        return self.post(consultation, json.dumps(document), key)

    def ask(self, path: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """Return the answer's body."""
        all_headers = dict(headers or {})
        if self.token:
            all_headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(self.url + path, data=data, headers=all_headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def records(self, consultation: str) -> list[bytes]:
        """Return the records of a consultation, as NDJSON."""
        headers = {"Accept": "application/x-ndjson"}
        return self.ask(f"/consultations/{consultation}/events?limit=1000", headers=headers).splitlines()

    def count(self, consultation: str) -> int:
        """Return the number of events that the list of consultations shows."""
        found = json.loads(self.ask(f"/consultations?prefix={consultation}&limit=1"))["consultations"]
        return int(found[0]["events"]) if found and found[0]["consultation_id"] == consultation else 0

    def persisted(self, consultation: str, events: int) -> None:
        """Wait until a consultation has as many events in HDF5."""

        def done() -> bool:
            found = self.ask(f"/consultations/{consultation}/events?bodies=0&before={2**63 - 1}&limit=1000")
            return b'"queued"' not in found and self.count(consultation) == events

        eventually_sync(done)

    def audited(self, consultation: str) -> int:
        """Return the number of bodies of a consultation that the audit log says were shown."""
        lines = [json.loads(line) for line in self.log.read_bytes().splitlines() if b"BODIES_SHOWN" in line]
        return sum(line.get("events", 0) for line in lines if line.get("consultation_id") == consultation)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """What `fiq up` runs: three nodes, one ingest, two persisters."""
    with Stack(tmp_path_factory.mktemp("ui") / "stack", env={"FI_STREAM_MAX_BYTES": "512MiB"}) as running:
        yield running


@pytest.fixture(scope="module")
def service(stack: Stack) -> Service:
    """The stack's ingest, which needs no token."""
    return Service(stack.ingest.url, stack.logs / "ingest.log")


@pytest.fixture(scope="module")
def guarded(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Another ingest process of the same stack, which needs tokens, :data:`TOKENS`, and shows contents at once."""
    folder = tmp_path_factory.mktemp("guarded")
    lines = []
    for name, rest in TOKENS.items():
        scopes, prefix, *expiry = rest.split()
        lines.append(" ".join([name, digest_of(secret(name)), scopes, prefix, *expiry]))
    (folder / "tokens").write_text("\n".join(lines) + "\n")
    port, management = free_ports(2)
    settings = {
        "FI_HOST": LOOPBACK,
        "FI_PORT": str(port),
        "FI_MANAGEMENT_PORT": str(management),
        "FI_LOG_URL": stack.log_url,
        "FI_TOKEN_FILE": str(folder / "tokens"),
        "FI_UI_MASKED": "0",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "services.ingest"], env=os.environ | settings, stdout=log)
    found = Service(f"http://{LOOPBACK}:{port}", folder / "log", secret("everything"))

    def ready() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError):
            return bool(found.ask("/pipeline"))
        return False

    try:
        eventually_sync(ready)
        yield found
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    expect.set_options(timeout=15_000)  # as of a page's actions
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        with contextlib.closing(playwright.chromium.launch(executable_path=program, args=options)) as running:
            yield running


@dataclass
class Guard:
    """What a page logged.

    Attributes:
        expected: parts of messages that the test provokes, such as the browser's own line about a 401.
        problems: all other errors and warnings, and breaches of the policy.
    """

    expected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def note(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.problems.append(f"{message.type}: {message.text} ({message.location.get('url', '')})")

    def unexpected(self) -> list[str]:
        return [one for one in self.problems if not any(part in one for part in self.expected)]


#: makes a page; arguments as of Playwright's new_context
Opener = Callable[..., Page]


@pytest.fixture
def guard() -> Guard:
    """What the test's pages logged."""
    return Guard()


@pytest.fixture
def new_page(browser: Browser, guard: Guard) -> Iterator[Opener]:
    """Make pages of contexts of their own; at the end none has logged an error, or broken its policy."""
    with contextlib.ExitStack() as contexts:

        def make(**options: Any) -> Page:
            size = {"width": options.pop("width", 1280), "height": options.pop("height", 800)}
            options = {"locale": "en-US", "viewport": size} | options
            context = browser.new_context(**options)
            contexts.callback(context.close)
            context.set_default_timeout(15_000)
            context.add_init_script(
                "addEventListener('securitypolicyviolation', (e) => console.error('policy: ' + e.violatedDirective))"
            )
            page = context.new_page()
            page.on("console", guard.note)
            page.on("pageerror", lambda error: guard.problems.append(f"uncaught: {error}"))
            return page

        yield make
        assert [] == guard.unexpected()


@pytest.fixture
def page(new_page: Opener) -> Page:
    """A page of 1280 by 800."""
    return new_page()
