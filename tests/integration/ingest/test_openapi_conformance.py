"""The running stack conforms to its OpenAPI description: schemathesis draws the requests.

Three nodes, a persister and an ingest process with tokens. Following is refused here with a documented 429
(`FI_MAX_FOLLOWERS=0`), because schemathesis reads whole responses and these do not end; test_follow.py covers them.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.embedded.processes import Cluster
from services.core.tokens import Scope, Token, digest_of, render
from tests.support.persisters import PARTITIONS, Persister
from tests.support.service import Service

LONG = os.environ.get("FIQ_TORTURE") == "long"
#: drawn for each operation, besides those at the edges of each schema; and how long all may take, seconds
EXAMPLES, SECONDS = (500, 3000) if LONG else (30, 300)
SECRET = "described"
HELPERS = Path(__file__).parents[2] / "support" / "schemathesis"


def draw(url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Let schemathesis compare what is described at *url* with what is answered."""
    command = [str(Path(sys.executable).parent / "st"), "--config-file", str(HELPERS / "schemathesis.toml"), "run"]
    command += [f"{url}/openapi.json", "-H", f"Authorization: Bearer {SECRET}", "--max-examples", str(EXAMPLES)]
    command += ["--phases", "examples,coverage,fuzzing", "--no-color"]
    command += ["--request-timeout", "20", "--continue-on-failure", "--output-truncate", "false", "--workers", "1"]
    command += ["--generation-database", "none"] if LONG else ["--generation-deterministic", "--no-shrink"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.support.schemathesis.hooks"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.timeout(SECONDS + 60)
async def test_no_answer_contradicts_the_description(fresh_log: Cluster, tmp_path: Path) -> None:
    """No 5xx, no status, header, media type or body that is not described; what is invalid is refused."""
    (tmp_path / "tokens").write_text(render([Token("all", digest_of(SECRET), frozenset({Scope.ADMIN}))]))
    settings = {"FI_PORT": "0", "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "1MiB", "FI_MAX_FOLLOWERS": "0"}
    settings |= {"FI_LOG_URL": fresh_log.url, "FI_PARTITIONS": str(PARTITIONS)}
    settings["FI_TOKEN_FILE"] = str(tmp_path / "tokens")
    with (
        Persister(tmp_path / "persister", fresh_log, tmp_path / "data", FI_DEAD_MAX_BYTES="1MiB") as persister,
        Service(tmp_path, "services.ingest", **settings) as service,
    ):
        await persister.ready()
        port = (await asyncio.to_thread(service.wait_for, "INGEST_STARTED"))["port"]
        done = await asyncio.to_thread(draw, f"http://127.0.0.1:{port}", tmp_path)
        assert 0 == done.returncode, done.stdout[-20000:] + done.stderr[-2000:]
        assert [] == [line for line in service.lines if line["event"] == "REQUEST_FAILED"]
        accepted = [line for line in service.lines if line["event"] in ("EVENT_QUEUED", "BATCH_QUEUED")]
        assert len(accepted) >= EXAMPLES, done.stdout[-3000:]
