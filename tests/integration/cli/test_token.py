"""`fiq token` while a service runs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.init.files import Layout
from services.cli.main import app
from services.ingest import service
from tests.support.ingest import running_edge
from tests.support.polling import eventually


def fiq(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A deployment."""
    assert 0 == fiq("init", tmp_path, "--owner", f"{os.geteuid()}:{os.getegid()}").exit_code
    return Layout(tmp_path)


async def test_a_running_service_follows(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """New and revoked tokens count without a restart; the others go on."""
    monkeypatch.setattr(service, "RELOAD_SECONDS", 0.02)
    async with running_edge(token_file=str(layout.tokens)) as edge:

        async def status(secret: str) -> int:
            return (await edge.post(Authorization=f"Bearer {secret}")).status

        async def gets(secret: str, wanted: int) -> None:
            async def got() -> bool:
                return await status(secret) == wanted

            await eventually(got)

        first = await asyncio.to_thread(layout.token("default").read_text)
        assert 202 == await status(first.strip())
        made = await asyncio.to_thread(fiq, "token", "new", "ward", "--deployment", layout.folder)
        await gets(made.stdout.strip(), 202)
        await asyncio.to_thread(fiq, "token", "revoke", "ward", "--deployment", layout.folder)
        await gets(made.stdout.strip(), 401)
        assert 202 == await status(first.strip())
