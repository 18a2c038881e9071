"""Server-Sent Events, as they come in pieces (WHATWG HTML, section 9.2.6)."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

_END_OF_LINE = re.compile("\r\n|\n|\r")


class MessageReader:
    """Makes messages out of the pieces of one answer. One that is cut off is none."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the data of each message that *piece* completes."""
        for line in self._lines(self._decoder.decode(piece)):
            if line:
                self._field(line)
                continue
            if self._data:
                yield "\n".join(self._data)
                self._data = []

    def _lines(self, text: str) -> list[str]:
        text = self._rest + text
        held = "\r" if text.endswith("\r") else ""  # its LF may be still to come
        *lines, rest = _END_OF_LINE.split(text.removesuffix(held) if held else text)
        self._rest = rest + held
        return lines

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")  # a comment has no name; those besides data say nothing that data does not
        if name == "data":
            self._data.append(value.removeprefix(" "))
