"""What an operator reads of an error: our own messages hold no payload, others' might."""

from __future__ import annotations

import traceback
from pathlib import Path

from services.contract.errors import FiqError
from services.corpus import CorpusError


def reason_of(error: BaseException) -> str:
    """Return the text of our own errors, the type of others."""
    return str(error) if isinstance(error, FiqError | CorpusError) else f"unexpected {type(error).__name__}"


def described(error: BaseException) -> dict[str, str]:
    """Return the keys and values of a log line about *error*; of others' errors, with the place in the code."""
    values = {"error": type(error).__name__, "reason": reason_of(error)}
    if not isinstance(error, FiqError | CorpusError) and error.__traceback__ is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        values["where"] = f"{Path(frame.filename).name}:{frame.lineno}"
    return values
