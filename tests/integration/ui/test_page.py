"""The page in a real browser, on a real stack with real dialogues: each of its parts, and what may go wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from axe_playwright_python.base import AXE_FILE_PATH
from playwright.sync_api import Dialog, Locator, Page, Route, expect

from services.cli.embedded.stack import Stack
from tests.integration.ui.conftest import Guard, Opener, Service, secret
from tests.support.dialogues import consultations
from tests.support.polling import eventually_sync

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def dialogue(service: Service) -> list[dict[str, Any]]:
    """A dialogue of a doctor and a patient, in HDF5 as `visit-1`; its events."""
    posts = next(one for one in consultations() if 12 <= len(one) <= 20)
    for post in posts:
        service.post("visit-1", post.body, post.key)
    service.persisted("visit-1", len(posts))
    return [json.loads(post.body) | {"key": post.key} for post in posts]


def open_view(page: Page, service: Service, view: str = "") -> None:
    """Open a view of the page and wait for its heading."""
    page.goto(f"{service.url}/ui{view}")
    page.locator("h1").first.wait_for()


def show_contents(page: Page) -> None:
    page.get_by_role("button", name="Show contents").click()


def events(page: Page) -> Locator:
    """Return the events in view."""
    return page.locator("article.event")


# -- consultations ----------------------------------------------------------------------------------------------------


def test_a_browser_that_opens_the_service_is_led_to_the_consultations(page: Page, service: Service) -> None:
    """`GET /` of a browser is the page; the menu has every view where no token is needed."""
    page.goto(service.url)
    expect(page).to_have_title("Consultations · fiq")
    assert page.url == f"{service.url}/ui#/consultations"
    menu = page.get_by_role("navigation", name="Views").get_by_role("link")
    expect(menu).to_have_text(["Consultations", "Live", "Pipeline", "Dead letters", "Post"])


def test_the_list_shows_counts_and_times_with_the_newest_activity_first(page: Page, service: Service) -> None:
    """An event moves its consultation to the top, and is counted as waiting until HDF5 has it."""
    for name, count in (("list-a", 3), ("list-b", 1)):
        for number in range(count):
            service.say(name, f"{number}")
    service.persisted("list-a", 3)
    open_view(page, service)
    page.get_by_label("Id begins with").fill("list-")
    rows = page.locator("tbody tr")
    expect(rows.locator("a")).to_have_text(["list-b", "list-a"])
    expect(rows.nth(1).locator("td").first).to_have_text("3")
    expect(rows.nth(1).locator("time")).to_have_count(2)

    service.say("list-a", "another one")
    expect(rows.locator("a")).to_have_text(["list-a", "list-b"])
    expect(rows.first.locator("td").first).to_have_text("4")
    service.say("list-new", "first")
    expect(rows.locator("a").first).to_have_text("list-new")


def test_the_list_is_paged_by_id_and_narrowed_by_a_prefix(page: Page, service: Service) -> None:
    """A hundred a page; the address keeps the choice."""
    lines = "\n".join(json.dumps({"event_type": "A", "consultation_id": f"many-{number:03}"}) for number in range(130))
    service.ask("/events/batch", lines.encode(), {"Content-Type": "application/x-ndjson"})
    for number in range(130):
        service.persisted(f"many-{number:03}", 1)
    open_view(page, service, "#/consultations?prefix=many-&order=name")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(100)
    page.get_by_role("button", name="More").click()
    expect(rows).to_have_count(130)
    expect(rows.last.locator("a")).to_have_text("many-129")
    page.get_by_label("Id begins with").fill("many-12")
    expect(rows).to_have_count(10)
    assert page.url.endswith("#/consultations?prefix=many-12&order=name")
    page.get_by_label("Id begins with").press("End")
    page.get_by_label("Id begins with").fill("no-such")
    expect(page.get_by_text("No consultation begins with this")).to_be_visible()


def test_the_list_is_asked_for_as_soon_as_the_scripts_are_there(page: Page, service: Service) -> None:
    """The first view's requests: its files all at once, then the list and what is new. No frame passes in between."""
    service.say("first-view", "hello")
    service.persisted("first-view", 1)
    open_view(page, service)
    expect(page.locator("tbody tr").first).to_be_visible()
    names, list_asked, script_end = page.evaluate(
        """() => {
          const found = performance.getEntriesByType("resource");
          const list = found.find((one) => new URL(one.name).pathname === "/consultations");
          const end = performance.getEntriesByType("navigation")[0].domContentLoadedEventStart;
          return [found.map((one) => new URL(one.name).pathname), list.startTime, end];
        }"""
    )
    scripts = ["api", "app", "consultations", "dom", "texts"]
    files = {*(f"/ui/{name}.js" for name in scripts), "/ui/style.css", "/ui/icon.svg"}
    assert files | {"/consultations"} == set(names) - {"/events"}  # a stream is listed when it ends
    assert list_asked < script_end  # the document's scripts run before this event


# -- one consultation -------------------------------------------------------------------------------------------------


