"""Looks through the whole file system for what the building of an image may have left.

Its text is run by the image's own Python, with what to look for as JSON in the only argument, and says what it found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

#: folders of a library that only installing needs, besides the distributions that are asked for
_TOOLS = {"ensurepip", "pip", "setuptools", "wheel", "python-wheels"}
_COMMANDS = re.compile(r"pip[0-9.]*|wheel|curl|git|make")
_COMPILER = re.compile(r"(.+-)?(gcc|cc|c\+\+|g\+\+|clang|tcc|as|ld)(-[0-9.]+)?")
_CACHE = re.compile(r"/root/\.cache|/build|/var/lib/apt/lists/.+|/var/cache/apt/archives/.+\.deb")
_SETTINGS = {"pip.conf", "pydistutils.cfg", ".pydistutils.cfg"}
#: where whatever an installation writes down would be
_WRITTEN = ("/opt/fiq/", "/etc/")


class Asked(TypedDict):
    """What is looked for: names of distributions, SHA-256 of certificate bundles, hosts of package indexes."""

    distributions: list[str]
    bundles: list[str]
    hosts: list[str]


def kinds(path: str, asked: Asked) -> Iterator[str]:
    """Yield what a file or folder is, of that which must not be there."""
    name = os.path.basename(path)  # noqa: PTH119  # of every path there is: this is ten times as fast
    library = "/lib/python3" in path or path.startswith("/usr/share/python-wheels")
    if (library and _is_tool(name, asked["distributions"])) or ("/bin/" in path and _COMMANDS.fullmatch(name)):
        yield "tools of the build"
    if _CACHE.fullmatch(path):
        yield "caches"
    if name in _SETTINGS:
        yield "settings of pip"
    if not os.path.isfile(path):  # noqa: PTH113
        return
    if _COMPILER.fullmatch(name) and os.access(path, os.X_OK):
        yield "compilers"
    content = Path(path).read_bytes()
    if hashlib.sha256(content).hexdigest() in asked["bundles"]:
        yield "certificate bundles"
    if path.startswith(_WRITTEN) and any(host.encode() in content for host in asked["hosts"]):
        yield "hosts of an index"


def _is_tool(name: str, distributions: list[str]) -> bool:
    information = re.fullmatch(r"(.+?)-[^-]+\.(dist|egg)-info", name)
    known = information is not None and re.sub(r"[-_.]+", "-", information[1]).lower() in distributions
    return known or name in _TOOLS or name.endswith(".whl")


def main() -> None:
    """Write what of :class:`Asked` is here: paths by kind. What the engine mounts is not the image's."""
    asked: Asked = json.loads(sys.argv[1])
    found: dict[str, list[str]] = {}
    root = os.lstat("/").st_dev
    for folder, folders, files in os.walk("/"):
        folders[:] = [name for name in folders if os.lstat(f"{folder}/{name}").st_dev == root]
        paths = [f"{folder.rstrip('/')}/{name}" for name in (*folders, *files)]
        for path in paths:
            for kind in kinds(path, asked) if os.lstat(path).st_dev == root else ():
                found.setdefault(kind, []).append(path)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
