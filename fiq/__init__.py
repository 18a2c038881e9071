"""Free Intelligence event pipeline: the library that users import.

::

    from fiq import FiqClient, open_corpus

The client needs aiohttp and orjson; the corpus needs ``pip install fiq[corpus]``, and is imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fiq.client import FiqClient

if TYPE_CHECKING:
    from fiq.corpus import open_corpus

__all__ = ["FiqClient", "open_corpus"]


def __getattr__(name: str) -> Any:
    if name == "open_corpus":
        from fiq.corpus import open_corpus  # needs h5py

        return open_corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
