"""The HDF5 side of an open store: the file's handles, and what HDF5's errors mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import h5py
import numpy as np

from services.corpus.atomic_file import JournaledFile
from services.corpus.caches import CHUNK_SLOTS, bound_metadata
from services.corpus.errors import CorpusFormatError
from services.corpus.format import (
    BEGINS,
    COMMITTED,
    COMMITTED_CONFLICTS,
    COMMITTED_EVENTS,
    COMMITTED_ID,
    CONFLICTS,
    CONSULTATIONS,
    LIBVER,
    MESSAGE_ID_BYTES,
    read_identity,
)
from services.corpus.groups import OpenConsultations
from services.corpus.records import Identity, check_identity
from services.corpus.tails import ChunkedTail

#: consultations whose conflicts stay open: they are rare
_OPEN_CONFLICTS = 16


class OpenPartition:
    """A partition file open in HDF5 through its journaled file.

    Args:
        name: the file's name, for messages.
        journaled: the file object; not closed here.
        expected: the identity that the file must state; None accepts any.
        limit: how many consultations stay open.
        metadata_cache: limit of HDF5's metadata cache, in bytes of the file.

    Raises:
        CorpusFormatError: it is no partition file, or damaged.
        IdentityMismatchError: its identity is another.
        CorpusIOError: the system refused.
    """

    def __init__(
        self,
        name: str,
        journaled: JournaledFile,
        expected: Identity | None,
        *,
        limit: int,
        metadata_cache: int,
    ) -> None:
        with hdf5_errors(name, journaled):
            self._file = h5py.File(journaled, "r+", libver=LIBVER, rdcc_nslots=CHUNK_SLOTS)
        try:
            with hdf5_errors(name, journaled):
                bound_metadata(self._file, metadata_cache)
                self.identity = read_identity(self._file, name)
                if expected is not None:
                    check_identity(name, expected, self.identity)
                if self._file.attrs.get("journal") != str(journaled.uuid):
                    raise CorpusFormatError(f"{name}: its user block and its HDF5 content are of two files")
                self.begins = int(self._file.attrs[BEGINS])
                self.committed = int(self._file.attrs[COMMITTED])
                self.committed_id = bytes(self._file.attrs[COMMITTED_ID]).decode("ascii")
                counted = (COMMITTED, COMMITTED_ID, COMMITTED_EVENTS, COMMITTED_CONFLICTS)
                self._attributes = [h5py.h5a.open(self._file.id, name.encode()) for name in counted]
                self.consultations, self.conflicts = (
                    OpenConsultations(
                        self._file.id,
                        group,
                        partial(ChunkedTail, journaled),
                        self.identity,
                        events=int(self._file.attrs[counter]),
                        limit=most,
                    )
                    for group, counter, most in (
                        (CONSULTATIONS, COMMITTED_EVENTS, limit),
                        (CONFLICTS, COMMITTED_CONFLICTS, _OPEN_CONFLICTS),
                    )
                )
        except BaseException:
            journaled.discard()
            self._file.close()
            raise

    def place(self, store: str, volume: str, epoch: int) -> None:
        """Let the file say that it is *store*'s, and the one of the partition's placement *epoch* on *volume*."""
        for name, value in (("store", store), ("volume", volume)):
            if getattr(self.identity, name) != value:
                self._file.attrs[name] = value
        h5py.h5a.open(self._file.id, b"epoch").write(np.array(epoch, np.uint32))
        self.identity = replace(self.identity, store=store, volume=volume, epoch=epoch)

    def flush(self, sequence: int, message_id: str) -> None:
        """Hand everything to the journaled file, with *sequence* and the *message_id* there as what is reached."""
        values = (
            np.array(sequence, np.uint64),
            np.array(message_id.encode("ascii"), f"S{MESSAGE_ID_BYTES}"),
            np.array(self.consultations.events, np.uint64),
            np.array(self.conflicts.events, np.uint64),
        )
        for attribute, value in zip(self._attributes, values, strict=True):
            attribute.write(value)
        self._file.flush()

    def close(self) -> None:
        """Close every handle. HDF5 may want to write then: the journaled file must discard that."""
        self.consultations.clear()
        self.conflicts.clear()
        self._attributes.clear()
        try:
            self._file.close()
        except (OSError, RuntimeError, ValueError):
            # HDF5 could not read what it needs for writing what is dropped anyway
            return


@contextmanager
def hdf5_errors(name: str, journaled: JournaledFile) -> Iterator[None]:
    """Turn an error of h5py inside the block into the corpus's own.

    Raises:
        CorpusIOError: the journaled file failed underneath.
        CorpusFormatError: HDF5 does not accept the content.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise (journaled.failure or CorpusFormatError(f"{name}: HDF5: {error}")) from error
