"""Two real registries: what one holds comes to the other, by a peer's address or in a file."""

import contextlib
import json
import os
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from helios.errors import NotFound
from helios.names import RepoId
from tests.support.ingest import seeded
from tests.support.mounts import write
from tests.support.registry import running_registry

MIB = 1 << 20
BASE = {"model.bin": seeded(40 * MIB, 1), "config.json": b"{}"}
REPO = RepoId.parse("org/m")


@pytest.fixture
def pair(helios, tmp_path, helios_home):
    """(core, edge): the edge knows the core as its peer."""
    with contextlib.ExitStack() as stack:
        core = stack.enter_context(running_registry(Other(helios, tmp_path / "core")))
        peers = json.dumps([{"name": "core", "url": core.url, "repos": ["org/*"], "history": True}])
        edge = stack.enter_context(running_registry(Other(helios, tmp_path / "edge", HELIOS_REGISTRY__PEERS=peers)))
        yield core, edge


class Other:
    """The ``helios`` command in a home of its own."""

    def __init__(self, helios, home, **environ):
        self._helios, self._environ = helios, {"HELIOS_HOME": str(home), **environ}

    def start(self, *args, **options):
        return self._helios.start(*args, env=self._environ, **options)


@pytest.fixture
def push(helios, tmp_path):
    def run(registry, name, files, ref="main"):
        directory = tmp_path / f"push-{threading.get_ident()}-{len(os.listdir(tmp_path))}"
        return helios("push", write(directory, files), f"{name}@{ref}", "--registry", registry.url).out.strip()

    return run


def replicate(helios, edge, *args, code=0):
    return json.loads(helios("replicate", "core", *args, "--registry", edge.url, "--json", code=code).out)


def read(registry, path, repo="org/m", rev="main"):
    with contextlib.closing(registry.client()) as client:
        return client.http.bytes("GET", f"/{repo}/resolve/{rev}/{path}")


def refs(registry, repo=REPO):
    with contextlib.closing(registry.client()) as client:
        return client.refs(repo)


def test_only_what_is_missing_travels_and_refs_follow(helios, pair, push):
    core, edge = pair
    first = push(core, "org/m", BASE)
    push(core, "other/m", {"a": b"1"})
    done = replicate(helios, edge)
    assert (done["commits"], done["refs"], done["travelled_bytes"], done["problems"]) == (1, 1, 40 * MIB + 2, [])
    assert refs(edge) == {"main": first}
    assert read(edge, "model.bin") == BASE["model.bin"]
    with pytest.raises(NotFound):
        refs(edge, RepoId.parse("other/m"))

    changed = BASE["model.bin"][: 20 * MIB] + seeded(4 * MIB, 2) + BASE["model.bin"][24 * MIB :]
    second = push(core, "org/m", {**BASE, "model.bin": changed})
    push(core, "org/m", {"model.bin": changed}, ref="slim")
    done = replicate(helios, edge)
    assert (done["commits"], done["travelled_bytes"]) == (2, 4 * MIB)
    assert refs(edge)["main"] == second
    assert read(edge, "model.bin", rev="slim") == changed
    assert replicate(helios, edge)["commits"] == 0


def test_a_ref_that_somebody_moved_here_stays(helios, pair, push):
    core, edge = pair
    push(core, "org/m", {"a": b"1"})
    replicate(helios, edge)
    mine = push(edge, "org/m", {"a": b"mine"})
    push(core, "org/m", {"a": b"2"})
    push(core, "org/n", {"a": b"3"})
    done = replicate(helios, edge, code=1)
    assert ["stays there" in problem for problem in done["problems"]] == [True]
    assert refs(edge)["main"] == mine
    assert read(edge, "a", repo="org/n") == b"3"


def test_a_force_push_at_the_peer_is_followed_where_nobody_else_moved_the_ref(helios, pair, push):
    core, edge = pair
    push(core, "org/m", {"a": b"1"})
    replicate(helios, edge)
    with contextlib.closing(core.client()) as client:
        client.delete(REPO)
    other = push(core, "org/m", {"a": b"unrelated"})
    assert replicate(helios, edge)["problems"] == []
    assert refs(edge)["main"] == other


def test_a_peer_that_is_not_configured_or_not_there(helios, pair):
    core, edge = pair
    result = helios("replicate", "nobody", "--registry", edge.url, code=1)
    assert "names no peer 'nobody'" in result.err
    core.kill()
    result = helios("replicate", "core", "--registry", edge.url, code=1)
    assert "can't be reached" in result.err or "connect" in result.err


def test_a_bundle_carries_commits_through_a_file(helios, pair, push, tmp_path):
    core, edge = pair
    first = push(core, "org/m", BASE)
    file = tmp_path / "m.tar"
    told = json.loads(helios("bundle", "export", file, "org/m", "--registry", core.url, "--json").out)
    assert told["bytes"] == file.stat().st_size > 40 * MIB
    assert helios("bundle", "import", file, "--registry", edge.url).out == f"org/m@{first}\n"
    assert read(edge, "model.bin") == BASE["model.bin"]
    assert refs(edge) == {"main": first}

    push(core, "org/m", {**BASE, "new.json": b"[]"})
    helios("bundle", "export", file, "org/m", "--have", f"org/m@{first}", "--registry", core.url)
    assert file.stat().st_size < MIB
    told = json.loads(helios("bundle", "import", file, "--registry", edge.url, "--json").out)
    assert told["new_bytes"] == 2
    assert read(edge, "new.json") == b"[]"


def test_a_bundle_of_what_there_is_not_leaves_no_file(helios, pair, tmp_path):
    core, edge = pair
    result = helios("bundle", "export", tmp_path / "m.tar", "org/none", "--registry", core.url, code=1)
    assert "org/none" in result.err
    assert not list(tmp_path.glob("*m.tar*"))
    (tmp_path / "bad.tar").write_bytes(b"x" * 10_000)
    result = helios("bundle", "import", tmp_path / "bad.tar", "--registry", edge.url, code=1)
    assert "bundle" in result.err


def test_a_bundle_that_stalls_does_not_keep_the_registry_from_stopping(helios, helios_home):
    """It ends as an upload of the Hub's clients does: ``running_registry`` waits no more than 15 s."""
    with running_registry(helios) as registry:
        parts = urlsplit(registry.url)
        sock = socket.create_connection((parts.hostname, parts.port), 10)
        sock.sendall(b"POST /api/v1/bundles HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\nhelios-bundle")
        time.sleep(0.5)
    with sock:
        assert b" 503 " in sock.recv(1000)
