"""The route of the Hub API: which handler, which tenant, and what is around an answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import Response

from helios.config import TenantSettings
from helios.errors import Unavailable
from helios.metrics import RegistryMetrics
from helios.names import RepoId
from registry.access import Tenants
from registry.app import Boundary
from registry.hub.api import HubRoute
from registry.hub.asked import Asked
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


GRANT = "9cZzTellNobody_-0"
PUSH = "5f" * 16


def test_an_upload_that_fails_leaves_its_address_in_no_log(caplog):
    """The address is the permission: whoever reads the log must not be able to go on with the upload."""
    where = f"/org/m.git/info/lfs/objects/part.{GRANT}"

    async def broken(_asked: Asked) -> Response:
        raise Unavailable(f"http://10.0.0.2:8470 did not answer PUT {where} in time")

    app = Starlette(routes=[HubRoute(Tenants({}), [{"lfs-object": {"PUT": broken}, "lfs": {"POST": broken}}])])
    assert ask(app, where, "PUT")[0] == 503
    assert ask(app, "/org/m.git/info/lfs/objects/batch", "POST")[0] == 503
    first, second = caplog.records
    assert GRANT not in repr(vars(first))
    assert (first.path, second.path) == ("/org/m.git/info/lfs/objects/***", "/org/m.git/info/lfs/objects/batch")


def test_a_push_that_breaks_the_registry_leaves_its_number_in_no_log(caplog, expected_log_errors):
    expected_log_errors("a request broke the registry")

    async def broken(_scope: Any, _receive: Any, _send: Any) -> None:
        raise ZeroDivisionError

    assert ask(Boundary(broken, RegistryMetrics()), f"/api/v1/pushes/{PUSH}/commit", "POST")[0] == 500
    (record,) = caplog.records
    assert record.path == "/api/v1/pushes/***/commit"
    assert PUSH not in repr(vars(record))
