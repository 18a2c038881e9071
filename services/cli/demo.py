"""``fiq demo``: the whole pipeline under load, kills in the middle, and the proof that nothing is missing.

:func:`generate` makes consultations, :class:`Load` posts them with several clients that repeat some posts and retry
until each event is accepted, :class:`Chaos` kills the stream's leader and a persister meanwhile and starts them again,
and :func:`compare` checks that every accepted event is in the corpus once, byte for byte and in stream order. The
acceptance tests use these parts too.
"""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from uuid import UUID

import orjson
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fiq.client import AsyncClient, RetryPolicy
from fiq.corpus import open_corpus
from fiq.words import count
from services.cli import console, monitoring
from services.cli.console import JsonOption
from services.cli.embedded.stack import LogKind, Stack
from services.cli.errors import CommandError
from services.log.protocol import EVENT_LOG

#: what was killed stays dead for this long, seconds
DOWN_SECONDS = 2.0
#: how long an election may take, seconds
LEADER_TIMEOUT = 30.0
#: shares of the load after which the leader and a persister are killed
_LEADER_AT, _PERSISTER_AT = 0.3, 0.6
#: what was accepted must be in HDF5 within this after the last post, seconds
_PERSIST_TIMEOUT = 60.0
#: limit of the demo's stream
_STREAM_BYTES = "256MiB"
_POLL = 0.25
#: problems that are printed; the rest is counted
_SHOWN = 10
#: an outage may take this long; the longest pause between two tries is short, so that the outage is measured
_RETRY = RetryPolicy(deadline=600.0, max_backoff=0.1)

_OPENINGS = ("What brings you in today?", "How have you been since the last visit?", "Where does it hurt?")
_QUESTIONS = ("Since when?", "Does it get worse at night?", "Any fever?", "Do you take anything for it?", "How strong?")
_ANSWERS = ("For about {n} days.", "No, I don't think so.", "Yes, mostly in the morning.", "{n} out of ten.", "A bit.")
_SUMMARY = "Symptoms for {n} days. Advised rest and a follow-up in {m} weeks."


def demo(
    events: Annotated[int, typer.Option(min=100, max=200_000, help="Events to post.")] = 4000,
    clients: Annotated[int, typer.Option(min=1, max=500, help="Clients that post at the same time.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the generated consultations and their order.")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="Where to put everything; a new temporary folder by default.")
    ] = None,
    log: Annotated[LogKind, typer.Option(help="The log: three NATS nodes, or ZeroMQ.")] = LogKind.NATS,
    json: JsonOption = False,
) -> None:
    """Post events while parts are killed, then verify HDF5.

    Runs an embedded three-node cluster, and kills the stream's leader and one persister with SIGKILL in the middle.
    With `--log zmq`, which has no nodes, it kills both persisters, one after the other. At the end every accepted event
    must be in HDF5 exactly once, byte for byte and in order; otherwise the exit code is 1. The corpus is kept.
    """
    home = _new_folder(folder)
    try:
        _run_demo(home, log, generate(events, seed=seed), clients, seed, json=json)
    except BaseException:
        typer.echo(f"the files stay in {home}", err=True)
        raise


