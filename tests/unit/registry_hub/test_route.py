"""The route of the Hub API: which handler, which tenant, and what is around an answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from helios.config import TenantSettings
from helios.names import RepoId
from registry.access import Tenants
from registry.hub.api import HubRoute
from registry.hub.reads import Reads
from tests.support.xet_site import xet_parts


def ask(app: Starlette, path: str, method: str = "GET") -> tuple[int, dict[str, str]]:
    """Status and headers of a request without a server."""
    sent: list[Any] = []
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
        "root_path": "", "scheme": "http", "server": ("host", 80),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


@pytest.fixture
def app(tmp_path: Path):
    with xet_parts(tmp_path) as parts:
        parts.publish("models/org/m", {"a": b"1"}, lay_out=False)
        parts.publish("models/old/m", {"a": b"1"}, lay_out=False)

        def notice(repo: RepoId, revision: str | None) -> str | None:
            return f"Deprecated; {repo.id}@{revision} is old: ü" if repo.org == "old" else None

        reads = Reads(parts.catalog, parts.mirror, parts.reader, parts.service(), parts.metrics, parts.addresses())
        tenants = Tenants({"acme": TenantSettings(owns=["org/*"])})
        yield Starlette(routes=[HubRoute(tenants, [reads.handlers()], notice)])


def test_a_notice_comes_with_every_answer_about_what_it_is_for(app):
    for path, revision in (
        ("/old/m/resolve/main/a", "main"), ("/api/models/old/m", None), ("/api/models/old/m/tree/main", "main"),
    ):  # fmt: skip
        status, headers = ask(app, path)
        assert (status, headers["x-hf-warning"]) == (200, f"Deprecated; old/m@{revision} is old: ?")
    assert "x-hf-warning" not in ask(app, "/t/acme/org/m/resolve/main/a")[1]
    assert "x-hf-warning" not in ask(app, "/api/models")[1]


def test_the_prefix_says_whose_call_it_is(app):
    assert ask(app, "/t/acme/api/models/org/m")[0] == 200
    assert ask(app, "/api/models/org/m")[0] == 404
    assert ask(app, "/t/other/api/models/org/m")[0] == 404
    assert ask(app, "/t/acme/api/models/org/m", "PATCH")[1]["allow"] == "GET, HEAD"
    assert ask(app, "/t/acme/nothing")[0] == 404
