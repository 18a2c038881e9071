"""Every metric of the HTTP edge. ``docs/metrics.md`` documents each; a consultation's id is never a label."""

from __future__ import annotations

from functools import partial

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from services.ingest.problems import registry as problems
from services.log.metrics import LogMetrics

#: from a publish without fsync to the longest deadline, seconds
_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BYTES = (128, 256, 512, 1024, 2048, 4096, 16384, 65536, 262144, 1048576)
_EVENTS = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)

#: values of the label ``outcome``
STORED, DUPLICATE, FULL, UNAVAILABLE, IN_FLIGHT, LIMIT, REFUSED, REUSED, NOT_COMPARED = OUTCOMES = (
    "stored",
    "duplicate",
    "full",
    "unavailable",
    "duplicate_in_flight",
    "too_many_in_flight",
    "refused",
    "key_reused",
    "key_not_compared",
)
#: values of the label ``by``
MEMORY, LOG, CORPUS, NOBODY = CHECKERS = ("memory", "log", "corpus", "nobody")
#: values of the label ``reason``: no token, unknown or expired, lacks the scope, for other consultations, and a route
#: that does not state its scope (a bug)
MISSING, UNKNOWN, SCOPE, PREFIX, UNSTATED = ACCESS_REASONS = ("missing", "unknown", "scope", "prefix", "unstated")


class IngestMetrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.log = LogMetrics(registry)
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)

        # 4xx rise: see which problem, then which clients. 503: see the publishes below. 500: a bug; the log has a line
        # REQUEST_FAILED for each.
        self.requests = counter(
            "fi_ingest_requests_total",
            "Answers by status and problem (empty for 200 and 202), without the management listener's.",
            ["status", "problem"],
        )
        # p99 above 0.1 s while publishes are fast: this process lacks CPU, start another one. Else check the cluster's
        # disks: a publish waits for fsync on two of three nodes.
        self.duration = histogram(
            "fi_ingest_request_duration_seconds",
            "From a request's headers to its answer, for posted events, whatever the answer.",
            buckets=_SECONDS,
        )
        # Near FI_MAX_IN_FLIGHT: clients will soon get 429, unless most are only slow to send their bodies. Start
        # another ingest, or find out why publishes are slow.
        self.in_flight = gauge(
            "fi_ingest_requests_in_flight",
            "Posted requests that are being read or stored, and reads that are being answered.",
        )
        # Near FI_MAX_IN_FLIGHT_BYTES: clients will soon get 429. As above, or raise the limit if there is memory.
        self.bytes_in_flight = gauge(
            "fi_ingest_bytes_in_flight", "Bytes of bodies and of long headers that are being read or stored."
        )
        # Sizes near FI_MAX_EVENT_BYTES: a client will soon get 413; events should be small.
        self.body_size = histogram("fi_ingest_body_size_bytes", "Bodies of valid events.", buckets=_BYTES)
        # full: persisters do not keep up, or the log is not trimmed. unavailable: the stream has no leader or quorum.
        # refused: configuration or permission; the log has the reason. duplicate: see below.
        self.publishes = counter("fi_ingest_publishes_total", "Events handed to the log, by outcome.", ["outcome"])
        # Some are normal after failovers. Many: a client retries without need, or uses one key for several events.
        self.duplicates = counter("fi_ingest_duplicates_total", "Accepted events that were stored before.")
        # key_reused among the outcomes above: a client uses one key for several events. nobody: persisters are down or
        # slow, so old keys are not recognised; see fi_partition_owners.
        checks = counter(
            "fi_ingest_key_checks_total",
            "Clients' keys that were checked, by what the event was compared with.",
            ["by"],
        )
        self.key_checks = {checker: checks.labels(checker) for checker in CHECKERS}
        # any: clients or proxies do not read their answers; a smaller `limit` makes smaller pages
        self.answers_cut = counter(
            "fi_ingest_answers_cut_total",
            "Answers, other than followers' streams, that the client did not read within FI_ANSWER_TIMEOUT.",
        )
        # any: FI_MAX_CONNECTIONS is reached by clients without a token; see from where (`ss -tn`)
        self.connections_evicted = counter(
            "fi_ingest_connections_evicted_total",
            "Connections without any allowed request that were closed at FI_MAX_CONNECTIONS to make room.",
        )
        # Batches of few events: the client could send more at a time, which is faster.
        self.batch_events = histogram("fi_ingest_batch_events", "Events in each valid batch.", buckets=_EVENTS)
        # unknown or missing: a client lacks its new token, or an attack; ACCESS_REFUSED in the log says from where.
        # scope, prefix: a client does what its token does not allow.
        self.access = counter(
            "fi_ingest_access_refused_total", "Requests that were refused because of their token.", ["reason"]
        )
        # 1: the file has changed and is invalid; FILE_REFUSED in the log has the reason. Its former content stays in
        # force; a restart of the process would fail.
        self.token_file_broken = gauge(
            "fi_ingest_token_file_broken", "1 while FI_TOKEN_FILE is invalid and its former content is in force."
        )
        # two weeks before: renew it; no restart is needed
        self.certificate_expiry = gauge(
            "fi_ingest_certificate_expiry_timestamp_seconds",
            "Expiry of the certificate that clients see, Unix time; absent with plain HTTP.",
            ["name"],
        )
        # 1: the files have changed, and one is invalid or they do not belong together; as above
        self.certificate_broken = gauge(
            "fi_ingest_certificate_broken",
            "1 while FI_TLS_CERT and FI_TLS_KEY are invalid and their former content is in use.",
        )
        # near FI_MAX_BACKLOG: clients will soon get 503; see which partitions are behind (fi_partition_backlog_events)
        self.backlog = gauge(
            "fi_ingest_backlog_events", "Events that wait to be committed, as estimated each second; 0 while unknown."
        )
        # near FI_MAX_WINDOW_EVENTS: clients will soon get 503, or the nodes run out of memory
        self.window_events = gauge(
            "fi_ingest_window_events",
            "Events that the log stored within FI_DUPLICATE_WINDOW, by any process.",
        )
        self.drain_rate = gauge(
            "fi_ingest_drained_events_per_second",
            "Events that all persisters commit a second, as measured over some seconds; 0 while unknown.",
        )
        self.access_refused = {reason: self.access.labels(reason) for reason in ACCESS_REASONS}
        # higher than usual while publishes are fast: the persisters are busy, see fi_persister_question_seconds
        self.read_duration = histogram(
            "fi_ingest_read_duration_seconds",
            "From a request's headers to its answer, for reads other than followers, whatever the answer.",
            buckets=_SECONDS,
        )
        # Near FI_MAX_FOLLOWERS: clients will soon get 429.
        self.followers = gauge("fi_ingest_followers", "Clients that are following a consultation, or all of them.")
        self.followed_events = counter("fi_ingest_followed_events_total", "Events sent to followers.")
        # any: clients or proxies do not read; they come back with Last-Event-ID
        self.followers_dropped = counter(
            "fi_ingest_followers_dropped_total", "Followers that were disconnected because they were too slow."
        )
        self.outcomes = {outcome: self.publishes.labels(outcome) for outcome in OUTCOMES}
        self.accepted = self.requests.labels("202", "")
        self.refused = {problem: self.requests.labels(str(problem.status), problem.slug) for problem in problems()}


METRICS = web.AppKey("metrics", IngestMetrics)
