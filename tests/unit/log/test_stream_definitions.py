"""The definitions hold the guarantees: what the broker must never do by itself."""

from __future__ import annotations

from typing import Any

from services.log.jetstream.stream import bucket_config, cursor_config, dead_stream_config, stream_config
from services.log.settings import LogSettings


def test_the_broker_deletes_no_event_by_itself() -> None:
    """Full means refused, not the oldest one dropped; nothing grows too old; no subject is limited."""
    config = stream_config(LogSettings())

    kept = {key: config[key] for key in ("retention", "discard", "max_age", "max_msgs", "max_msgs_per_subject")}

    assert kept == {"retention": "limits", "discard": "new", "max_age": 0, "max_msgs": -1, "max_msgs_per_subject": -1}


def test_the_stream_is_on_disk_and_replicated_as_the_settings_say() -> None:
    """Replicas, limit and window come from the settings; the window is in nanoseconds."""
    config = stream_config(LogSettings(replicas=3, max_bytes=2**30, duplicate_window=0.25))

    assert (config["storage"], config["num_replicas"], config["max_bytes"]) == ("file", 3, 2**30)
    assert config["duplicate_window"] == 250_000_000


def test_the_partition_count_stands_in_transform_and_metadata() -> None:
    """The metadata is what a later start compares its setting with."""
    config = stream_config(LogSettings(partitions=8))

    assert config["subject_transform"]["dest"] == "fi.events.{{partition(8,1)}}.{{wildcard(1)}}"
    assert {"fi_format": "1", "fi_partitions": "8"}.items() <= config["metadata"].items()


def test_a_stream_says_when_the_nats_command_line_shall_call_it_critical() -> None:
    """`nats server check stream` expects no replicas unless the metadata names their number."""
    expected = {"enabled": "true", "peer-expect": "3", "peer-lag-critical": "1000", "peer-seen-critical": "10s"}
    assert expected == _monitored(stream_config(LogSettings(replicas=3)))
    assert expected == _monitored(bucket_config(LogSettings(replicas=3)))


def test_a_dead_letter_makes_the_nats_command_line_warn() -> None:
    """One subject a partition. The check inverts when the first limit is not below the second."""
    found = _monitored(dead_stream_config(LogSettings()))
    assert ("1", "1000") == (found["subjects-warn"], found["subjects-critical"])


def test_one_copy_expects_no_peers() -> None:
    """To the command line a stream with one replica is no cluster, and a number that is expected of it is an error."""
    assert {"enabled": "true"} == _monitored(stream_config(LogSettings(replicas=1)))


def test_a_cursor_says_when_it_is_behind() -> None:
    """`nats server check consumer`: what waits, what is unacknowledged, and what was delivered again."""
    limits = {"outstanding-ack-critical": "50000", "unprocessed-critical": "50000", "redelivery-critical": "1"}
    assert {"enabled": "true", **limits} == _monitored(cursor_config("main", 3, 1, 1))


def _monitored(config: dict[str, Any]) -> dict[str, str]:
    prefix = "io.nats.monitor."
    return {key.removeprefix(prefix): value for key, value in config["metadata"].items() if key.startswith(prefix)}


def test_dead_letters_are_as_safe_as_events() -> None:
    """Same storage, same replicas, nothing dropped; but a limit and subjects of their own."""
    settings = LogSettings(replicas=3, dead_max_bytes=2**20)
    config = dead_stream_config(settings)

    assert (config["name"], config["subjects"], config["max_bytes"]) == ("fi-dead", ["fi.dead.>"], 2**20)
    for key in ("storage", "num_replicas", "discard", "retention", "max_age", "duplicate_window"):
        assert config[key] == stream_config(settings)[key]


def test_a_cursor_is_acknowledged_by_the_batch_and_never_redelivers_by_timer() -> None:
    """Its owner makes another one when in doubt; a slow batch must not come back after younger events."""
    config = cursor_config("copy2", 3, 7, 42)

    assert (config["durable_name"], config["filter_subject"]) == ("fi-workers-copy2-03-7", "fi.events.3.*")
    assert (config["ack_policy"], config["max_deliver"]) == ("all", -1)
    assert (config["deliver_policy"], config["opt_start_seq"]) == ("by_start_sequence", 42)
    assert config["ack_wait"] == 600 * 10**9


def test_the_bucket_is_what_nats_kv_reads_and_as_safe_as_events() -> None:
    """`nats kv` goes by the stream's name and subjects; reads of all keys at once need direct gets."""
    settings = LogSettings(replicas=3)
    config = bucket_config(settings)

    assert ("KV_fi-partitions", ["$KV.fi-partitions.>"], 8) == (
        config["name"],
        config["subjects"],
        config["max_msgs_per_subject"],
    )
    assert all(config[key] for key in ("allow_direct", "allow_rollup_hdrs", "deny_delete"))
    for key in ("storage", "num_replicas", "discard", "retention", "max_age"):
        assert config[key] == stream_config(settings)[key]
