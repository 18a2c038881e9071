"""Whatever was not asked for is a difference; a change that could lose something is refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from services.log.errors import ProvisionError
from services.log.jetstream.stream import SETTINGS_FIELDS, bucket_config, changes, dead_stream_config, stream_config
from services.log.settings import LogSettings

MIB = 2**20
#: fields that nats-server 2.15.1 shows in an answer, at what it takes when nothing is asked for
_ADDED = {
    "max_consumers": -1,
    "compression": "none",
    "sealed": False,
    "deny_delete": False,
    "deny_purge": False,
    "allow_rollup_hdrs": False,
    "mirror_direct": False,
    "consumer_limits": {},
}


def _current(**different: Any) -> dict[str, Any]:
    """Return a configuration as the broker shows it, with its own additions."""
    config = {**stream_config(LogSettings(max_bytes=64 * MIB)), **_ADDED}
    config["metadata"] = {**config["metadata"], "_nats.ver": "2.15.1", "_nats.level": "5"}
    return {**config, **different}


def _wanted(**settings: Any) -> dict[str, Any]:
    return stream_config(LogSettings(**{"max_bytes": 64 * MIB, **settings}))


def test_a_stream_that_agrees_is_left_alone() -> None:
    """What the broker adds by itself is no difference."""
    assert changes(_wanted(), _current(), stored_bytes=0) == {}


def test_a_higher_limit_is_applied() -> None:
    """Raising is always safe."""
    assert changes(_wanted(max_bytes=65 * MIB), _current(), stored_bytes=64 * MIB) == {"max_bytes": 65 * MIB}


def test_more_replicas_are_applied() -> None:
    """An experiment can become a cluster."""
    assert changes(_wanted(), _current(num_replicas=1), stored_bytes=0) == {"num_replicas": 3}


@pytest.mark.parametrize(("stored", "limit"), [(0, 8 * MIB), (32 * MIB, 40 * MIB), (40 * MIB, 50 * MIB)])
def test_a_lower_limit_is_applied_where_it_leaves_room(stored: int, limit: int) -> None:
    """A quarter of what is stored, and at least 8 MiB, must stay free."""
    assert changes(_wanted(max_bytes=limit), _current(), stored_bytes=stored) == {"max_bytes": limit}


@pytest.mark.parametrize(("stored", "limit"), [(0, 8 * MIB - 1), (32 * MIB, 40 * MIB - 1), (40 * MIB, 50 * MIB - 1)])
def test_a_lower_limit_is_refused_where_events_could_be_dropped(stored: int, limit: int) -> None:
    """The message names the setting and the lowest value that it takes."""
    with pytest.raises(ProvisionError, match=f"FI_STREAM_MAX_BYTES to {limit + 1} or more"):
        changes(_wanted(max_bytes=limit), _current(), stored_bytes=stored)


def test_what_an_operator_changed_by_hand_is_put_right_when_that_is_safe() -> None:
    """A maximum age would let the broker delete events."""
    assert changes(_wanted(), _current(max_age=3600 * 10**9), stored_bytes=0) == {"max_age": 0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("republish", {"src": ">", "dest": "_INBOX_provisioner.>"}),
        ("sources", [{"name": "fi-dead"}]),
        ("mirror", {"name": "fi-dead"}),
        ("placement", {"cluster": "elsewhere"}),
        ("placement", {"tags": ["az:1"]}),
        ("compression", "s2"),
        ("max_consumers", 1),
        ("no_ack", True),
        ("deny_purge", True),
        ("allow_rollup_hdrs", True),
        ("allow_msg_ttl", True),
        ("discard_new_per_subject", True),
        ("consumer_limits", {"max_ack_pending": 1}),
        ("a_field_of_a_later_server", {"copy_to": "elsewhere"}),
    ],
)
def test_what_nobody_asked_for_must_go(field: str, value: object) -> None:
    """The user that provisions can have events copied or dropped with one of these; none follows a setting."""
    assert {field: None} == changes(_wanted(), _current(**{field: value}), stored_bytes=0)
    assert field not in SETTINGS_FIELDS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("subjects", ["fi.events.*", "elsewhere.>"]),
        ("subject_transform", None),
        ("retention", "interest"),
        ("max_age", 3600 * 10**9),
        ("max_msgs", 10),
        ("discard", "old"),
    ],
)
def test_what_loses_or_misfiles_events_is_changed_back(field: str, value: object) -> None:
    """To what the definition says."""
    assert {field: _wanted()[field]} == changes(_wanted(), _current(**{field: value}), stored_bytes=0)
    assert field not in SETTINGS_FIELDS


@pytest.mark.parametrize("definition", [dead_stream_config, bucket_config])
def test_the_other_streams_are_compared_like_the_events(definition: Callable[[LogSettings], dict[str, Any]]) -> None:
    """Dead letters hold bodies too, and the bucket says where partitions are."""
    wanted = definition(LogSettings())
    current = {**_ADDED, **wanted, "republish": {"src": ">", "dest": "x"}}
    assert {"republish": None} == changes(wanted, current, stored_bytes=0)
    assert {} == changes(wanted, {**_ADDED, **wanted}, stored_bytes=0)


def test_metadata_of_an_operator_is_kept() -> None:
    """Notes of others in the metadata are no difference."""
    current = _current()
    current["metadata"]["owner"] = "ward 3"

    assert changes(_wanted(), current, stored_bytes=0) == {}


@pytest.mark.parametrize(
    ("wanted", "current", "message"),
    [
        (_wanted(partitions=8), _current(), "Set FI_PARTITIONS=16"),
        (_wanted(replicas=1), _current(), "Set FI_REPLICAS=3"),
        (_wanted(), _current(metadata={}), "was not made by fiq"),
        (_wanted(), _current(metadata={"fi_format": "2", "fi_partitions": "16"}), "has format 2, this fiq knows 1"),
    ],
)
def test_a_stream_that_cannot_be_made_right_is_refused(
    wanted: dict[str, Any], current: dict[str, Any], message: str
) -> None:
    """Each refusal says what is wrong and what to do."""
    with pytest.raises(ProvisionError, match=message):
        changes(wanted, current, stored_bytes=0)
