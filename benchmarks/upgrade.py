"""Benchmark of what clients see of a rolling restart of the deployment, against the time before it."""

from __future__ import annotations

import asyncio
import time

from benchmarks.bench import Bench
from benchmarks.plan import PEOPLE
from benchmarks.results import RESTARTED, UNDISTURBED, Upgrade, Upgrades, percentile
from tests.support.compose.clients import Client
from tests.support.compose.engine import build, missing, missing_image
from tests.support.compose.stack import IMAGE, Deployment, public_images


def upgrade(bench: Bench) -> Upgrades:
    """Start the deployment in containers and measure both phases; or say why there can be none."""
    reason = missing() or missing_image(public_images())
    if reason is not None:
        bench.tell(f"upgrade: not measured, {reason}")
        return Upgrades(missing=reason, phases=[])
    bench.tell("upgrade: starting the containers")
    build(IMAGE)
    deployment = Deployment(bench.folder / "upgrade", "bench")
    try:
        deployment.prepare()
        deployment.up()
        return Upgrades(missing="", phases=asyncio.run(_phases(bench, deployment)))
    finally:
        deployment.remove()


async def _phases(bench: Bench, deployment: Deployment) -> list[Upgrade]:
    bench.tell("upgrade: undisturbed")
    client, begun = Client(deployment.url, deployment.token), time.perf_counter()
    async with client.posting(PEOPLE):
        await asyncio.sleep(bench.plan.undisturbed)
    before = _phase(UNDISTURBED, client, time.perf_counter() - begun)
    bench.tell("upgrade: rolling restart")
    client, begun = Client(deployment.url, deployment.token), time.perf_counter()
    async with client.posting(PEOPLE):
        await asyncio.to_thread(deployment.rolling_restart, *bench.plan.restarted)
    return [before, _phase(RESTARTED, client, time.perf_counter() - begun)]


def _phase(name: str, client: Client, seconds: float) -> Upgrade:
    times = [1000 * value for value in client.seconds]
    return Upgrade(
        phase=name,
        clients=PEOPLE,
        seconds=seconds,
        p50_ms=percentile(times, 0.5),
        p95_ms=percentile(times, 0.95),
        p99_ms=percentile(times, 0.99),
        most_ms=max(times),
        events=len(times),
        retried=client.retried,
        failures=len(client.failed),
    )
