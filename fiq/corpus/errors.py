"""The errors of the corpus, a tree of their own: the package imports no other package of the project.

::

    CorpusError
        TransientCorpusError            wait, or reopen the store, and try again
            CorpusLockedError           another process holds the file
            CorpusIOError               the system refused a read or a write: disk full, I/O error
        PermanentCorpusError            an operator must act; the message says how
            CorpusNotFoundError         there is no corpus, or no partition file, at that path
            CorpusExistsError           the file that was to be created exists
            ArchivedFileError           the file is an archive, which is only read
            CorpusFormatError           the file is no partition file, damaged, or of another version
                IdentityMismatchError   the file belongs to another store, volume, partition or stream
                JournalError            the journal is missing, damaged, or belongs to another file
                DamagedPartitionError   a damaged partition file may hold what was asked for
            UnsupportedFileSystemError  the file system is a remote one, without the locks and syncs that are needed
        CorpusUsageError                the caller broke a rule of the interface
            AppendRefusedError          the records are malformed, or out of order
            StoreFailedError            the store failed before: abandon() it and open it again
        UnknownConsultationError        no partition file holds a consultation of that id

No message holds a payload.
"""

from __future__ import annotations

import re

#: what HDF5 gives as its reason, at the end of its text
_REASON = re.compile(r"\(([^()]+(?:\([^()]*\)[^()]*)*)\)\W*$")


class CorpusError(Exception):
    """Anything that this package raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class TransientCorpusError(CorpusError):
    """Raised when the same call may succeed later."""


class CorpusLockedError(TransientCorpusError):
    """Raised when another process holds the lock that the operation needs."""


class CorpusIOError(TransientCorpusError):
    """Raised when the system refuses a read, write or sync; what was committed before is safe."""


class PermanentCorpusError(CorpusError):
    """Raised when only an operator can help."""


class CorpusNotFoundError(PermanentCorpusError):
    """Raised when a directory, a partition file, or any partition file in a directory is missing."""


class CorpusExistsError(PermanentCorpusError):
    """Raised when a file would be created over an existing one."""


class ArchivedFileError(PermanentCorpusError):
    """Raised when an archive, a file that ``fiq repack`` made, is opened for writing."""


class CorpusFormatError(PermanentCorpusError):
    """Raised when a file's content does not follow the format."""


class IdentityMismatchError(CorpusFormatError):
    """Raised when a partition file is not the one that was expected.

    Attributes:
        field: the first field of the identity that differs.
        expected: the value that the caller asked for.
        found: the value that the file holds.
    """

    def __init__(self, message: str, *, field: str, expected: object, found: object) -> None:
        super().__init__(message)
        self.field = field
        self.expected = expected
        self.found = found


class JournalError(CorpusFormatError):
    """Raised when the journal of a partition file cannot be used; no part of it is skipped silently."""


class DamagedPartitionError(CorpusFormatError):
    """Raised when a consultation is in no partition file that can be read, and others of the corpus are damaged."""


class UnsupportedFileSystemError(PermanentCorpusError):
    """Raised when a corpus would live on a remote file system."""


class CorpusUsageError(CorpusError):
    """Raised when the caller breaks a rule of the interface."""


class AppendRefusedError(CorpusUsageError):
    """Raised when records to append are malformed or their sequences do not rise."""


class StoreFailedError(CorpusUsageError):
    """Raised by every call after a failure, until the store is abandoned and opened again."""


class DamagedPartitionWarning(UserWarning):
    """Warns that a corpus is read without a damaged partition file."""


class UnknownConsultationError(CorpusError, KeyError):
    """Raised when no partition file holds the consultation."""

    def __str__(self) -> str:
        return str(self.args[0])


def hdf5_says(error: BaseException) -> str:
    """Return what HDF5 or h5py found wrong with a file: its own reason, without the names of its functions."""
    text = str(error.args[0]) if error.args else ""
    reason = _REASON.search(text)
    return f"HDF5 cannot read it ({reason[1] if reason else text or type(error).__name__})"
