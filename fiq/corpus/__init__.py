"""The corpus: consultations' events in HDF5 files that survive any crash. Usable without the services.

Analysts::

    from fiq.corpus import open_corpus

    with open_corpus("corpus") as corpus:
        for event in corpus["2f6c…"]:
            print(event.sequence, event.event_type, event.payload)
"""

try:
    from fiq.corpus.consultation import Consultation, EventRecord, StoredRow
except ModuleNotFoundError as error:
    if error.name not in ("h5py", "numpy"):
        raise
    raise ModuleNotFoundError(
        f"the corpus needs {error.name}: run  pip install 'fiq[corpus]'", name=error.name
    ) from None
from fiq.corpus.errors import (
    AppendRefusedError,
    ArchivedFileError,
    CorpusError,
    CorpusExistsError,
    CorpusFormatError,
    CorpusIOError,
    CorpusLockedError,
    CorpusNotFoundError,
    CorpusUsageError,
    DamagedPartitionError,
    DamagedPartitionWarning,
    IdentityMismatchError,
    JournalError,
    PermanentCorpusError,
    StoreFailedError,
    TransientCorpusError,
    UnknownConsultationError,
    UnsupportedFileSystemError,
)
from fiq.corpus.format import Identity, Record
from fiq.corpus.ids import IdHashes, KnownIds, hashes_of
from fiq.corpus.reader import Corpus, DamagedPartition, PartitionInfo, open_corpus, write_index
from fiq.corpus.store import EventStore, Lookup, Recovered, StoreOptions, StoreStats, recover_partition
from fiq.corpus.tools.copy import Repacked, repack
from fiq.corpus.tools.verify import (
    Checked,
    CorpusProblem,
    PartitionReport,
    Progress,
    Report,
    verify_corpus,
    verify_slice,
)
from fiq.corpus.wal.storage import StorageIO

__all__ = [
    "AppendRefusedError",
    "ArchivedFileError",
    "Checked",
    "Consultation",
    "Corpus",
    "CorpusError",
    "CorpusExistsError",
    "CorpusFormatError",
    "CorpusIOError",
    "CorpusLockedError",
    "CorpusNotFoundError",
    "CorpusProblem",
    "CorpusUsageError",
    "DamagedPartition",
    "DamagedPartitionError",
    "DamagedPartitionWarning",
    "EventRecord",
    "EventStore",
    "IdHashes",
    "Identity",
    "IdentityMismatchError",
    "JournalError",
    "KnownIds",
    "Lookup",
    "PartitionInfo",
    "PartitionReport",
    "PermanentCorpusError",
    "Progress",
    "Record",
    "Recovered",
    "Repacked",
    "Report",
    "StorageIO",
    "StoreFailedError",
    "StoreOptions",
    "StoreStats",
    "StoredRow",
    "TransientCorpusError",
    "UnknownConsultationError",
    "UnsupportedFileSystemError",
    "hashes_of",
    "open_corpus",
    "recover_partition",
    "repack",
    "verify_corpus",
    "verify_slice",
    "write_index",
]
