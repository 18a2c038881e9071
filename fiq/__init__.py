"""Free Intelligence event pipeline: the library that users import.

::

    from fiq import Client, open_corpus

The clients (:mod:`fiq.client`) need aiohttp and orjson. The corpus (:mod:`fiq.corpus`) needs
``pip install 'fiq[corpus]'``. Both are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fiq.client import AsyncClient, Client, ClientError, RetryPolicy
    from fiq.corpus import Corpus

__all__ = ["AsyncClient", "Client", "ClientError", "RetryPolicy", "open_corpus"]
_OF_CLIENT = frozenset(__all__) - {"open_corpus"}


def open_corpus(path: str | PathLike[str], *, strict: bool = False) -> Corpus:
    """Open a corpus for reading; see :func:`fiq.corpus.open_corpus`.

    Raises:
        ModuleNotFoundError: h5py or numpy is not installed.
        CorpusNotFoundError: there is no corpus at *path*.
    """
    from fiq import corpus

    return corpus.open_corpus(path, strict=strict)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _OF_CLIENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fiq.client"), name)
