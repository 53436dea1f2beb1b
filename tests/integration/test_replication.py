"""Two real registries: what one holds comes to the other, by a peer's address or in a file."""

import contextlib
import json
import os
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from helios.errors import Conflict, NotFound
from helios.names import RepoId
from tests.support.ingest import seeded
from tests.support.mounts import write
from tests.support.registry import running_registry

pytestmark = pytest.mark.both_databases

MIB = 1 << 20
BASE = {"model.bin": seeded(40 * MIB, 1), "config.json": b"{}"}
REPO = RepoId.parse("org/m")


@pytest.fixture
def pair(helios, tmp_path, helios_home, databases):
    """(core, edge): the edge knows the core as its peer."""
    with contextlib.ExitStack() as stack:
        core = stack.enter_context(running_registry(Other(helios, tmp_path / "core", **databases())))
        peers = json.dumps([{"name": "core", "url": core.url, "repos": ["org/*"], "history": True}])
        settings = {"HELIOS_REGISTRY__PEERS": peers, **databases()}
        edge = stack.enter_context(running_registry(Other(helios, tmp_path / "edge", **settings)))
        yield core, edge


class Other:
    """The ``helios`` command in a home of its own."""

    def __init__(self, helios, home, **environ):
        self.home = home
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


def follow(edge):
    """A replication, without a command of its own; how it ended."""
    with contextlib.closing(edge.client()) as client:
        return list(client.replicate("core", None, timeout_s=60))[-1]


def set_ref(registry, ref, commit, kind="branch"):
    with contextlib.closing(registry.client()) as client:
        client.set_ref(REPO, ref, commit, client.refs(REPO).get(ref), author="me", kind=kind)


def remove_ref(registry, ref):
    with contextlib.closing(registry.client()) as client:
        client.delete(REPO, ref)


def notice(registry, state, message, commit=None, use=None):
    """Put a notice up, or take it down (``state`` None)."""
    with contextlib.closing(registry.client()) as client:
        if state is None:
            client.remove_notice(REPO, commit)
        else:
            client.put_notice(REPO, commit, state, message, replacement=use, author="me")


def kinds(registry, repo="org/m"):
    with contextlib.closing(registry.client()) as client:
        return client.http.json("GET", "/api/v1/refs", params={"repo": f"models/{repo}"})["kinds"]


def status(registry, path):
    with contextlib.closing(registry.client()) as client, client.http.request("GET", path) as answer:
        answer.read()
        return answer.status, answer.headers.get("x-hf-warning") or answer.headers.get("x-error-message")


def test_tags_and_aliases_stay_what_they_are(pair, push):
    core, edge = pair
    first = push(core, "org/m", {"a": b"1"})
    set_ref(core, "v1", first, "tag")
    set_ref(core, "champion", first, "alias")
    follow(edge)
    assert refs(edge) == {"main": first, "v1": first, "champion": first}
    assert kinds(edge) == {"v1": "tag", "champion": "alias"}
    second = push(core, "org/m", {"a": b"2"})
    set_ref(core, "champion", second)
    assert follow(edge)["problems"] == []
    assert refs(edge) == {"main": second, "v1": first, "champion": second}
    with pytest.raises(Conflict, match="tags don't move"):
        set_ref(edge, "v1", second)
    # A tag that was made anew there, elsewhere, is no tag that moved.
    remove_ref(core, "v1")
    set_ref(core, "v1", second, "tag")
    assert ["tags don't move" in problem for problem in follow(edge)["problems"]] == [True]
    assert refs(edge)["v1"] == first


def test_a_ref_that_was_set_back_here_stays_until_it_is_where_it_was(helios, pair, push):
    core, edge = pair
    first = push(core, "org/m", {"a": b"1"})
    follow(edge)
    second = push(core, "org/m", {"a": b"2"})
    set_ref(core, "champion", second, "alias")
    follow(edge)
    for ref in ("main", "champion"):
        set_ref(edge, ref, first)
    done = replicate(helios, edge, code=1)
    assert len(done["problems"]) == 2
    assert all(f"somebody moved the ref here, to {first}" in problem for problem in done["problems"])
    third = push(core, "org/m", {"a": b"3"})
    assert len(follow(edge)["problems"]) == 2
    assert refs(edge) == {"main": first, "champion": first}
    assert read(edge, "a") == b"1"

    set_ref(edge, "main", second)
    remove_ref(edge, "champion")
    assert follow(edge)["problems"] == []
    assert refs(edge) == {"main": third, "champion": second}


def test_what_a_bundle_brought_and_somebody_set_back_stays(helios, pair, push, tmp_path):
    core, edge = pair
    first = push(core, "org/m", {"a": b"1"})
    push(core, "org/m", {"a": b"2"})
    helios("bundle", "export", tmp_path / "b", "org/m", f"org/m@{first}", "--registry", core.url)
    helios("bundle", "import", tmp_path / "b", "--registry", edge.url)
    set_ref(edge, "main", first)
    push(core, "org/m", {"a": b"3"})
    assert ["set the ref back" in problem for problem in follow(edge)["problems"]] == [True]
    assert refs(edge)["main"] == first


