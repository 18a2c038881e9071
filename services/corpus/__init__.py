"""The corpus: consultations' events in HDF5 files that survive any crash. Usable without the services.

Analysts::

    from services.corpus import open_corpus

    with open_corpus("corpus") as corpus:
        for event in corpus["2f6c…"]:
            print(event.sequence, event.event_type, event.payload)
"""

from services.corpus.errors import (
    AppendRefusedError,
    ArchivedFileError,
    CorpusError,
    CorpusExistsError,
    CorpusFormatError,
    CorpusIOError,
    CorpusLockedError,
    CorpusNotFoundError,
    CorpusUsageError,
    IdentityMismatchError,
    JournalError,
    PermanentCorpusError,
    StoreFailedError,
    TransientCorpusError,
    UnknownConsultationError,
    UnsupportedFileSystemError,
)
from services.corpus.events import Consultation, EventRecord
from services.corpus.format import Identity, Record
from services.corpus.ids import IdHashes, KnownIds, Lookup, StoredConsultation, StoredRow, hashes_of
from services.corpus.reader import Corpus, PartitionInfo, open_corpus, write_index
from services.corpus.repack import Repacked, repack
from services.corpus.storage import StorageIO
from services.corpus.store import EventStore, Recovered, StoreOptions, StoreStats, recover_partition
from services.corpus.verify import PartitionReport, Problem, Progress, Report, verify_corpus

__all__ = [
    "AppendRefusedError",
    "ArchivedFileError",
    "Consultation",
    "Corpus",
    "CorpusError",
    "CorpusExistsError",
    "CorpusFormatError",
    "CorpusIOError",
    "CorpusLockedError",
    "CorpusNotFoundError",
    "CorpusUsageError",
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
    "Problem",
    "Progress",
    "Record",
    "Recovered",
    "Repacked",
    "Report",
    "StorageIO",
    "StoreFailedError",
    "StoreOptions",
    "StoreStats",
    "StoredConsultation",
    "StoredRow",
    "TransientCorpusError",
    "UnknownConsultationError",
    "UnsupportedFileSystemError",
    "hashes_of",
    "open_corpus",
    "recover_partition",
    "repack",
    "verify_corpus",
    "write_index",
]
