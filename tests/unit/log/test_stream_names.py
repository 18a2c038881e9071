"""Names on the broker are part of the product: dashboards, runbooks and the `nats` CLI use them."""

from __future__ import annotations

import pytest

from services.log.jetstream import stream


def test_an_event_goes_to_the_subject_of_its_consultation() -> None:
    """Clients publish without a partition; the server adds it."""
    assert stream.subject_of("c-42_A") == "fi.events.c-42_A"


def test_a_consumer_filters_on_the_stored_form_of_its_partition() -> None:
    """The partition stands in the subject as a plain number."""
    assert stream.filter_subject(3) == "fi.events.3.*"


def test_a_cursor_is_named_after_its_store_its_partition_and_its_generation() -> None:
    """Names sort like the partitions do."""
    assert stream.cursor_name("main", 3, 12) == "fi-workers-main-03-12"
    assert stream.parse_cursor_name("fi-workers-main-03-12") == ("main", 3, 12)


@pytest.mark.parametrize("name", ["fi-workers-main-03", "fi-workers-main-03-0", "fi-workers-main-3-1", "mine"])
def test_another_name_is_no_cursor(name: str) -> None:
    """Cursors of other programs on the stream are left alone."""
    assert stream.parse_cursor_name(name) is None


def test_the_transform_hashes_the_consultation_alone() -> None:
    """The first wildcard is the consultation; nothing else may decide the partition."""
    expected = {"src": "fi.events.*", "dest": "fi.events.{{partition(16,1)}}.{{wildcard(1)}}"}

    assert stream.subject_transform(16) == expected


def test_a_dead_letter_belongs_to_the_dead_stream() -> None:
    """The publisher checks which stream answered."""
    assert stream.stream_of(stream.dead_subject(7)) == "fi-dead"
    assert stream.stream_of(stream.subject_of("dead")) == "fi-events"