def test_what_is_deprecated_and_retired_at_the_core_is_so_at_the_edge(pair, push):
    core, edge = pair
    first = push(core, "org/m", {"a": b"1"})
    second = push(core, "org/m", {"a": b"2"})
    notice(core, "deprecated", "old", use="org/new")
    notice(core, "deprecated", "leaks", first)
    assert follow(edge)["notices"] == 2, "of a commit that comes with it, too"
    assert status(edge, "/org/m/resolve/main/a") == (200, "deprecated; org/m is deprecated: old; use org/new")
    assert "leaks" in status(edge, f"/org/m/resolve/{first}/a")[1]
    notice(core, "retired", "leaks", first)
    notice(core, None, "")
    assert follow(edge)["notices"] == 2
    assert status(edge, f"/org/m/resolve/{first}/a") == (410, f"org/m@{first} is retired: leaks")
    assert status(edge, "/org/m/resolve/main/a") == (200, None)
    with pytest.raises(Conflict, match="would put it up again"):
        notice(edge, None, "", first)

    third = push(core, "org/m", {"a": b"3"})
    notice(core, "retired", "unsafe")
    done = follow(edge)
    assert (done["problems"], done["notices"], done["commits"]) == ([], 1, 0), "what is retired is not brought"
    for rev in ("main", second):
        assert status(edge, f"/org/m/resolve/{rev}/a") == (410, "org/m is retired: unsafe")
    assert follow(edge)["notices"] == 0
    notice(core, None, "")
    assert follow(edge)["problems"] == []
    assert refs(edge)["main"] == third
    assert read(edge, "a") == b"3"


def test_where_both_sides_said_something_the_edge_keeps_its_word_unless_it_is_retired_later(pair, push):
    core, edge = pair
    push(core, "org/m", {"a": b"1"})
    follow(edge)
    notice(edge, "deprecated", "slow here")
    notice(core, "deprecated", "old")
    assert follow(edge)["problems"] == []
    assert "slow here" in status(edge, "/org/m/resolve/main/a")[1]
    time.sleep(1.1)  # the times of notices are whole seconds
    notice(core, "retired", "unsafe")
    follow(edge)
    assert status(edge, "/org/m/resolve/main/a") == (410, "org/m is retired: unsafe")
    notice(edge, "deprecated", "we need it")
    assert ["keeps it in use here" in problem for problem in follow(edge)["problems"]] == [True]
    assert status(edge, "/org/m/resolve/main/a")[0] == 200
    notice(edge, "retired", "not here")
    notice(core, None, "")
    follow(edge)
    assert status(edge, "/org/m/resolve/main/a") == (410, "org/m is retired: not here")


def test_a_bundle_carries_tags_and_notices(helios, pair, push, tmp_path):
    core, edge = pair
    at, there, file = ("--registry", core.url), ("--registry", edge.url), tmp_path / "b.tar"
    first = push(core, "org/m", {"a": b"1"})
    set_ref(core, "v1", first, "tag")
    notice(core, "deprecated", "old")
    helios("bundle", "export", file, "org/m@v1", *at)
    told = json.loads(helios("bundle", "import", file, "--json", *there).out)
    assert (told["commits"], told["notices"]) == ([f"models/org/m@{first}"], 1)
    assert kinds(edge) == {"v1": "tag"}
    assert "org/m is deprecated: old" in status(edge, "/org/m/resolve/v1/a")[1]
    notice(core, "retired", "unsafe")
    assert "unsafe" in helios("bundle", "export", file, "org/m@v1", *at, code=1).err
    helios("bundle", "export", file, "--have", "org/m@v1", *at)
    told = json.loads(helios("bundle", "import", file, "--json", *there).out)
    assert (told["commits"], told["notices"]) == ([], 1)
    assert status(edge, "/org/m/resolve/v1/a") == (410, "org/m is retired: unsafe")


@pytest.mark.one_database
def test_a_peer_that_is_not_configured_or_not_there(helios, pair):
    core, edge = pair
    result = helios("replicate", "nobody", "--registry", edge.url, code=1)
    assert "names no peer 'nobody'" in result.err
    core.kill()
    result = helios("replicate", "core", "--registry", edge.url, code=1)
    assert "can't be reached" in result.err or "connect" in result.err


@pytest.mark.one_database
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


@pytest.mark.one_database
def test_a_bundle_of_what_there_is_not_leaves_no_file(helios, pair, tmp_path):
    core, edge = pair
    result = helios("bundle", "export", tmp_path / "m.tar", "org/none", "--registry", core.url, code=1)
    assert "org/none" in result.err
    assert not list(tmp_path.glob("*m.tar*"))
    (tmp_path / "bad.tar").write_bytes(b"x" * 10_000)
    result = helios("bundle", "import", tmp_path / "bad.tar", "--registry", edge.url, code=1)
    assert "bundle" in result.err


@pytest.mark.one_database
def test_a_bundle_that_stalls_does_not_keep_the_registry_from_stopping(helios, helios_home):
    """It ends as an upload of the Hub's clients does: ``running_registry`` waits no more than 15 s."""
    with running_registry(helios) as registry:
        parts = urlsplit(registry.url)
        sock = socket.create_connection((parts.hostname, parts.port), 10)
        sock.sendall(b"POST /api/v1/bundles HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\nhelios-bundle")
        time.sleep(0.5)
    with sock:
        assert b" 503 " in sock.recv(1000)
