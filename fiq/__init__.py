"""Free Intelligence event pipeline: the library that users import.

::

    from fiq import Client, open_corpus

The clients (:mod:`fiq.client`) need aiohttp and orjson. The corpus (:mod:`fiq.corpus`) needs
``pip install 'fiq[corpus]'``. Each is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiq.client import AsyncClient, ClientError, RetryPolicy
    from fiq.corpus import open_corpus

__all__ = ["AsyncClient", "ClientError", "RetryPolicy", "open_corpus"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fiq.corpus" if name == "open_corpus" else "fiq.client"), name)
