"""The page at ``/ui``: HTML, ES modules and CSS out of the package, and what they need to know of this process.

The files are served as they are, from memory, without a token: they hold no data. The browser may run, load and send
only what comes from this origin, and no text can become markup or code (Trusted Types without any policy). The page
keeps its token in memory and calls the same HTTP interface as every other client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from services.ingest.problems import SERVER

UI_PATH = "/ui"
UI_FILE_PATH = UI_PATH + "/{file}"
INDEX = "index.html"
_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # it changes with the version, so browsers must ask again
    "Cache-Control": "no-cache",
    "Server": SERVER,
}


def names() -> list[str]:
    """Return the names of the files below ``/ui/``."""
    return sorted(path.name for path in _FOLDER.iterdir() if path.suffix in _TYPES and path.name != INDEX)


def handlers(version: str, *, masked: bool, token_required: bool) -> tuple[Handler, Handler]:
    """Return the handlers of ``/ui`` and of its files.

    Args:
        version: of the product; the page shows it.
        masked: whether the page shows an event's body only when it is asked for.
        token_required: whether requests need a token; without one the page begins with the form that asks for it.
    """
    token = "required" if token_required else "optional"
    files = dict(_files({"version": version, "bodies": "hidden" if masked else "shown", "token": token}))

    async def index(request: web.Request) -> web.StreamResponse:
        return files[INDEX].answer(request)

    async def file(request: web.Request) -> web.StreamResponse:
        found = files.get(request.match_info["file"])
        if found is None or found is files[INDEX]:
            raise web.HTTPNotFound
        return found.answer(request)

    return index, file


class _File:
    """One file: its bytes, media type and entity tag."""

    def __init__(self, body: bytes, media_type: str) -> None:
        self._body = body
        self._tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        self._headers = {**HEADERS, "Content-Type": media_type, "ETag": self._tag}

    def answer(self, request: web.Request) -> web.Response:
        """Return the file, or 304 to a browser that has it."""
        known = ",".join(request.headers.getall(hdrs.IF_NONE_MATCH, ()))
        if self._tag in {tag.strip().removeprefix("W/") for tag in known.split(",")}:
            headers = {name: value for name, value in self._headers.items() if name != "Content-Type"}
            return web.Response(status=304, headers=headers)
        return web.Response(body=self._body, headers=self._headers)


def _files(values: Mapping[str, str]) -> Iterator[tuple[str, _File]]:
    """Yield each file with its name; *values* replace ``{{name}}`` in the HTML."""
    for name in (INDEX, *names()):
        path = _FOLDER / name
        body = path.read_bytes()
        if name == INDEX:
            for key, value in values.items():
                body = body.replace(b"{{%b}}" % key.encode(), escape(value).encode())
        yield name, _File(body, _TYPES[path.suffix])
