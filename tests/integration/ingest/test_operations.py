"""Who sees what operators see."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.core.tokens import Scope, Token, digest_of, render
from tests.support.ingest import Edge, running_edge

TOKENS = {
    "operator": Token("operator", digest_of("operator"), frozenset({Scope.OPS})),
    "admin": Token("admin", digest_of("admin"), frozenset({Scope.ADMIN})),
    "clinic": Token("clinic", digest_of("clinic"), frozenset({Scope.READ, Scope.WRITE})),
    "ward": Token("ward", digest_of("ward"), frozenset({Scope.ADMIN}), "ward-"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(render(TOKENS.values()))
    return path


async def get(edge: Edge, path: str, name: str) -> int:
    return (await edge.request("GET", path, headers={"Authorization": f"Bearer {name}"})).status


@pytest.mark.parametrize("path", ["/pipeline"])
async def test_an_operators_token_sees_the_pipeline_and_a_clinics_does_not(file: Path, path: str) -> None:
    """Nor does one for the consultations of a ward, whatever its scopes; and an operator reads no consultation."""
    async with running_edge(token_file=str(file)) as edge:
        assert {"operator": 200, "admin": 200, "clinic": 403, "ward": 403} == {
            name: await get(edge, path, name) for name in TOKENS
        }
        assert 403 == await get(edge, "/consultations/c-1/events", "operator")
        assert 403 == await get(edge, "/consultations", "operator")


async def test_without_tokens_everybody_sees_the_pipeline() -> None:
    """As with `fiq up`, on loopback; what is not known yet is null."""
    async with running_edge() as edge:
        reply = await edge.request("GET", "/pipeline")
        assert (200, "no-store") == (reply.status, reply.headers["Cache-Control"])
        assert (None, [], None) == tuple(reply.json[key] for key in ("seen_seconds", "nodes", "stream"))
