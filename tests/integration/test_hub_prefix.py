"""The Hub API under a path prefix (``/t/<tenant>``): HF_ENDPOINT with a path, three majors, and absolute links."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, Router

from helios.http.server import listen_tcp, make_server
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.xet_site import xet_parts

FILES = {
    "config.json": b"{}",
    "a/model.safetensors.txt": b"x" * 100_000,
    **{f"many/{n:03}": b"" for n in range(40)},
    "w.onnx": hashlib.shake_256(b"w").digest(1_500_000),
}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    root: Path = tmp_path_factory.mktemp("prefix")
    with contextlib.ExitStack() as stack:
        parts = stack.enter_context(xet_parts(root / "parts"))
        parts.publish("models/org/m", FILES)
        parts.now[0] = time.time()  # clients look at their own clock
        routes = parts.routes()
        app = Starlette(routes=[Mount("/t/{tenant}", app=Router(routes)), *routes])
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
    from huggingface_hub import constants
    constants.MAX_HTTP_DOWNLOAD_SIZE = 1_000_000  # what is larger comes over Xet, under the prefix too, or not at all
    found = tree(snapshot_download("org/m"))
    result = {
        "files": len(found),
        "weights": found["w.onnx"],
        "tree": len(list(api.list_repo_tree("org/m", recursive=True))),
        "text": len(HfFileSystem().cat_file("org/m/a/model.safetensors.txt")),
        "errors": [raised(hf_hub_download, "org/none", "x"), raised(hf_hub_download, "org/m", "nope")],
    }
    """
    result = run_client(version, script, endpoint, tmp_path)
    assert result["files"] == len(FILES)
    assert result["weights"] == hashlib.sha256(FILES["w.onnx"]).hexdigest()
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
