"""Which partition a consultation belongs to: the function that nats-server's ``partition()`` uses."""

from __future__ import annotations

_FNV_OFFSET = 0x811C9DC5
_FNV_PRIME = 0x01000193


def partition_of(consultation: str, partitions: int) -> int:
    """Return the partition, 0 to *partitions* - 1, of a consultation.

    FNV-1a of 32 bits over the token, modulo the number of partitions, as nats-server's subject mapping computes it
    (``server/subject_transform.go``, ``getHashPartition``).
    """
    digest = _FNV_OFFSET
    for byte in consultation.encode("ascii"):
        digest = (digest ^ byte) * _FNV_PRIME & 0xFFFFFFFF
    return digest % partitions


def partition_name(partition: int) -> str:
    """Return the two-digit name of a partition, as consumers and files carry it."""
    return f"{partition:02d}"