def test_contents_are_masked_until_asked_for_and_each_one_shown_is_audited(
    page: Page, service: Service, dialogue: list[dict[str, Any]]
) -> None:
    """The page reads the list without bodies; showing one reads one, showing all reads those in view."""
    service.say("masked", "the secret")
    service.say("masked", "another one")
    service.persisted("masked", 2)
    before = service.audited("masked")
    open_view(page, service, "#/consultations/masked")
    expect(events(page)).to_have_count(2)
    expect(page.get_by_text("the secret")).to_have_count(0)
    events(page).first.get_by_role("button", name="Details").click()
    expect(page.locator(".panel")).to_contain_text("In HDF5")
    assert before == service.audited("masked")
    page.keyboard.press("Escape")

    events(page).first.get_by_role("button", name="Show").click()
    expect(page.get_by_text("the secret")).to_be_visible()
    expect(page.get_by_text("another one")).to_have_count(0)
    eventually_sync(lambda: service.audited("masked") == before + 1)
    show_contents(page)
    expect(page.get_by_text("another one")).to_be_visible()
    eventually_sync(lambda: service.audited("masked") == before + 2)
    page.get_by_role("button", name="Show contents").click()
    expect(page.get_by_text("the secret")).to_have_count(0)


def test_a_consultation_reads_as_the_dialogue_that_it_was(
    page: Page, service: Service, dialogue: list[dict[str, Any]]
) -> None:
    """Speaker and text of each line, in order; the summary with its section."""
    open_view(page, service, "#/consultations/visit-1")
    expect(page.locator(".summary")).to_contain_text(f"{len(dialogue)} events")
    show_contents(page)
    said = [event["payload"] for event in dialogue]
    page.locator("p.text").last.wait_for()
    for payload in said:
        expect(page.locator("p.text").get_by_text(payload["text"], exact=True).first).to_be_attached()
    speakers = list(dict.fromkeys(payload["speaker"] for payload in said if "speaker" in payload))
    for number, speaker in enumerate(speakers[:2]):
        expect(page.locator(f"b.speaker.s{number}").first).to_have_text(speaker)
    page.locator(".scroller").evaluate("(list) => list.scrollTo(0, list.scrollHeight)")
    expect(events(page).last).to_contain_text("CONSULTATION_SUMMARIZED")
    if "section" in said[-1]:  # the generated ones have none
        expect(events(page).last.locator(".extra")).to_contain_text(said[-1]["section"])


def test_a_body_is_shown_byte_for_byte(page: Page, service: Service) -> None:
    """Long integers are not rounded, zeros and spaces stay; indented, every token is as it was."""
    body = (
        '{ "event_type":"NUMBERS",  "payload": {"n": 12345678901234567890123, "f":1.500, "e":1e2,"s":"\\u00e9\\/é"} }'
    )
    service.post("bytes", body)
    open_view(page, service, "#/consultations/bytes?view=json")
    show_contents(page)
    expect(page.locator("code.json")).to_have_text(body, use_inner_text=False)
    assert body == page.locator("code.json").text_content()
    events(page).first.click()
    raw = page.locator(".panel pre")
    assert body == raw.text_content()
    page.get_by_role("button", name="Indented").click()
    expect(raw).to_contain_text('    "n": 12345678901234567890123,\n    "f": 1.500,\n    "e": 1e2,')
    assert json.loads(body) == json.loads(raw.text_content() or "")
    page.get_by_role("button", name="Dialogue").click()
    expect(page.locator("code.json")).to_have_text('{"n":12345678901234567890123,"f":1.500,"e":1e2,"s":"\\u00e9\\/é"}')


def test_events_are_filtered_by_type_and_time(page: Page, service: Service) -> None:
    """The address keeps the filter; what no event passes says so."""
    for number in range(3):
        service.post("filtered", json.dumps({"event_type": "A", "payload": f"a{number}"}))
    service.post("filtered", '{"event_type": "B", "payload": "b"}')
    open_view(page, service, "#/consultations/filtered")
    expect(events(page)).to_have_count(4)
    page.get_by_text("Filter", exact=True).click()
    page.get_by_label("Event type").fill("B")
    page.get_by_label("Event type").press("Enter")
    expect(events(page)).to_have_count(1)
    page.reload()
    expect(events(page)).to_have_count(1)
    page.get_by_role("button", name="Clear").click()
    expect(events(page)).to_have_count(4)
    page.get_by_label("From", exact=True).fill("2099-01-01T00:00:00")
    page.get_by_label("From", exact=True).press("Enter")
    expect(page.get_by_text("No event matches the filter")).to_be_visible()
    page.get_by_label("From", exact=True).fill("2001-01-01T00:00:00")
    page.get_by_label("To", exact=True).fill("2002-01-01T00:00:00")
    page.get_by_label("To", exact=True).press("Enter")
    expect(page.get_by_text("No event matches the filter")).to_be_visible()
    page.get_by_label("To", exact=True).fill("2099-01-01T00:00:00")
    page.get_by_label("To", exact=True).press("Enter")
    expect(events(page)).to_have_count(4)


def test_an_event_is_found_by_key_message_id_and_sequence(page: Page, service: Service) -> None:
    """Each opens its details; what does not exist says so."""
    answers = [service.say("lookup", f"line {number}", key=f"visit:{number}") for number in range(5)]
    open_view(page, service, "#/consultations/lookup")
    field = page.get_by_label("Find an event")
    for number, wanted in ((3, "visit:3"), (1, answers[1]["message_id"]), (4, str(answers[4]["sequence"]))):
        field.fill(wanted)
        field.press("Enter")
        expect(page.locator(".panel .details")).to_contain_text(answers[number]["message_id"])
        expect(page.locator("article.selected")).to_have_count(1)
    field.fill("nothing")
    field.press("Enter")
    expect(page.get_by_text("No event with this key, message id or sequence.")).to_be_visible()


