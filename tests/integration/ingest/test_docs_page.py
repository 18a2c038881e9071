"""The page for people: whole, well-formed, and without any other host."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from services.ingest.openapi import PAGE_HEADERS, as_page, curl, describe
from services.ingest.problems import registry
from services.ingest.settings import Settings
from tests.support.ingest import running_edge

URL = "http://fiq.example:7001"
#: elements that have no end
_VOID = {"meta"}


class Reader(HTMLParser):
    """Reads a page, and fails where an element is not closed in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name in {"lang", "charset", "name", "content", "id", "class", "href"}, name
            if name == "href":
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: bytes) -> Reader:
    reader = Reader()
    reader.feed(page.decode())
    reader.close()
    return reader


@pytest.fixture
def description() -> dict[str, Any]:
    return describe(Settings(), "1.2.3")


async def test_the_page_is_served_with_a_policy_that_loads_nothing() -> None:
    """The one style is allowed by its hash, which is the one of the page."""
    async with running_edge() as edge:
        reply = await edge.request("GET", "/docs")
        assert (200, "text/html; charset=utf-8") == (reply.status, reply.headers["Content-Type"])
        style = re.search(rb"<style>(.*?)</style>", reply.content, re.DOTALL)
        assert style is not None
        allowed = base64.b64encode(hashlib.sha256(style[1]).digest()).decode()
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert f"style-src 'sha256-{allowed}'" in policy
        assert {**PAGE_HEADERS}.items() <= reply.headers.items()


async def test_every_link_of_the_page_leads_somewhere_on_this_service() -> None:
    """To an operation on it, or to a path that answers 200."""
    async with running_edge() as edge:
        page = read((await edge.request("GET", "/docs")).content)
        assert {f"/problems/{problem.slug}" for problem in registry()} <= set(page.links)
        for link in set(page.links):
            if link.startswith("#"):
                assert link[1:] in page.ids
            else:
                assert 200 == (await edge.request("GET", link)).status


async def test_commands_on_the_page_name_the_service_as_its_reader_does(tmp_path: Path) -> None:
    """Each can be copied as it is; what cannot be a host is not repeated."""
    (tmp_path / "tokens").write_text("# none\n")  # without tokens only this machine's names are served
    async with running_edge(token_file=str(tmp_path / "tokens")) as edge:
        for headers, expected in (
            ({}, f"http://127.0.0.1:{edge.port}"),
            ({"Host": "fiq.clinic.example"}, "http://fiq.clinic.example"),
            ({"Host": "fiq.clinic.example", "X-Forwarded-Proto": "https"}, "https://fiq.clinic.example"),
            ({"Host": "[::1]:7001"}, "http://[::1]:7001"),
            ({"Host": "a b;<script>"}, "http://127.0.0.1:7001"),
        ):
            page = read((await edge.request("GET", "/docs", headers=headers)).content)
            assert f"{expected}/consultations/c-1/events" in page.text
            assert "<script>" not in page.text


def test_the_page_is_well_formed_and_shows_each_operation(description: dict[str, Any]) -> None:
    """Its parameters, its answers, and a command; no script, no image, no form."""
    page = read(as_page(description, URL))
    assert [] == page.open
    assert set() == page.tags & {"script", "img", "link", "form", "iframe", "object"}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            assert operation["operationId"] in page.ids
            assert operation["summary"] in page.text
            assert curl(description, URL, path, method, operation) in page.text


def test_everything_of_the_description_is_escaped(description: dict[str, Any]) -> None:
    """Whatever stands there is text on the page."""
    mark = "<b>&\"'"
    description["info"]["title"] = mark
    operation = description["paths"]["/consultations"]["get"]
    operation["summary"] = operation["description"] = mark
    description["components"]["parameters"]["prefix"]["description"] = mark
    page = read(as_page(description, URL))
    assert [] == page.open
    assert page.text.count(mark) >= 5
