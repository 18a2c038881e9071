"""Makes docs/benchmarks.md of a run's results."""

from __future__ import annotations

from pathlib import Path

from benchmarks import tables
from benchmarks.plan import BATCH_CLIENTS, BATCH_EVENTS
from benchmarks.results import AT_WORK, OLD_WAY, PLAIN_SERVICE, Results

#: clients of the line that the README quotes
README_CLIENTS = 20
#: what stands behind this line of an existing page is kept
KEPT_FROM = "<!-- Written by hand from here on: kept when the page is made again. -->"

_INTRODUCTION = """\
## How it was measured

Made by `{command}`
on {date} in {minutes:.1f} minutes. Nothing of it is asserted by a test.

| | |
| --- | --- |
{machine}

Everything ran on this one machine: the three nats-server nodes (`sync_interval: always`, three replicas), what is
measured, and the load, which is a process of its own. So the processor is what limits most rows, and a target is
charged for every process that its events pass through. What is compared is measured in the same run, in rounds that
take turns ({rounds} of them unless said otherwise); the median of the rounds counts.

The events: {data}.
"""

_AT_WORK = """\
## At work

Clients post one event at a time with a fresh `Idempotency-Key` each and send the next one when it is accepted, to 200
consultations in turn, for {seconds:g} seconds after a second of warm-up. Each round starts every target anew, with
its own nodes; the targets take turns, and {rounds} rounds' medians count.

- *at work*: the whole product as it comes: three nodes, one ingest, two persister processes, 16 partitions. The
  persisters run from before the first event until all are committed.
- *no persister*: the same without persisters, and without a limit of the backlog.
- *plain service*: what one would write in an afternoon (`benchmarks/plain_service.py`): an aiohttp handler with
  nats-py's `js.publish` and a message id, and two workers on one durable consumer, each with its own HDF5 file: fetch
  up to 500, append, flush, fsync, acknowledge each. Stream and consumer have three replicas. It keeps no order, finds
  no copy of an event later than the broker does, and its files do not survive a crash while they are written.
- *bare publish*: nats-py publishes to such a stream, all answers to one inbox, with as many events in flight as there
  are clients. No HTTP, no check, no file.
- *empty handler*: aiohttp on uvloop that reads the body and answers 202.
- *HDF5 in the request*: an aiohttp handler that appends with h5py, flushes and calls fsync before it answers.

*Age at commit* is the time from ingest's `received_ns` to the commit, fsync included, of each event that was received
in the measured time: when, is in the files; the commits are in the persisters' logs. *Lag* is how many events were
accepted and not committed when the last 202 came, *all committed after* how long the rest took from then on. *nodes*,
*ingest* and *persisters ms* are the processor time of all processes of a kind, by the events accepted, from the first
event until all are committed. *client ms* is what the load costs by itself: a client in a process of its own, which
sends prepared requests and reads only status and length of the answers. For the bare publish it includes nats-py.
*alone* is one client that pauses for 0.2 s between two events. What was accepted is compared with the persisters'
logs, their metrics and the files; a run in which they differ fails.
"""

_DRAIN = """\
## A backlog in all partitions

{backlog:,} events lie in 16 partitions before `python -m services.persister --workers N` starts with an empty volume.
Counted is the time from the processes' first request for events to the last commit, as their log says; the medians of
{drain_rounds} rounds, in turns.
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
## A backlog in one partition

As above, with one partition and one process. The events are interleaved such that 500 in a row touch the given number
of consultations; a consultation has 50 events in every row. *Bare pull* is nats-py with a consumer of one replica in
memory, large requests and rare acknowledgements, in one process, which throws the messages away. *Append + flush* is
high-level h5py, the group looked up by its name and a flush for each event, without fsync and without any network,
over the first events of the same sequence (how many stands beside it).
"""

_READS = """\
## Events a second read back

All events are persisted and read consultation by consultation (50 events each), one request after another. *Plain
corpus reader* is `fiq.corpus.open_corpus` in the measuring process, which opens the files for each round.
*Reader's pages* and *finds* ask the persister through NATS, as ingest does; *GET* goes through the ingest process as
well. In the case of one event an event a second is a request a second.
"""

_MEMORY = """\
## Resident memory

{backlog:,} events are posted through ingest into new nodes, then one persister process drains all 16 partitions. The
most that was seen in each phase, looked at ten times a second; 1 MB is 10^6 bytes.
"""

_SECTIONS = {
    "at_work": _AT_WORK,
    "batches": _BATCHES,
    "security": _SECURITY,
    "upgrade": _UPGRADE,
    "drain": _DRAIN,
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
    numbers = {
        "backlog": about["backlog"],
        "rounds": about["rounds"],
        "drain_rounds": about["drain_rounds"],
        "seconds": about["load_seconds"],
        "clients": BATCH_CLIENTS,
        "events": BATCH_EVENTS,
    }
    sections = [f"{_SECTIONS[key].format(**numbers)}\n{table}" for key, table in tables.all_tables(results)]
    first = 1 if "at_work" in results else 0
    return "\n".join(
        [
            "# Benchmarks\n",
            *(f"**Failed:** {what.partition(chr(10))[0]}\n" for what in about["failed"]),
            *sections[:first],
            introduction,
            "## Aims\n\n" + tables.verdicts(results),
            *sections[first:],
        ]
    )


def sentence(results: Results) -> str:
    """Return what the README says of a run: the line of 20 clients; empty when it was not measured."""
    rows = {row["target"]: row for row in results.get("at_work", []) if row["clients"] == README_CLIENTS}
    if AT_WORK not in rows:
        return ""
    ours = rows[AT_WORK]
    text = (
        f"At work, with {README_CLIENTS} clients: {ours['events_per_s']:,.0f} events/s, "
        f"p50 {ours['p50_ms']:.0f} ms, p99 {ours['p99_ms']:.0f} ms"
    )
    if ours["age_p50_ms"] is not None:
        text += f", in HDF5 after {ours['age_p50_ms']:,.0f} ms (p50)"
    others = [
        f"the {target} {rows[target]['events_per_s']:,.0f} events/s"
        for target in (PLAIN_SERVICE, OLD_WAY)
        if target in rows
    ]
    return f"{text}; in the same run {' and '.join(others)}." if others else f"{text}."


def write(results: Results, path: Path) -> None:
    """Write the page to *path*; what was written by hand behind the mark of an existing page stays."""
    kept = "\n"
    if path.exists():
        _, mark, by_hand = path.read_text(encoding="utf-8").partition(KEPT_FROM)
        kept = by_hand if mark else kept
    path.write_text(f"{render(results)}\n{KEPT_FROM}{kept}", encoding="utf-8")
