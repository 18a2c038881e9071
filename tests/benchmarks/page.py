"""Makes docs/benchmarks.md of a run's results."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks import tables
from tests.benchmarks.plan import BATCH_CLIENTS, BATCH_EVENTS
from tests.benchmarks.results import Results

#: what stands behind this line of an existing page is kept
KEPT_FROM = "<!-- Written by hand from here on: kept when the page is made again. -->"

_INTRODUCTION = """\
# Benchmarks

Made by `{command}`
on {date} in {minutes:.1f} minutes. Nothing of it is asserted by a test.

| | |
| --- | --- |
{machine}

Everything ran on this one machine: the three nats-server nodes (`sync_interval: always`, three replicas), what is
measured, and the load, which is a process of its own. So the processor is what limits most rows, and a target is
charged for every process that its events pass through. What is compared is measured in the same run, in rounds that
take turns ({rounds} of them); the median of the rounds counts.

The events: {data}.
"""

_LATENCY = """\
## Latency of POST

Each client sends its next event when the last one is accepted. *Bare publish* is nats-py's `js.publish` with a
`Nats-Msg-Id`, from as many tasks over one connection to the node that ingest uses too. *HDF5 in the request* is how it
was before: an aiohttp handler that appends with high-level h5py, flushes and calls fsync before it answers. The HTTP
client sends prepared requests and reads only status and length of the answers.
"""

_THROUGHPUT = """\
## Events a second of POST

*Empty handler* is aiohttp on uvloop that parses the JSON and answers 202; it has both cores for itself and the client.
*Bare publish*, as above, shows how much the three nodes take one by one when no HTTP is in front of them. No persister
runs meanwhile.
"""

_BATCHES = """\
## Events a second in batches

{clients} clients, {events:,} events a batch, as NDJSON over HTTP under a key each, against atomic batches as nats-py
sends them: a publish for each message, a request for the last one. Both wait for the answer before the next batch.
"""

_SECURITY = """\
## What security costs

POST on the plain cluster and on one as `fiq init` makes it: TLS 1.3 between nodes and to clients, a user with nothing
but its subjects for each service. Both run side by side and take turns; HTTP itself is plain in both.
"""

_UPGRADE = """\
## What clients see of a rolling restart

The whole of `compose.yaml` in containers, and clients that post over its balancer, pause for some 50 ms between two
events, and send an event a second time, with the same key, a second after it was not accepted. First nothing happens;
then `rolling-restart` replaces the three nodes, the persisters and the ingests one after the other. An event's time is
that from its first attempt to its 202, the pause before a second attempt included; a failure is an event whose second
attempt failed, too.
"""

_PERSISTER = """\
## Events a second of the persister

{backlog:,} events lie in the stream before `python -m services.persister` starts with an empty volume; counted is the
time from its first request for events to its last commit, as its log tells. The events are interleaved such that 500 in
a row touch the given number of consultations; a consultation has 50 events in every row. The persister takes batches as
they come: their mean size and the consultations that they touch stand beside it. *Bare pull* is nats-py with a consumer
of the same kind, requests of the same size and acknowledgements as seldom, in one process, which throws the messages
away. *Append + flush* is high-level h5py, the group looked up by its name and a flush for each event, without fsync and
without any network, over the first events of the same sequence (how many stands beside it).
"""

_READS = """\
## Events a second read back

All events are persisted and read consultation by consultation (50 events each), one request after another. *Plain
corpus reader* is `services.corpus.open_corpus` in the measuring process, which opens the files for each round.
*Reader's pages* and *finds* ask the persister through NATS, as ingest does; *GET* goes through the ingest process as
well. In the case of one event an event a second is a request a second.
"""

_MEMORY = """\
## Resident memory

{backlog:,} events are posted through ingest into new nodes, then one persister process drains all 16 partitions. The
most that was seen in each phase, looked at ten times a second; 1 MB is 10^6 bytes.
"""

_SECTIONS = {
    "latency": _LATENCY,
    "throughput": _THROUGHPUT,
    "batches": _BATCHES.format(clients=BATCH_CLIENTS, events=BATCH_EVENTS),
    "security": _SECURITY,
    "upgrade": _UPGRADE,
    "persister": _PERSISTER,
    "reads": _READS,
    "memory": _MEMORY,
}


def render(results: Results) -> str:
    """Return the page, without what is written by hand."""
    about = results["about"]
    machine = "\n".join(f"| {key} | {value} |" for key, value in about["machine"].items())
    introduction = _INTRODUCTION.format(
        command=about["command"],
        date=about["date"],
        minutes=about["seconds"] / 60,
        machine=machine,
        rounds=about["rounds"],
        data=about["data"],
    )
    parts = [introduction, "## Aims\n\n" + tables.verdicts(results)]
    for key, table in tables.all_tables(results):
        parts += [_SECTIONS[key].format(backlog=about["backlog"]), table]
    return "\n".join(parts)


def write(results: Results, path: Path) -> None:
    """Write the page to *path*; what was written by hand behind the mark of an existing page stays."""
    kept = "\n"
    if path.exists():
        _, mark, by_hand = path.read_text(encoding="utf-8").partition(KEPT_FROM)
        kept = by_hand if mark else kept
    path.write_text(f"{render(results)}\n{KEPT_FROM}{kept}", encoding="utf-8")
