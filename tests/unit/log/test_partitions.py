"""The partition function is fixed for ever: it decides in which file a consultation lives."""

from __future__ import annotations

import pytest

from services.log.partitions import partition_name, partition_of


@pytest.mark.parametrize(
    ("consultation", "digest"),
    # test vectors of the FNV authors for the 32-bit FNV-1a
    [("", 0x811C9DC5), ("a", 0xE40C292C), ("b", 0xE70C2DE5), ("foobar", 0xBF9CF968)],
)
def test_the_hash_is_the_32_bit_fnv_1a(consultation: str, digest: int) -> None:
    """nats-server's ``partition()`` uses it; the integration test compares with a real server."""
    assert partition_of(consultation, 2**32) == digest


@pytest.mark.parametrize(("partitions", "expected"), [(1, 0), (2, 0), (16, 8), (100, 20)])
def test_the_partition_is_the_hash_modulo_the_count(partitions: int, expected: int) -> None:
    """``foobar`` hashes to 0xBF9CF968."""
    assert partition_of("foobar", partitions) == expected


def test_partitions_are_named_with_two_digits() -> None:
    """Files and consumers sort like the partitions do."""
    assert [partition_name(0), partition_name(99)] == ["00", "99"]