def test_an_event_shows_its_way_with_times_in_local_time_and_utc(new_page: Opener, service: Service) -> None:
    """Received, on the nodes, in HDF5; sequence and ids; the link opens the same event."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"Content-Type": "application/json", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    answer = json.loads(service.ask("/consultations/way/events", b'{"event_type": "A"}', headers))
    service.persisted("way", 1)
    (record,) = map(json.loads, service.records("way"))
    utc = record["received"].replace("T", " ")
    page = new_page(timezone_id="Etc/GMT+5")
    open_view(page, service, f"#/consultations/way?at={answer['sequence']}&event={answer['message_id']}")
    expect(page.locator(".way li.done")).to_have_count(3)
    details = page.locator(".panel .details")
    expect(details).to_contain_text(record["received"])
    expect(details).to_contain_text(answer["message_id"])
    expect(page.locator(".way")).to_contain_text(f"#{answer['sequence']} · ")
    expect(page.locator(".way li").nth(1)).to_contain_text(re.compile(r"\d\d:\d\d:\d\d\.\d{3}"))
    persisted = page.locator(".way li").nth(2)
    expect(persisted).to_contain_text(f"{record['written'][14:19]}.{record['written'][20:23]}")
    expect(details).to_contain_text(trace)
    hour = (int(utc[11:13]) - 5) % 24
    expect(events(page).first.locator("time")).to_have_text(f"{hour:02}{utc[13:19]}")
    page.get_by_role("button", name="UTC").click()
    expect(events(page).first.locator("time")).to_have_text(utc[11:19])


def test_an_open_event_that_waits_gets_its_time_in_hdf5(page: Page, service: Service) -> None:
    """Until then its way ends on the nodes, without a time in HDF5."""
    service.post("waits", '{"event_type": "A"}')
    service.persisted("waits", 1)
    (record,) = map(json.loads, service.records("waits"))
    state = f'"status":"persisted","written":"{record["written"]}"'
    waits = True

    def answer(route: Route) -> None:
        if "follow=1" in route.request.url:
            route.continue_()
            return
        response = route.fetch()
        shown = '"status":"queued","written":null' if waits else state
        route.fulfill(response=response, body=response.text().replace(state, shown))

    page.route(re.compile("/consultations/waits/events"), answer)
    open_view(page, service, f"#/consultations/waits?at={record['sequence']}&event={record['message_id']}")
    last = page.locator(".way li").nth(2)
    expect(page.locator(".way li.done")).to_have_count(2)
    expect(last).to_contain_text("waits for HDF5")
    waits = False
    expect(last).to_contain_text(f"{record['written'][14:19]}.{record['written'][20:23]}")
    expect(page.locator(".way li.done")).to_have_count(3)
    page.unroute_all()


def test_a_deployment_may_show_contents_at_once(page: Page, guarded: Service) -> None:
    """With FI_UI_MASKED=0; they are audited with the name of the token all the same."""
    guarded.say("unmasked", "for everybody with a token")
    guarded.persisted("unmasked", 1)
    sign_in(page, guarded, "reader")
    page.evaluate("location.hash = '#/consultations/unmasked'")
    expect(page.get_by_text("for everybody with a token")).to_be_visible()
    eventually_sync(lambda: guarded.audited("unmasked") == 1)
    assert b'"token":"reader"' in guarded.log.read_bytes()


# -- live -------------------------------------------------------------------------------------------------------------


def test_new_events_appear_and_following_pauses_and_resumes_from_a_position(page: Page, service: Service) -> None:
    """What came during the pause comes at its end; or again, from a sequence."""
    first = service.say("live", "one")
    open_view(page, service, "#/consultations/live")
    expect(page.locator(".live")).to_have_text("Live")
    service.say("live", "two")
    expect(events(page)).to_have_count(2)
    expect(page.locator(".status.persisted")).to_have_count(2)

    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".live")).to_have_text("Paused")
    service.say("live", "three")
    service.persisted("live", 3)
    expect(events(page)).to_have_count(2)
    page.get_by_role("button", name="Resume").click()
    expect(events(page)).to_have_count(3)

    page.get_by_role("button", name="Pause").click()
    page.get_by_label("Resume after sequence").fill(str(first["sequence"]))
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".live")).to_have_text("Live")
    service.say("live", "four")
    expect(events(page)).to_have_count(4)


def test_many_new_events_are_drawn_at_once(page: Page, service: Service) -> None:
    """At most four times a second, so that a busy consultation leaves the browser time for other pages."""
    service.say("busy", "first")
    service.persisted("busy", 1)
    page.add_init_script(
        """
        const ask = window.fetch;
        window.fetch = async (url, options) => {
          if (!url.searchParams.has("follow")) return ask(url, options);
          window.draws = [];
          const observer = new MutationObserver(() => draws.push(performance.now()));
          observer.observe(document.querySelector(".summary"), { childList: true });
          const encoder = new TextEncoder();
          const received = new Date().toISOString();
          const event = { event_type: "MESSAGE_RECEIVED", received, status: "persisted", bytes: 1 };
          return new Response(new ReadableStream({
            async start(stream) {
              for (let sequence = 1_000_001; sequence <= 1_000_100; sequence += 1) {
                await new Promise((done) => setTimeout(done, 5));
                const data = JSON.stringify({ ...event, sequence, message_id: `m-${sequence}` });
                stream.enqueue(encoder.encode(`id: ${sequence}\\ndata: ${data}\\n\\n`));
              }
            },
          }));
        };
        """
    )
    open_view(page, service, "#/consultations/busy")
    expect(page.locator(".summary")).to_contain_text("101 events")
    draws = page.evaluate("draws")
    assert 1 < len(draws) <= (draws[-1] - draws[0]) / 250 + 1.5


def test_all_consultations_can_be_watched(page: Page, service: Service) -> None:
    """Each new event is a row that leads to it."""
    open_view(page, service, "#/live")
    expect(page.locator(".live").first).to_have_text("Live")
    name = f"watched-{uuid4()}"
    service.say(name, "hello")
    row = page.locator("tbody tr", has_text=name)
    expect(row).to_contain_text("MESSAGE_RECEIVED")
    row.get_by_role("link").click()
    expect(page.locator("h1")).to_have_text(name)
    expect(page.locator("article.selected")).to_have_count(1)


@pytest.mark.usefixtures("dialogue")
def test_a_follower_survives_a_killed_ingest(page: Page, guard: Guard, service: Service, stack: Stack) -> None:
    """It shows the lost connection, comes back by itself, and misses nothing; the place is marked."""
    guard.expected += ["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "net::"]
    service.say("survives", "before")
    open_view(page, service, "#/consultations/survives")
    expect(page.locator(".live")).to_have_text("Live")
    stack.ingest.process.send(signal.SIGKILL)
    expect(page.locator(".live")).to_contain_text("Connection lost")
    eventually_sync(lambda: not stack.ingest.process.running)
    stack.restart(stack.ingest)
    stack.wait_ready(stack.ingest)
    service.say("survives", "after")
    expect(events(page)).to_have_count(2)
    expect(page.locator(".mark")).to_contain_text("nothing missed")
    expect(page.locator(".live")).to_contain_text("1 reconnect")


# -- size and speed ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_consultation(service: Service) -> int:
    """A consultation of 10,000 events, `long`; their number."""
    for start in range(0, 10_000, 1000):
        lines = "\n".join(
            json.dumps({"event_type": "MESSAGE_RECEIVED", "payload": {"speaker": "Doctor", "text": f"line {n}"}})
            for n in range(start, start + 1000)
        )
        service.post("long", lines, key=f"long-{start}", batch=True)
    return 10_000


def test_ten_thousand_events_scroll_without_a_stall(page: Page, service: Service, long_consultation: int) -> None:
    """Few rows exist at a time; frames go on while the list is scrolled from top to bottom with contents shown."""
    open_view(page, service, "#/consultations/long")
    expect(page.locator(".summary")).to_contain_text("10,000 events", timeout=60_000)
    show_contents(page)
    expect(page.get_by_text("line 0", exact=True)).to_be_visible()
    result = page.evaluate(
        """async () => {
          const list = document.querySelector(".scroller");
          let rows = 0, longest = 0, last = performance.now(), frames = 0;
          while (list.scrollTop + list.clientHeight < list.scrollHeight - 4 && frames < 2000) {
            list.scrollTop += 1500;
            await new Promise(requestAnimationFrame);
            const now = performance.now();
            longest = Math.max(longest, now - last);
            last = now;
            frames += 1;
            rows = Math.max(rows, list.querySelectorAll(".row").length);
          }
          return { rows, longest, frames };
        }"""
    )
    assert result["rows"] < 200
    assert 100 < result["frames"] < 2000
    # a stall is what a person sees; a busy machine drops frames
    assert result["longest"] < 1000, result
    expect(page.get_by_text("line 9999", exact=True)).to_be_visible()
    page.keyboard.press("Home")


@pytest.mark.usefixtures("long_consultation")
def test_a_link_into_a_long_consultation_opens_its_place_with_what_was_before(page: Page, service: Service) -> None:
    """The event is selected at once; scrolling up reads backwards."""
    record = json.loads(service.records("long")[700])
    open_view(page, service, f"#/consultations/long?at={record['sequence']}&event={record['message_id']}")
    expect(page.locator("article.selected")).to_be_in_viewport()
    for _ in range(30):
        page.locator(".scroller").evaluate("(list) => list.scrollTo(0, 0)")
        page.wait_for_timeout(50)
    show_contents(page)
    page.locator(".scroller").evaluate("(list) => list.scrollTo(0, 0)")
    expect(page.get_by_text("line 0", exact=True)).to_be_visible()


# -- hostile contents -------------------------------------------------------------------------------------------------

MARKUP = '<img src=x onerror="alert(1)"><script>alert(2)</script><b>bold</b> &lt;'
HOSTILE: dict[str, str] = {
    "markup": MARKUP,
    "direction": "safe \u202egnp.exe\u202c \u2066x\u2069 \u05e9\u05dc\u05d5\u05dd",
    "controls": "nul \x00 bell \x07 escape \x1b[31m c1 \x9b delete \x7f",
    "invisible": "zero\u200bwidth \ufeff \U000e0041 lines\u2028\u2029end",
    "template": "{{constructor.constructor('alert(3)')()}} ${alert(4)} javascript:alert(5)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_shown_as_text(page: Page, service: Service, name: str) -> None:
    """As the speaker, the text and the type; their characters stay what they were, and none has an effect."""
    text = HOSTILE[name]
    document = {"event_type": text, "payload": {"speaker": text, "text": text, text: text}}
    service.post(f"hostile-{name}", json.dumps(document))
    alerts: list[str] = []

    def note(dialog: Dialog) -> None:
        alerts.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", note)
    open_view(page, service, f"#/consultations/hostile-{name}")
    show_contents(page)
    expect(page.locator("p.text")).to_be_visible()
    assert text == page.locator("p.text").text_content()
    assert text == page.locator("b.speaker").text_content()
    events(page).first.click()
    expect(page.locator(".panel h2")).to_be_visible()
    assert text == page.locator(".panel h2").text_content()
    assert [] == alerts
    assert 0 == page.locator("article img, article script, article b b, .panel img").count()
    if name in {"direction", "controls"}:
        assert page.locator("p.text .special").count() >= 4
        code = page.locator("p.text .special").first
        assert code.get_attribute("data-code") in {"U+202E", "U+0000"}
        assert "isolate" == code.evaluate("(mark) => getComputedStyle(mark).unicodeBidi")


def test_large_and_deep_bodies_are_shown(page: Page, service: Service) -> None:
    """A megabyte is cut in its row and whole on demand; a hundred levels are text."""
    large = json.dumps({"event_type": "LARGE", "payload": {"text": "x y " * 250_000}})
    deep = '{"event_type":"DEEP","payload":' + "[" * 98 + "]" * 98 + "}"
    service.post("large", large)
    service.post("large", deep)
    service.persisted("large", 2)
    open_view(page, service, "#/consultations/large")
    show_contents(page)
    page.get_by_role("button", name="Show all").first.click()
    raw = page.locator(".panel pre")
    expect(raw).to_be_visible()
    page.locator(".panel").get_by_role("button", name="Show all").click()
    assert large == raw.text_content()
    page.keyboard.press("Escape")
    page.locator(".scroller").evaluate("(list) => list.scrollTo(0, list.scrollHeight)")
    expect(page.get_by_text("[" * 98 + "]" * 98)).to_be_visible()


# -- commands, links and export ---------------------------------------------------------------------------------------


def test_a_view_can_be_copied_as_commands_that_work(new_page: Opener, guarded: Service) -> None:
    """The same request in curl and in Python; the token is in a variable, not in the text."""
    guarded.say("commands", "it's “quoted”")
    page = new_page(permissions=["clipboard-read", "clipboard-write"])
    sign_in(page, guarded, "everything")
    page.goto(f"{guarded.url}/ui#/consultations/commands")
    expect(events(page)).to_have_count(1)
    page.get_by_role("button", name="As a command").click()
    env = os.environ | {"FIQ_TOKEN": secret("everything"), "PYTHONPATH": str(ROOT)}
    page.get_by_role("button", name="Copy curl").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    curl = page.evaluate("navigator.clipboard.readText()")
    assert secret("everything") not in curl
    found = subprocess.run(["sh", "-c", curl], env=env, capture_output=True, check=True, timeout=30)
    assert guarded.records("commands") == found.stdout.splitlines()
    page.get_by_role("button", name="Copy Python").click()
    eventually_sync(lambda: page.evaluate("navigator.clipboard.readText()") != curl)
    program: str = page.evaluate("navigator.clipboard.readText()")
    found = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True, timeout=30)
    assert "it's “quoted”" in found.stdout.decode()


def test_the_link_of_a_view_has_no_token_and_opens_the_same_view(new_page: Opener, guarded: Service) -> None:
    """Whoever opens it signs in with a token of their own."""
    guarded.say("linked", "hello")
    page = new_page(permissions=["clipboard-read", "clipboard-write"])
    sign_in(page, guarded, "everything")
    page.goto(f"{guarded.url}/ui#/consultations/linked?view=json")
    page.get_by_role("button", name="Copy the link to this view").click()
    expect(page.locator("#announcer")).to_have_text("Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert f"{guarded.url}/ui#/consultations/linked?view=json" == link
    other = new_page()
    other.goto(link)
    other.get_by_label("Token").fill(secret("reader"))
    other.get_by_role("button", name="Sign in").click()
    expect(other.locator("h1")).to_have_text("linked")


def test_what_is_shown_is_exported(page: Page, service: Service) -> None:
    """NDJSON byte for byte as the service gives it, over several pages; CSV as a spreadsheet needs it."""
    unsafe = ["\n=1+1", "＝1+1", "1234567890123456789", "-5"]
    texts = [*unsafe, *map(str, range(996))]
    lines = "\n".join(json.dumps({"event_type": "A", "payload": {"text": text}}) for text in texts)
    service.post("export", lines, batch=True)
    service.post(
        "export", '{"event_type": "=HYPERLINK()", "payload": {"text": "a \\"b\\", c\\n@d", "n": 12345678901234567890}}'
    )
    service.persisted("export", 1001)
    open_view(page, service, "#/consultations/export")

    def save(form: str, *, bodies: bool) -> bytes:
        page.get_by_role("button", name="Export").click()
        page.get_by_label("With contents").set_checked(bodies)
        with page.expect_download() as download:
            page.get_by_role("button", name=form).click()
        expect(page.get_by_text("Saved 1,001 events")).to_be_visible()
        page.get_by_role("dialog").get_by_role("button", name="Close").first.click()
        assert download.value.suggested_filename == f"export.{form.lower()}"
        return Path(download.value.path()).read_bytes()

    headers = {"Accept": "application/x-ndjson"}
    first = service.ask("/consultations/export/events?limit=1000", headers=headers)
    last = json.loads(first.splitlines()[-1])["sequence"]
    rest = service.ask(f"/consultations/export/events?after={last}&limit=1000", headers=headers)
    assert first + rest == save("NDJSON", bodies=True)
    assert b'"payload"' not in save("NDJSON", bodies=False)
    content = save("CSV", bodies=True)
    # without the mark a spreadsheet garbles accents
    assert content.startswith(b"\xef\xbb\xbfconsultation,sequence,event_id,received,event_type,")
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert 1001 == len(rows)
    assert [f"'{text}" for text in unsafe] == [row["text"] for row in rows[: len(unsafe)]]
    assert "'=HYPERLINK()" == rows[-1]["event_type"]
    assert 'a "b", c\n@d' == rows[-1]["text"]
    assert '"n": 12345678901234567890' in rows[-1]["event"]


def test_an_export_ends_where_the_filter_does(page: Page, service: Service) -> None:
    """What is not shown is not saved."""
    service.say("until", "one")
    service.persisted("until", 1)
    open_view(page, service, "#/consultations/until?until=2020-01-01T00:00:00.000Z")
    expect(page.get_by_text("No event matches the filter")).to_be_visible()
    page.get_by_role("button", name="Export").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="NDJSON").click()
    assert b"" == Path(download.value.path()).read_bytes()


# -- posting ----------------------------------------------------------------------------------------------------------


def test_an_event_is_posted_and_every_answer_is_shown(page: Page, guard: Guard, service: Service) -> None:
    """Stored, stored before, refused; what is no JSON is not sent."""
    guard.expected.append("422")
    open_view(page, service, "#/post")
    form = page.locator("form").first
    form.get_by_label("Consultation").fill("posted")
    form.get_by_label("Event (JSON)").fill('{"event_type": "A", "payload": 12345678901234567890}')
    post = form.get_by_role("button", name="Post", exact=True)
    post.click()
    answers = form.locator(".answer")
    expect(answers.first).to_contain_text("stored")
    post.click()
    expect(answers.first).to_contain_text("duplicate")
    form.get_by_label("Event (JSON)").fill('{"event_type": "B"}')
    post.click()
    expect(answers.first).to_contain_text("idempotency-key-reused")
    form.get_by_label("Event (JSON)").fill('{"event_type": ')
    post.click()
    expect(form.get_by_role("alert").last).to_be_visible()
    expect(answers).to_have_count(3)
    form.get_by_role("button", name="New key").click()
    form.get_by_label("Event (JSON)").fill('{"event_type": "B"}')
    post.click()
    expect(answers).to_have_count(4)
    expect(answers.first).to_contain_text("stored")
    assert [b'{"event_type": "A", "payload": 12345678901234567890}', b'{"event_type": "B"}'] == [
        line.partition(b'"event":')[2][:-1] for line in service.records("posted")
    ]
    answers.first.get_by_role("link", name="open").click()
    expect(page.locator("h1")).to_have_text("posted")


def test_the_commands_of_an_event_post_and_read_it(page: Page, service: Service) -> None:
    """In curl and in Python, with the key of the form: what comes second is a duplicate."""
    open_view(page, service, "#/post")
    form = page.locator("form").first
    form.get_by_label("Consultation").fill("by-command")
    form.get_by_label("Event (JSON)").fill('{"event_type": "it\'s", "payload": "\\u00e9"}')
    form.get_by_role("button", name="As a command").click()

    def run(name: str, *program: str) -> str:
        text = page.get_by_role("dialog").locator(f"pre[aria-label={name}]").text_content() or ""
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([*program, "-c", text], env=env, capture_output=True, check=True, timeout=30)
        return done.stdout.decode()

    assert '"status":"accepted"' in run("curl", "sh")
    assert "duplicate=True" in run("Python", sys.executable)
    (record,) = map(json.loads, service.records("by-command"))
    assert {"event_type": "it's", "payload": "é"} == record["event"]
    page.goto(f"{service.url}/ui#/consultations/by-command?at={record['sequence']}&event={record['message_id']}")
    page.reload()
    page.locator(".panel").get_by_role("button", name="As a command").click()
    assert record["message_id"] == json.loads(run("curl", "sh"))["message_id"]
    assert record["message_id"] in run("Python", sys.executable)


def test_a_file_is_posted_with_progress_and_refused_lines_are_listed(
    page: Page, guard: Guard, service: Service, tmp_path: Path
) -> None:
    """All other lines are stored; the same file again stores nothing."""
    guard.expected.append("422")
    lines = [json.dumps({"event_type": "A", "consultation_id": "file", "n": n}) for n in range(1200)]
    lines[700] = '{"no": "type"}'
    lines[701] = "no JSON"
    path = tmp_path / "events.ndjson"
    path.write_text("\n".join(lines) + "\n")
    open_view(page, service, "#/post")
    form = page.locator("form").last
    form.get_by_label("File").set_input_files(path)
    for stored, duplicates in ((1198, 0), (0, 1198)):
        form.get_by_role("button", name="Post the file").click()
        expect(form.get_by_role("status")).to_contain_text(
            f"{stored:,} stored, {duplicates:,} duplicates, 2 refused", timeout=60_000
        )
        expect(form.get_by_role("status")).to_contain_text("done")
        expect(form.locator(".answer")).to_have_count(2)
        expect(form.locator(".answer").first).to_contain_text("Line 701")
        expect(form.locator(".answer").last).to_contain_text("Line 702")
    assert "1" == page.locator("progress").evaluate("(bar) => String(bar.value)")


# -- tokens -----------------------------------------------------------------------------------------------------------


def sign_in(page: Page, service: Service, name: str) -> None:
    """Open the page and sign in with a token of the service."""
    page.goto(f"{service.url}/ui")
    page.get_by_label("Token").fill(secret(name))
    page.get_by_role("button", name="Sign in").click()


def test_a_wrong_or_expired_token_is_refused_with_what_to_do(page: Page, guard: Guard, guarded: Service) -> None:
    """The form stays; a right one opens the view of the address. A reload forgets it."""
    guard.expected.append("401")
    page.goto(f"{guarded.url}/ui#/consultations/c-1")
    for name in ("nobody", "expired"):
        page.get_by_label("Token").fill(secret(name))
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("The token is wrong, revoked or has expired")
    page.get_by_label("Token").fill(secret("reader"))
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("h1")).to_have_text("c-1")
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert secret("reader") not in stored
    page.reload()
    expect(page.get_by_label("Token")).to_be_visible()


def test_a_token_that_is_revoked_meanwhile_leads_to_the_form(page: Page, guard: Guard, guarded: Service) -> None:
    """The page says why, and the view comes back with another token."""
    guard.expected.append("401")
    tokens = guarded.log.parent / "tokens"
    whole = tokens.read_text()
    sign_in(page, guarded, "reader")
    expect(page.locator("h1")).to_have_text("Consultations")
    try:
        tokens.write_text("".join(line for line in whole.splitlines(keepends=True) if not line.startswith("reader")))
        expect(page.get_by_label("Token")).to_be_visible(timeout=20_000)
        expect(page.get_by_role("alert")).to_contain_text("revoked")
    finally:
        tokens.write_text(whole)
    page.get_by_label("Token").fill(secret("everything"))
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("h1")).to_have_text("Consultations")


def test_a_clinic_sees_its_own_consultations_and_no_operator_s_view(page: Page, guard: Guard, guarded: Service) -> None:
    """Its menu has neither the pipeline nor the dead letters, and their addresses say what is missing."""
    guard.expected.append("403")
    guarded.say("clinic-7", "ours")
    guarded.say("other-7", "theirs")
    guarded.persisted("clinic-7", 1)
    guarded.persisted("other-7", 1)
    sign_in(page, guarded, "clinic")
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_text(["Consultations", "Live", "Post"])
    expect(page.get_by_role("link", name="clinic-7")).to_be_visible()
    expect(page.get_by_role("link", name="other-7")).to_have_count(0)
    for view in ("pipeline", "dead-letters"):
        page.evaluate(f"location.hash = '#/{view}'")
        expect(page.get_by_text("It needs the scope ops")).to_be_visible()
    page.evaluate("location.hash = '#/consultations/other-7'")
    expect(page.get_by_role("alert").first).to_contain_text("does not allow this")


def test_an_operator_s_token_opens_the_pipeline(page: Page, guarded: Service) -> None:
    """The first view that the token allows, after signing in and by the name in the corner."""
    sign_in(page, guarded, "operator")
    expect(page.locator("h1")).to_have_text("Pipeline")
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_text(["Pipeline", "Dead letters"])
    page.evaluate("location.hash = '#/dead-letters'")
    expect(page.locator("h1")).to_have_text("Dead letters")
    page.locator("a.brand").click()
    expect(page.locator("h1")).to_have_text("Pipeline")


def test_without_the_write_scope_the_page_reads_only(page: Page, guarded: Service) -> None:
    """There is no way to post."""
    sign_in(page, guarded, "reader")
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_text(["Consultations", "Live"])
    page.evaluate("location.hash = '#/post'")
    expect(page.get_by_text("It needs the scope write")).to_be_visible()
    expect(page.locator("form")).to_have_count(0)


# -- the pipeline -----------------------------------------------------------------------------------------------------


def test_the_pipeline_shows_nodes_partitions_and_rates(page: Page, service: Service) -> None:
    """One leader; every partition with its owner; events that are posted move the charts."""
    open_view(page, service, "#/pipeline")
    expect(page.locator(".node")).to_have_count(3)
    expect(page.locator(".node .tag", has_text="leader")).to_have_count(1)
    expect(page.locator("tbody tr")).to_have_count(16)
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        service.say("rates", "hello")
    expect(page.locator(".tile", has_text="Accepted").locator(".value")).to_have_text(re.compile(r"^[1-9][\d.,]*/s$"))
    expect(page.locator("polyline.line").first).to_be_attached()


def test_a_killed_node_is_shown_within_five_seconds(page: Page, service: Service, stack: Stack) -> None:
    """With what to do; and its return."""
    open_view(page, service, "#/pipeline")
    expect(page.locator(".node")).to_have_count(3)
    node = stack.cluster.nodes[2]
    node.send(signal.SIGKILL)
    killed = time.monotonic()
    try:
        expect(page.locator(".node.down")).to_have_count(1, timeout=10_000)
        seen = time.monotonic() - killed
        expect(page.locator(".node.down")).to_contain_text("n3")
        expect(page.get_by_text("What to do").first).to_be_visible(timeout=30_000)
    finally:
        eventually_sync(lambda: not node.running)
        node.start()
    assert seen < 5
    expect(page.locator(".node.down")).to_have_count(0, timeout=60_000)


# -- languages and keys -----------------------------------------------------------------------------------------------


def test_the_page_speaks_the_browser_s_language(new_page: Opener, service: Service) -> None:
    """Spanish where the browser prefers it to English; English where it prefers neither."""
    for locale, heading, lang in (("es-PE", "Consultas", "es"), ("fr-FR", "Consultations", "en")):
        page = new_page(locale=locale)
        open_view(page, service)
        expect(page.locator("h1")).to_have_text(heading)
        assert lang == page.locator("html").get_attribute("lang")


def test_everything_can_be_done_with_the_keyboard(page: Page, service: Service) -> None:
    """From the first Tab to an event's details, without a pointer; the focus is always to be seen."""
    for number in range(40):
        service.say("keys", f"line {number}")
    open_view(page, service, "#/consultations?prefix=keys")
    expect(page.get_by_role("link", name="keys")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "keys":
            break
    assert "2px" == page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    page.keyboard.press("Enter")
    expect(events(page).first).to_be_visible()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('article')"):
            break
    page.keyboard.press("End")
    expect(page.locator("article:focus")).to_have_attribute("aria-posinset", "40")
    page.keyboard.press("ArrowUp")
    expect(page.locator("article:focus")).to_have_attribute("aria-posinset", "39")
    page.keyboard.press("Enter")
    expect(page.locator(".panel h2")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("article:focus")).to_have_attribute("aria-posinset", "39")


# -- how it looks -----------------------------------------------------------------------------------------------------

VIEWS = {
    "consultations": "#/consultations",
    "consultation": "#/consultations/visit-1",
    "json": "#/consultations/visit-1?view=json&type=MESSAGE_RECEIVED",
    "live": "#/live",
    "pipeline": "#/pipeline",
    "dead letters": "#/dead-letters",
    "post": "#/post",
    "nothing": "#/nothing",
}
SCHEMES = ("light", "dark")


def axe(page: Page) -> list[str]:
    """Return the violations that axe finds."""
    page.evaluate(AXE_FILE_PATH.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert len(found["passes"]) > 10
    return [
        f"{one['id']}: {node['html'][:120]} {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [1280, 320])
@pytest.mark.usefixtures("dialogue")
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(
    new_page: Opener, service: Service, guarded: Service, scheme: str, width: int
) -> None:
    """On any view, in both colour schemes, down to 320 px; with contents, details, dialogs and problems shown."""
    page = new_page(width=width, color_scheme=scheme)
    found: dict[str, list[str]] = {}

    def look(name: str) -> None:
        page.wait_for_timeout(150)
        found[name] = axe(page)
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            found[name].append("it is wider than the window")

    for name, view in VIEWS.items():
        open_view(page, service, view)
        page.wait_for_timeout(300)
        look(name)
        if name == "consultation":
            show_contents(page)
            page.locator("p.text").first.wait_for()
            look("contents")
            events(page).nth(1).locator("button.open").click()
            page.locator(".panel pre").wait_for()
            look("details")
            page.keyboard.press("Escape")
            page.get_by_text("Filter", exact=True).click()
            page.get_by_role("button", name="Export").click()
            look("export")
            page.keyboard.press("Escape")
            page.get_by_role("button", name="As a command").click()
            look("commands")
    page.goto(f"{guarded.url}/ui")
    page.get_by_label("Token").wait_for()
    look("sign in")
    assert {name: [] for name in found} == found


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where screenshots go: the documents if FIQ_SCREENSHOTS is set."""
    return ROOT / "docs" if os.environ.get("FIQ_SCREENSHOTS") else tmp_path


@pytest.mark.usefixtures("dialogue")
def test_the_screenshots_of_the_document_are_made_like_this(new_page: Opener, service: Service, shots: Path) -> None:
    """`FIQ_SCREENSHOTS=1` renews them; they have the size that the test makes, and are small."""
    page = new_page(width=1120, height=640)
    open_view(page, service, "#/consultations/visit-1")
    show_contents(page)
    events(page).nth(2).locator("button.open").click()
    page.locator(".panel pre").wait_for()
    page.screenshot(path=shots / "page-consultation.png")
    open_view(page, service, "#/pipeline")
    page.locator("polyline").first.wait_for(state="attached")
    page.screenshot(path=shots / "page-pipeline.png")
    document = (ROOT / "docs" / "page.md").read_text()
    for name in ("page-consultation.png", "page-pipeline.png"):
        kept = (ROOT / "docs" / name).read_bytes()
        assert f"]({name})" in document
        assert len(kept) < 150_000
        # width and height of a PNG
        assert (shots / name).read_bytes()[16:24] == kept[16:24]
