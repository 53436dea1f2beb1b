"""The Hub API under a path prefix (``/t/<tenant>``): HF_ENDPOINT with a path, three majors, and absolute links."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import urllib.request
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, Router

from helios.http.server import listen_tcp, make_server
from helios.metrics import RegistryMetrics
from helios.names import RepoId
from heliosfs.store.directory import DirectoryStore
from registry.catalog import Catalog
from registry.hub.api import HubRoute
from registry.hub.verified import VerifiedReader
from registry.ingest.ingest import Ingest
from registry.ingest.reader import FileSource
from registry.metadata.database import Database
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.mirrors import make_mirror

FILES = {"config.json": b"{}", "a/model.safetensors.txt": b"x" * 100_000, **{f"many/{n:03}": b"" for n in range(40)}}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    root: Path = tmp_path_factory.mktemp("prefix")
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(DirectoryStore(root / "store")))
        database = stack.enter_context(contextlib.closing(Database.sqlite(root / "metadata.db")))
        catalog, metrics = Catalog(database, store), RegistryMetrics()
        ingest, entries = Ingest(store, catalog.index), {}
        for path, data in FILES.items():
            (root / "file").write_bytes(data)
            with FileSource(root / "file") as source:
                entries[path] = ingest.ingest(path, len(data), source).entry
        catalog.publish(RepoId.parse("org/m"), "main", entries, author="me", message="first")
        reader = stack.enter_context(contextlib.closing(VerifiedReader(store, metrics.verify_failures.inc)))
        hub = HubRoute(catalog, reader, make_mirror(stack, catalog, root), metrics)
        app = Starlette(routes=[Mount("/t/{tenant}", app=Router([hub])), hub])
        sock = stack.enter_context(contextlib.closing(listen_tcp("127.0.0.1", 0)))
        server = make_server(app)
        server.capture_signals = contextlib.nullcontext  # not the main thread
        thread = threading.Thread(target=asyncio.run, args=(server.serve(sockets=[sock]),))
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/t/acme"
        server.stop()
        thread.join(20)


@pytest.mark.parametrize("version", VERSIONS)
def test_clients_work_under_a_prefix(endpoint, version, tmp_path):
    script = """
    result = {
        "files": len(tree(snapshot_download("org/m"))),
        "tree": len(list(api.list_repo_tree("org/m", recursive=True))),
        "text": len(HfFileSystem().cat_file("org/m/a/model.safetensors.txt")),
        "errors": [raised(hf_hub_download, "org/none", "x"), raised(hf_hub_download, "org/m", "nope")],
    }
    """
    result = run_client(version, script, endpoint, tmp_path)
    assert result["files"] == len(FILES)
    assert result["tree"] == len(FILES) + 2
    assert result["text"] == 100_000
    assert "RepositoryNotFoundError" in result["errors"][0]
    assert "EntryNotFoundError" in result["errors"][1]


@pytest.mark.parametrize("prefix", [True, False])
def test_links_keep_the_prefix(endpoint, prefix):
    base = endpoint if prefix else endpoint.removesuffix("/t/acme")
    url, seen = f"{base}/api/models/org/m/tree/main?recursive=true&limit=10", []
    while url:
        with urllib.request.urlopen(url) as answer:
            seen += [item["path"] for item in json.load(answer)]
            link = answer.headers["link"]
        url = link and link[1:].split(">")[0]
        assert url is None or url.startswith(f"{base}/api/")
    assert seen == sorted({*FILES, "a", "many"})