def _new_folder(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="fiq-demo-"))
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{folder} is not empty: the demo starts with an empty corpus; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run_demo(
    home: Path, log: LogKind, consultations: list[list[Post]], clients: int, seed: int, *, json: bool
) -> None:
    none = dict.fromkeys(("FI_TOKEN_FILE", "FI_TLS_CERT", "FI_TLS_KEY"), "")
    settings = {"FI_STREAM_MAX_BYTES": _STREAM_BYTES, "FI_NEW_CONSULTATIONS_RATE": "0", **none}
    stack = Stack(home, log=log, env=settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops in the same order as Ctrl-C
    columns = SpinnerColumn(), TextColumn("{task.description:<11}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console.err()) as progress:
        try:
            starting = progress.add_task("starting", total=len(stack.parts))
            stack.start(lambda _: progress.update(starting, advance=1))
            load = Load(stack.ingest.url, clients=clients, seed=seed)
            result = asyncio.run(_measure(stack, consultations, load, progress))
        finally:
            stack.stop()
    _print_json(result, stack) if json else _print(result, stack)
    if result.comparison.problems:
        raise CommandError(
            "\n  ".join(
                ["the corpus differs from what was accepted:", *result.comparison.summary(), f"logs: {stack.logs}"]
            )
        )
    # the nodes' stores are not needed any more; corpus and logs stay
    shutil.rmtree(stack.cluster.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Result:
    load: LoadResult
    comparison: Comparison
    killed: list[str]
    duplicates: int
    load_seconds: float
    persist_seconds: float


async def _measure(stack: Stack, consultations: Sequence[Sequence[Post]], load: Load, progress: Progress) -> _Result:
    total = sum(len(posts) for posts in consultations)
    posting = progress.add_task("posting", total=total)
    chaos = Chaos(stack, on_event=lambda line: progress.console.print(f"  {line}"))
    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        group.create_task(_kill_both(chaos, load, total))
        group.create_task(_show(load, progress, posting))
        posted = await load.run(consultations)
    load_seconds = time.monotonic() - started
    await chaos.recovered()
    persisting = progress.add_task("persisting", total=total)
    started = time.monotonic()
    complete = await wait_until_persisted(
        stack.data_dir,
        total,
        timeout=_PERSIST_TIMEOUT,
        on_count=lambda count: progress.update(persisting, completed=min(count, total)),
    )
    persist_seconds = time.monotonic() - started
    checking = progress.add_task("verifying", total=1)
    comparison = await asyncio.to_thread(compare_corpus, stack.data_dir, posted.accepted.values())
    if not complete:
        comparison.problems.insert(0, f"not every event was persisted within {_PERSIST_TIMEOUT:g} s")
    progress.update(checking, advance=1)
    duplicates = await asyncio.to_thread(_duplicates_dropped, stack)
    return _Result(posted, comparison, chaos.killed, duplicates, load_seconds, persist_seconds)


async def _kill_both(chaos: Chaos, load: Load, total: int) -> None:
    """Kill the leader and then a persister, whether or not the leader is back by then.

    Without nodes the other persister is the first.
    """
    async with asyncio.TaskGroup() as group:
        await _reached(load, int(_LEADER_AT * total))
        group.create_task(chaos.kill_leader() if chaos.stack.cluster.size else chaos.kill_persister(1))
        await _reached(load, int(_PERSISTER_AT * total))
        group.create_task(chaos.kill_persister(0))


async def _reached(load: Load, count: int) -> None:
    while len(load.result.accepted) < count:  # noqa: ASYNC110 - thousands of events a second: no event for each
        await asyncio.sleep(0.01)


async def _show(load: Load, progress: Progress, task: TaskID) -> None:
    while not load.finished:
        progress.update(task, completed=len(load.result.accepted))
        await asyncio.sleep(0.1)
    progress.update(task, completed=len(load.result.accepted))


def _duplicates_dropped(stack: Stack) -> int:
    """Return how many duplicates the persisters dropped, from their metrics (a killed one's count is lost)."""
    count = 0.0
    for service in stack.persisters:
        _, body = monitoring.get(service.management_port, "/metrics")
        for family in text_string_to_metric_families(body.decode()):
            if family.name == "fi_persister_duplicates":
                count += sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
    return int(count)


def _print_json(result: _Result, stack: Stack) -> None:
    load, comparison = result.load, result.comparison
    document = {
        "killed": result.killed,
        "accepted": len(load.accepted),
        "repeated": load.repeated,
        "retries": load.retries,
        "answered_as_duplicates": load.duplicates,
        "dropped_as_duplicates": result.duplicates,
        "events": comparison.persisted,
        "consultations": comparison.consultations,
        "latency_p50_seconds": load.percentile(0.5),
        "latency_p99_seconds": load.percentile(0.99),
        "longest_gap_seconds": load.longest_gap,
        "load_seconds": result.load_seconds,
        "persist_seconds": result.persist_seconds,
        "problems": comparison.problems,
        "corpus": str(stack.data_dir),
    }
    typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))


def _print(result: _Result, stack: Stack) -> None:
    load, comparison = result.load, result.comparison
    table = console.table("what", ">value", title="fiq demo")
    rows = (
        ("killed with SIGKILL", ", ".join(result.killed)),
        ("events accepted (202)", str(len(load.accepted))),
        ("posts repeated on purpose", str(load.repeated)),
        ("retries after a failure", str(load.retries)),
        ("posts answered as duplicates", str(load.duplicates)),
        ("duplicates dropped by persisters", str(result.duplicates)),
        ("events in HDF5", f"{comparison.persisted} in {count(comparison.consultations, 'consultation')}"),
        ("latency p50 / p99", f"{load.percentile(0.5) * 1e3:.1f} / {load.percentile(0.99) * 1e3:.1f} ms"),
        ("longest time without a 202", f"{load.longest_gap:.1f} s"),
        ("posting, then persisting the rest", f"{result.load_seconds:.1f} s, {result.persist_seconds:.1f} s"),
        (
            "verdict",
            count(len(comparison.problems), "problem") if comparison.problems else "every event once, in order",
        ),
    )
    for row in rows:
        table.add_row(*row)
    console.show(table)
    out = console.out()
    out.print(f"\ncorpus: {stack.data_dir}", soft_wrap=True)
    out.print(f"read it: {sys.argv[0]} show demo-00000 --corpus {stack.data_dir}", soft_wrap=True)


# -- The consultations -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Post:
    """One request: its consultation, its idempotency key (a UUID, so also the event's id), and its JSON body."""

    consultation: str
    key: str
    body: bytes


def generate(events: int, *, seed: int, per_consultation: int = 10) -> list[list[Post]]:
    """Return consultations with *events* events in all, *per_consultation* on average; the same for the same *seed*."""
    chance = random.Random(seed)  # noqa: S311 - no secrets
    consultations: list[list[Post]] = []
    left = events
    while left > 0:
        count = min(left, chance.randint(2, 2 * per_consultation - 2))
        consultations.append(_consultation(f"demo-{len(consultations):05d}", count, chance))
        left -= count
    return consultations


def post(consultation: str, body: dict[str, object], chance: random.Random) -> Post:
    """Return the request that posts *body*, with a key drawn from *chance*."""
    return Post(consultation, str(UUID(int=chance.getrandbits(128), version=4)), orjson.dumps(body))


def _consultation(name: str, count: int, chance: random.Random) -> list[Post]:
    events: list[dict[str, object]] = [_message("Doctor", chance.choice(_OPENINGS))]
    while len(events) < count - 1:
        doctor = len(events) % 2 == 0
        text = chance.choice(_QUESTIONS if doctor else _ANSWERS).format(n=chance.randint(1, 9))
        events.append(_message("Doctor" if doctor else "Patient", text))
    summary = _SUMMARY.format(n=chance.randint(1, 9), m=chance.randint(1, 4))
    events.append({"event_type": "CONSULTATION_SUMMARIZED", "payload": {"text": summary}})
    return [post(name, event, chance) for event in events[:count]]


def _message(speaker: str, text: str) -> dict[str, object]:
    return {"event_type": "MESSAGE_RECEIVED", "payload": {"speaker": speaker, "text": text}}


# -- The load --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class AcceptedPost:
    """A post that got at least one 202, and the lowest sequence that an answer named."""

    post: Post
    sequence: int


@dataclass(slots=True)
class LoadResult:
    """What the clients saw.

    Attributes:
        accepted: by event id.
        repeated: posts that were sent again on purpose after their 202.
        duplicates: answers that said so.
        retries: requests that were sent again after a failure.
        seconds: latency of each 202, retries included.
        longest_gap: longest time without a 202 for any client, seconds.
    """

    accepted: dict[str, AcceptedPost] = field(default_factory=dict)
    repeated: int = 0
    duplicates: int = 0
    retries: int = 0
    seconds: list[float] = field(default_factory=list)
    longest_gap: float = 0.0

    def percentile(self, share: float) -> float:
        """Return the latency, seconds, that *share* (0 to 1) of the accepted posts did not exceed."""
        ordered = sorted(self.seconds)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


class Load:
    """Clients that post to one ingest.

    Args:
        url: of ingest.
        clients: how many post at the same time.
        repeats: share of posts that are sent a second time after they were accepted, 0 to 1.
        seed: of the order and of the repeats.
        token: of the API, if it requires one.
    """

    def __init__(self, url: str, *, clients: int = 20, repeats: float = 0.05, seed: int = 0, token: str = "") -> None:
        self._client = AsyncClient(url, token or None, retry=_RETRY, connections=clients)
        self._clients = clients
        self._repeats = repeats
        self._seed = seed
        self._last = 0.0
        self._allowed = math.inf
        self._more_allowed = asyncio.Event()
        self.result = LoadResult()
        self.finished = False

    def allow(self, events: float) -> None:
        """Pause the clients once *events* are accepted, until more are allowed. Without a call all are."""
        self._allowed = events
        self._more_allowed.set()
        self._more_allowed = asyncio.Event()

    async def run(self, consultations: Sequence[Sequence[Post]]) -> LoadResult:
        """Post everything; each consultation by one client, in order, mixed with that client's other consultations.

        Raises ClientError: the service refuses a valid event, or stays unavailable.
        """
        self._last = time.monotonic()
        async with self._client, asyncio.TaskGroup() as group:
            for index in range(self._clients):
                chance = random.Random(f"{self._seed}/{index}")  # noqa: S311 - no secrets
                group.create_task(self._post_all(consultations[index :: self._clients], chance))
        self.result.retries = self._client.retries
        self.finished = True
        return self.result

    async def _post_all(self, mine: Sequence[Sequence[Post]], chance: random.Random) -> None:
        waiting = [list(reversed(posts)) for posts in mine if posts]
        sent: list[Post] = []
        while waiting:
            chosen = chance.randrange(len(waiting))
            post = waiting[chosen].pop()
            if not waiting[chosen]:
                waiting.pop(chosen)
            while len(self.result.accepted) >= self._allowed:
                await self._more_allowed.wait()
            await self._post(post)
            sent.append(post)
            if chance.random() < self._repeats:
                self.result.repeated += 1
                await self._post(chance.choice(sent[-50:]))

    async def _post(self, post: Post) -> None:
        started = time.monotonic()
        answer = await self._client.post(post.consultation, post.body, post.key)
        now = time.monotonic()
        result = self.result
        result.longest_gap = max(result.longest_gap, now - self._last)
        self._last = now
        result.seconds.append(now - started)
        result.duplicates += answer.duplicate
        known = result.accepted.get(post.key)
        if known is None:
            result.accepted[post.key] = AcceptedPost(post, answer.sequence)
        else:
            known.sequence = min(known.sequence, answer.sequence)


# -- The comparison --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Comparison:
    """What is in the corpus, and how it differs from what clients were told; *problems* quote no payloads."""

    persisted: int = 0
    consultations: int = 0
    problems: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Return the first problems, and the number of the others."""
        more = len(self.problems) - _SHOWN
        return self.problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])


#: an event of the corpus: its id, its sequence, its body
Found = tuple[str, int, bytes]


async def wait_until_persisted(
    path: Path, events: int, *, timeout: float, on_count: Callable[[int], None] = lambda _: None
) -> bool:
    """Wait until the corpus at *path* holds *events* events; return False after *timeout* seconds.

    *on_count* is called with the number that it holds.
    """
    deadline = time.monotonic() + timeout
    while True:
        count = await asyncio.to_thread(_count, path)
        on_count(count)
        if count >= events or time.monotonic() >= deadline:
            return count >= events
        await asyncio.sleep(_POLL)


def _count(path: Path) -> int:
    with open_corpus(path, strict=True) as corpus:
        return sum(info.events for info in corpus.partitions)


def compare_corpus(path: Path, accepted: Iterable[AcceptedPost]) -> Comparison:
    """Compare the corpus at *path* with what clients were told. Raises CorpusError: the corpus cannot be read."""
    with open_corpus(path, strict=True) as corpus:
        found = (
            (name, [(str(event.event_id), event.sequence, event.raw) for event in corpus[name]])
            for name in sorted(corpus)
        )
        return compare(found, accepted)


def compare(found: Iterable[tuple[str, list[Found]]], accepted: Iterable[AcceptedPost]) -> Comparison:
    """Check that every accepted event is in *found* once, byte for byte, in stream order, and nothing else is.

    Args:
        found: the consultations of a corpus, each with its events in their order.
        accepted: what clients were told.
    """
    wanted: dict[str, dict[str, AcceptedPost]] = defaultdict(dict)
    for one in accepted:
        wanted[one.post.consultation][one.post.key] = one
    comparison = Comparison()
    for name, events in found:
        comparison.consultations += 1
        comparison.persisted += len(events)
        comparison.problems += _compare(name, events, wanted.pop(name, {}))
    comparison.problems += [f"{name}: not in the corpus" for name in sorted(wanted)]
    return comparison


def _compare(name: str, events: list[Found], wanted: dict[str, AcceptedPost]) -> list[str]:
    problems = []
    if len({key for key, _, _ in events}) != len(events):
        problems.append(f"{name}: an event is there twice")
    if [sequence for _, sequence, _ in events] != sorted({sequence for _, sequence, _ in events}):
        problems.append(f"{name}: events are not in stream order")
    for key, sequence, body in events:
        one = wanted.get(key)
        if one is None:
            problems.append(f"{name}: event {key} was never accepted")
        elif body != one.post.body:
            problems.append(f"{name}: event {key} has another body")
        elif sequence > one.sequence:  # an earlier attempt, whose answer was lost, may have brought it
            problems.append(f"{name}: event {key} has sequence {sequence}, but its client was told {one.sequence}")
    missing = wanted.keys() - {key for key, _, _ in events}
    return problems + [f"{name}: event {key} is missing" for key in sorted(missing)]


# -- The kills -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Chaos:
    """Kills parts of a stack and starts them again.

    Attributes:
        stack: the stack.
        on_event: called at each step with a line to print.
        killed: what was killed, in order.
    """

    stack: Stack
    on_event: Callable[[str], None] = lambda _: None
    killed: list[str] = field(default_factory=list)

    async def kill_leader(self) -> None:
        """Kill the node that leads the stream, and start it again after a while."""
        cluster = self.stack.cluster
        index = await asyncio.to_thread(cluster.wait_stream_leader, EVENT_LOG, timeout=LEADER_TIMEOUT)
        name = f"{cluster.names[index]}, the stream's leader"
        await asyncio.to_thread(cluster.kill, index)
        self._note(name)
        await asyncio.sleep(DOWN_SECONDS)
        await asyncio.to_thread(cluster.start_node, index)
        self.on_event(f"{cluster.names[index]} is started again")

    async def kill_persister(self, index: int) -> None:
        """Kill a persister, and start it again after a while; meanwhile another one takes its partitions."""
        service = self.stack.persisters[index]
        await asyncio.to_thread(service.process.kill)
        self._note(service.name)
        await asyncio.sleep(DOWN_SECONDS)
        await asyncio.to_thread(self.stack.restart, service)
        self.on_event(f"{service.name} is started again")

    async def recovered(self) -> None:
        """Wait until every node has caught up and every service is ready.

        Raises ChildFailedError: a process did not come back.
        """
        if self.stack.cluster.size:
            await asyncio.to_thread(self.stack.cluster.wait_ready)
        for service in self.stack.services:
            await asyncio.to_thread(self.stack.wait_ready, service)

    def _note(self, name: str) -> None:
        self.killed.append(name)
        self.on_event(f"kill -9 {name}")
