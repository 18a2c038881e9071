"""Ask whether a service is healthy: ``python -m services.core.probe URL…``, for containers without curl.

It runs every few seconds in every container, so it imports nothing that takes time to load.
"""

from __future__ import annotations

import socket
import sys

#: seconds for the whole answer
TIMEOUT = 4.0
#: part of an answer that is printed, bytes
_MAX_SHOWN = 512


def main(urls: list[str]) -> int:
    """Return 0 if one of *urls* answers 200; otherwise 1, and print the answer of each."""
    answers = []
    for url in urls:
        answer = ask(url)
        if answer.startswith("200 "):
            return 0
        answers.append(f"{url}: {answer}")
    sys.stderr.write("\n".join(answers or ["usage: probe URL…"]) + "\n")
    return 1


def ask(url: str, timeout: float = TIMEOUT) -> str:
    """Return status and body of the answer of ``http://host:port/path``, or why there is none."""
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.rpartition(":")
    request = f"GET /{path} HTTP/1.0\r\nHost: {host}\r\n\r\n"
    try:
        with socket.create_connection((name, int(port)), timeout) as connection:
            connection.sendall(request.encode())
            with connection.makefile("rb") as file:
                head, _, body = file.read(_MAX_SHOWN).partition(b"\r\n\r\n")
    except (OSError, ValueError) as error:
        return str(error)
    status = head.partition(b"\r\n")[0].partition(b" ")[2]
    return f"{status.decode(errors='replace')} {body.decode(errors='replace')}".strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
