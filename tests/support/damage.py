"""Kinds of damage, done to a closed partition file with stock h5py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

Damage = Callable[[h5py.File], None]
#: the consultation that is damaged
VICTIM = "c-0003"


def damage(path: Path, how: Damage) -> None:
    """Open the file at *path* with stock h5py and damage it."""
    with h5py.File(path, "r+") as file:
        how(file)


def change_body(file: h5py.File) -> None:
    """Change one letter within the text of row 5."""
    events, payload = _datasets(file)
    row = events[5]
    place = int(row["offset"]) + int(row["length"]) - 5
    payload[place] = payload[place] ^ 1


def change_sequence(file: h5py.File) -> None:
    """Give row 5 the sequence of row 4."""
    _set(file, 5, "seq", file[f"consultations/{VICTIM}/events"][4]["seq"])


def change_time(file: h5py.File) -> None:
    """Move row 5 by a nanosecond."""
    _set(file, 5, "received_ns", file[f"consultations/{VICTIM}/events"][5]["received_ns"] + 1)


def change_written(file: h5py.File) -> None:
    """Say that row 5 was written a nanosecond later."""
    _set(file, 5, "written_ns", file[f"consultations/{VICTIM}/events"][5]["written_ns"] + 1)


def change_flags(file: h5py.File) -> None:
    """Set a flag of row 5."""
    _set(file, 5, "flags", 1)


def change_chain(file: h5py.File) -> None:
    """Replace the chain of row 5."""
    _set(file, 5, "chain", np.void(bytes(32)))


def duplicate_id(file: h5py.File) -> None:
    """Give row 7 the id of row 3."""
    _set(file, 7, "event_id", file[f"consultations/{VICTIM}/events"][3]["event_id"])


def remove_row(file: h5py.File) -> None:
    """Take row 5 out of the table, and leave its body."""
    events, _ = _datasets(file)
    rows = np.delete(events[:], 5)
    events.resize(rows.shape)
    events[:] = rows


def remove_event(file: h5py.File) -> None:
    """Take row 5 and its body out, and move what comes after it."""
    events, payload = _datasets(file)
    gone = events[5]
    start, length = int(gone["offset"]), int(gone["length"]) + 1
    rows, content = np.delete(events[:], 5), np.delete(payload[:], slice(start, start + length))
    rows["offset"][5:] -= np.uint64(length)
    events.resize(rows.shape)
    payload.resize(content.shape)
    events[:], payload[:] = rows, content


def swap_rows(file: h5py.File) -> None:
    """Exchange the rows 5 and 6."""
    events, _ = _datasets(file)
    rows = events[:]
    rows[[5, 6]] = rows[[6, 5]]
    events[:] = rows


def cut_payload(file: h5py.File) -> None:
    """Cut the payload in the middle of the last body."""
    _, payload = _datasets(file)
    payload.resize((payload.shape[0] - 10,))


def cut_rows(file: h5py.File) -> None:
    """Take the last row away, and leave its body."""
    events, _ = _datasets(file)
    events.resize((events.shape[0] - 1,))


def cut_events(file: h5py.File) -> None:
    """Take the last row away, and its body."""
    events, payload = _datasets(file)
    payload.resize((int(events[-1]["offset"]),))
    events.resize((events.shape[0] - 1,))


def remove_consultation(file: h5py.File) -> None:
    """Remove the whole consultation."""
    del file[f"consultations/{VICTIM}"]


def rename_consultation(file: h5py.File) -> None:
    """Put the consultation under another id."""
    file.move(f"consultations/{VICTIM}", "consultations/other")


def misname_consultation(file: h5py.File) -> None:
    """Add a group that no consultation can have."""
    file.create_group("consultations/no id")


def forget_name(file: h5py.File) -> None:
    """Leave the consultation out of the index of names."""
    file["names"][0] = file["names"][0].replace(f"{VICTIM}\n".encode(), b"")


def repeat_name(file: h5py.File) -> None:
    """List the consultation twice."""
    file["names"][0] += f"{VICTIM}\n".encode()


def cut_names(file: h5py.File) -> None:
    """Cut the index of names in the middle of a line."""
    file["names"][0] = file["names"][0][:-2]


def remove_payload(file: h5py.File) -> None:
    """Remove one dataset."""
    del file[f"consultations/{VICTIM}/payload"]


def retype_events(file: h5py.File) -> None:
    """Replace the table by one of other types."""
    group = file[f"consultations/{VICTIM}"]
    rows = group["events"][:]
    del group["events"]
    group["events"] = rows["seq"]


def flatten_group(file: h5py.File) -> None:
    """Put a dataset where the group was."""
    del file[f"consultations/{VICTIM}"]
    file[f"consultations/{VICTIM}"] = np.zeros(3)


def join_lines(file: h5py.File) -> None:
    """Put a space where the line feed of row 5 was."""
    events, payload = _datasets(file)
    payload[int(events[6]["offset"]) - 1] = ord(" ")


def lower_committed(file: h5py.File) -> None:
    """Say that less was committed."""
    file.attrs["committed_sequence"] = np.uint64(100)


def drop_attribute(file: h5py.File) -> None:
    """Remove one attribute of the root."""
    del file.attrs["stream"]


def restate(field: str, value: str | int) -> Damage:
    """Return what changes one field of the identity."""

    def change(file: h5py.File) -> None:
        file.attrs[field] = value if isinstance(value, str) else np.uint32(value)

    return change


def _datasets(file: h5py.File) -> tuple[h5py.Dataset, h5py.Dataset]:
    group = file[f"consultations/{VICTIM}"]
    return group["events"], group["payload"]


def _set(file: h5py.File, row: int, field: str, value: object) -> None:
    events, _ = _datasets(file)
    changed = events[row]
    changed[field] = value
    events[row] = changed
