"""The page's dead letters, conflicts and verification, on a stack whose log forgets keys after seconds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from fiq.event import Event, new_event_id
from services.cli.embedded.stack import Stack
from services.log.dead_letters import message_headers
from services.log.jetstream.connection import close, connect
from services.log.partitions import partition_of
from services.log.settings import LogSettings
from tests.integration.ui.conftest import Guard, Service
from tests.integration.ui.test_page import open_view
from tests.support.polling import eventually_sync

pytestmark = pytest.mark.timeout(180)

BODY = b'{"event_type":"A","payload":"<b>private</b>"}'


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One node and one persister; keys are forgotten after two seconds, and nobody asks HDF5 for them."""
    env = {"FI_STREAM_MAX_BYTES": "64MiB", "FI_DUPLICATE_WINDOW": "2s", "FI_KEY_LOOKUP_WAIT": "0"}
    with Stack(tmp_path_factory.mktemp("dead") / "stack", nodes=1, persisters=1, env=env) as running:
        yield running


def publish(stack: Stack, subject: str, body: bytes, headers: dict[str, str]) -> int:
    """Store a message in the log as another program might, and return its sequence."""

    async def run() -> int:
        nc = await connect(LogSettings(servers=tuple(stack.cluster.urls)), name="test", on_closed=lambda _: None)
        try:
            reply = await nc.request(subject, body, headers=headers, timeout=10)
            return int(json.loads(reply.data)["seq"])
        finally:
            await close(nc)

    return apart(run())


def apart(coroutine: Coroutine[Any, Any, int]) -> int:
    """Run *coroutine* in another thread: Playwright's own loop runs in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def set_aside(stack: Stack, event: Event) -> None:
    """Set *event* aside as a persister does that cannot write it."""
    headers = message_headers(f"test/{new_event_id()}", 1, event.consultation, event.headers(), "<i>not</i> written")
    publish(stack, f"fi.dead.{partition_of(event.consultation, 16)}", event.body, headers)


def test_a_bad_message_is_shown_on_demand_and_dropped_with_a_reason(page: Page, service: Service, stack: Stack) -> None:
    """It cannot be requeued, and the page says why; showing it and dropping it are in the audit log."""
    bad = Event("bad", new_event_id(), 1, b"<script>garbage</script>")
    publish(stack, "fi.events.bad", bad.body, bad.headers())
    eventually_sync(lambda: json.loads(service.ask("/dead-letters"))["dead_letters"])
    open_view(page, service, "#/dead-letters")
    row = page.locator("tbody tr", has_text="bad")
    row.get_by_role("link").click()
    panel = page.locator(".panel")
    expect(panel).to_contain_text(str(bad.event_id))
    expect(panel.get_by_role("button", name="Requeue")).to_be_disabled()
    assert b"BODIES_SHOWN" not in service.log.read_bytes()
    panel.get_by_role("button", name="Show the content").click()
    expect(panel.locator("pre")).to_have_text("<script>garbage</script>")
    eventually_sync(lambda: b"BODIES_SHOWN" in service.log.read_bytes())
    page.reload()
    expect(panel).to_contain_text(str(bad.event_id))

    panel.get_by_role("button", name="Drop").click()
    form = page.get_by_role("dialog")
    form.get_by_role("button", name="Drop").click()
    expect(form).to_be_visible()  # without a reason nothing is sent
    form.get_by_label("Reason").fill("a test of the ward")
    form.get_by_role("button", name="Drop").click()
    expect(page.get_by_text("No dead letters")).to_be_visible()
    eventually_sync(lambda: b"a test of the ward" in service.log.read_bytes())


def test_a_message_that_can_be_written_again_is_requeued(
    page: Page, guard: Guard, service: Service, stack: Stack
) -> None:
    """It is in the consultation afterwards; a refusal is shown with its reason, and nothing is lost by it."""
    guard.expected += ["409", "422"]
    event = Event("again", new_event_id(), 1_700_000_000_000_000_000, BODY)
    set_aside(stack, event)
    open_view(page, service, "#/dead-letters")
    page.locator("tbody tr", has_text="again").get_by_role("link").click()
    expect(page.locator(".panel")).to_contain_text("<i>not</i> written")
    page.locator(".panel").get_by_role("button", name="Requeue").click()
    form = page.get_by_role("dialog")

    def requeued() -> bool:
        form.get_by_role("button", name="Requeue").click()
        page.wait_for_timeout(500)
        return form.count() == 0

    eventually_sync(requeued)
    expect(page.get_by_text("No dead letters")).to_be_visible()
    service.persisted("again", 1)
    (record,) = service.records("again")
    assert BODY in record


def test_a_conflict_is_marked_and_its_body_is_shown_on_demand(page: Page, service: Service, stack: Stack) -> None:
    """The consultation names the key's event; the dialog shows what came under it, byte for byte."""
    first = Event("conflicted", new_event_id(), 1_700_000_000_000_000_000, BODY)
    other = replace(first, body=b'{"event_type":"B", "payload": 12345678901234567890}')
    kept = publish(stack, "fi.events.conflicted", first.body, first.headers())
    eventually_sync(lambda: publish(stack, "fi.events.conflicted", other.body, other.headers()) != kept)
    eventually_sync(lambda: json.loads(service.ask("/consultations/conflicted/conflicts?bodies=0"))["conflicts"])
    open_view(page, service, "#/consultations/conflicted")
    expect(page.locator("article .tag.bad")).to_contain_text("key used for 1 other event")
    page.get_by_role("button", name="1 conflict").click()
    box = page.get_by_role("dialog")
    expect(box).to_contain_text(str(first.event_id))
    expect(box.locator("code", has_text="12345678901234567890")).to_have_count(0)
    box.get_by_role("button", name="Show contents").click()
    expect(box.locator("td code").last).to_have_text(other.body.decode())
    assert other.body.decode() == box.locator("td code").last.text_content()


def test_a_retry_that_the_log_has_twice_is_marked(page: Page, service: Service, stack: Stack) -> None:
    """In the view of all events; HDF5 has it once."""
    event = Event("retried", new_event_id(), 1_700_000_000_000_000_000, BODY)
    open_view(page, service, "#/live")
    expect(page.locator(".live").first).to_have_text("Live")
    kept = publish(stack, "fi.events.retried", event.body, event.headers())
    eventually_sync(lambda: publish(stack, "fi.events.retried", event.body, event.headers()) != kept)
    rows = page.locator("tbody tr", has_text="retried")
    expect(rows).to_have_count(2)
    expect(rows.first.locator(".tag.warn")).to_have_text("retry")
    expect(rows.last.locator(".tag.warn")).to_have_count(0)
    service.persisted("retried", 1)


def test_the_chain_of_a_consultation_is_verified_on_demand(page: Page, service: Service) -> None:
    """The page says how many events are intact."""
    for number in range(3):
        service.say("verified", f"{number}")
    service.persisted("verified", 3)
    open_view(page, service, "#/consultations/verified")
    page.get_by_role("button", name="Verify").click()
    expect(page.get_by_text("The chain is intact: 3 events")).to_be_visible()
