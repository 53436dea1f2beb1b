"""``helios pull`` from a simulated Hub with faults, and from another Helios registry."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from helios.errors import HeliosError
from helios.names import RepoId
from heliosfs.store.recipe import MAX_BLOB
from tests.support.command import Command
from tests.support.hub_clients import run_client
from tests.support.registry import Running, running_registry
from tests.support.upstream import Fault, Upstream, rate_limited

pytestmark = pytest.mark.both_databases

BLOCK = 1 << 20
MB = 1_000_000


def blob(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def safetensors(seed: int, size: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + blob(seed, size)


STALL_S = "2"
"""The registries give up after this long without progress, in seconds."""

_numbers = itertools.count()


def fresh_files() -> dict[str, bytes]:
    """A model of which no registry of this module holds anything yet."""
    number = next(_numbers)
    return {
        "README.md": f"# Grüße {number}\n".encode(),
        "config.json": b'{"number": %d}\n' % number,
        "model.safetensors": safetensors(number, 3 * MB),
        "tokenizer/vocab.txt": b"a\nb%d\n" % number * 1000,
        "empty": b"",
    }


@dataclass
class Pulling:
    """A registry whose upstream is the simulated Hub, and a repository that is new to it."""

    hub: Upstream
    registry: Running
    helios: Command
    repo: str
    files: dict[str, bytes]

    def pull(self, revision: str = "main", repo: str | None = None) -> list[dict]:
        """All events of a pull; an error event is raised."""
        return list(self.registry.client().pull(RepoId.parse(repo or self.repo), revision, timeout_s=60))

    def fails(self, revision: str = "main", repo: str | None = None) -> str:
        """What a pull that must fail says; nothing of it may be visible."""
        with pytest.raises(HeliosError) as caught:
            self.pull(revision, repo)
        assert repo is not None or self.listed() is None
        return str(caught.value)

    def commit(self, files: dict[str, bytes] | None = None, **options) -> str:
        return self.hub.commit(self.repo, self.files if files is None else files, **options)

    def held(self, revision: str = "main", paths=None) -> dict[str, bytes]:
        return {p: get(f"{self.registry.url}/{self.repo}/resolve/{revision}/{p}") for p in paths or self.files}

    def listed(self, revision: str = "main") -> list[str] | None:
        try:
            info = json.loads(get(f"{self.registry.url}/api/models/{self.repo}/revision/{revision}"))
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return None
        return [item["rfilename"] for item in info["siblings"]]

    def refs(self) -> dict[str, str]:
        return json.loads(get(f"{self.registry.url}/api/v1/refs?repo=models/{self.repo}"))["refs"]

    @property
    def spool(self) -> Path:
        return self.helios.home / "registry" / "pulls" / "models" / self.repo


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, databases):
    home = tmp_path_factory.mktemp("pull") / "home"
    with Upstream() as hub:
        settings = {"HELIOS_REGISTRY__UPSTREAM": hub.url, "HELIOS_REGISTRY__PULL_STALL_S": STALL_S}
        helios = Command(home, **settings, **databases())
        with running_registry(helios) as registry:
            yield Pulling(hub, registry, helios, "", {})


@pytest.fixture
def site(shared):
    """The module's registry and Hub, without the faults and requests of other tests."""
    hub = shared.hub
    with hub.lock:
        hub.seen, hub.faults, hub.bytes_per_s = [], [], None
    files = fresh_files()
    yield replace(shared, repo=f"org/m{next(_numbers)}", files=files)
    hub.faults, hub.bytes_per_s = [], None
    assert hub.violations == []


@pytest.fixture
def alone(tmp_path, databases):
    """A Hub and a home of the test's own: (hub, helios), no registry yet."""
    with Upstream() as hub:
        settings = {"HELIOS_REGISTRY__UPSTREAM": hub.url, "HELIOS_REGISTRY__PULL_STALL_S": STALL_S}
        yield hub, Command(tmp_path / "home", **settings, **databases())
        assert hub.violations == []


def logs(events: list[dict]) -> list[str]:
    return [event["message"] for event in events if event["event"] == "log"]


# --- plain pulls -----------------------------------------------------------------------------------------------------


def test_a_pull_holds_exactly_what_the_hub_has(site):
    hub, repo = site.hub, site.repo
    commit = site.commit()
    hub.repos[f"models/{repo}"].card = {"base_model": "org/base"}
    assert site.helios("pull", repo) == commit
    assert site.held() == site.files
    assert site.refs() == {"main": commit}
    blobs = json.loads(get(f"{site.registry.url}/api/models/{repo}?blobs=true"))["siblings"]
    for item in blobs:
        file = hub.repos[f"models/{repo}"].commits[commit][item["rfilename"]]
        assert (item["blobId"], item["size"], "lfs" in item) == (file.oid, file.size, file.lfs)
    (record,) = json.loads(get(f"{site.registry.url}/api/v1/commits?repo=models/{repo}&rev=main"))["commits"]
    assert (record["commit"], record["author"], record["time"]) == (commit, "org", 1772366400)
    assert record["lineage"] == {"upstream": f"{hub.url}/{repo}", "base_model": "org/base"}
    assert not site.spool.exists(), "nothing of a finished pull is left in the spool"
    # Once more: nothing but the question which commit it is.
    before = len(hub.seen)
    assert json.loads(site.helios("pull", repo, "--json"))["commit"] == commit
    assert [request.path for request in hub.seen[before:]] == [f"/api/models/{repo}/revision/main"]
    # And a commit that is held needs no upstream at all.
    hub.faults = [Fault(".", status=500, times=-1)]
    assert site.pull(commit)[-1] == {"event": "done", "commit": commit}


def test_revisions_kinds_and_one_segment_names(site):
    main = site.commit()
    v1 = site.commit({"config.json": b"1"}, ref="v1")
    other = site.commit({"config.json": b"2"}, ref=None)
    site.pull("v1")
    site.pull(other)
    assert site.refs() == {"v1": v1}
    assert site.held(other, ["config.json"]) == {"config.json": b"2"}
    site.pull()
    assert site.refs() == {"main": main, "v1": v1}
    solo = f"solo{next(_numbers)}"
    site.hub.commit(solo, {"config.json": b"3"})
    site.hub.commit(site.repo, {"x.csv": b"4"}, kind="datasets")
    site.helios("pull", solo)
    site.helios("pull", site.repo, "--kind", "datasets")
    assert get(f"{site.registry.url}/{solo}/resolve/main/config.json") == b"3"
    assert get(f"{site.registry.url}/datasets/{site.repo}/resolve/main/x.csv") == b"4"


def test_what_is_held_is_not_downloaded_again(site):
    def fetched() -> set[str]:
        return {r.path.partition("/resolve/")[2][41:] for r in site.hub.requests("/resolve/")}

    site.commit()
    site.pull()
    site.hub.seen.clear()
    site.commit({**site.files, "config.json": b"changed", "renamed.safetensors": site.files["model.safetensors"]})
    site.pull()
    assert fetched() == {"config.json"}
    # Large files are known by their sha256 in other repositories too; a git oid is not believed across repositories.
    tune = replace(site, repo=f"{site.repo}-tune")
    site.hub.seen.clear()
    tune.commit()
    tune.pull()
    assert fetched() == {"README.md", "config.json", "tokenizer/vocab.txt"}
    assert tune.held() == tune.files


def test_pickle_with_a_safetensors_twin_is_left_out(site):
    site.commit({**site.files, "pytorch_model.bin": b"pickle", "training_args.bin": b"settings"})
    said = logs(site.pull())
    assert site.listed() == sorted([*site.files, "training_args.bin"])
    assert any("pytorch_model.bin" in line and "model.safetensors" in line for line in said)
    assert site.hub.requests("pytorch_model.bin") == []


def test_the_stream_of_events(site):
    commit = site.commit()
    seen = site.pull()
    assert seen[-1] == {"event": "done", "commit": commit}
    assert {e["path"]: e["size"] for e in seen if e["event"] == "file"} == {p: len(d) for p, d in site.files.items()}
    final = {e["path"]: (e["done"], e["total"]) for e in seen if e["event"] == "progress"}
    assert final == {p: (len(d), len(d)) for p, d in site.files.items()}


def test_many_callers_one_pull(site):
    commit = site.commit({**site.files, "big.safetensors": safetensors(next(_numbers), 4 * MB)})
    site.hub.move(site.repo, "v1", commit)
    site.hub.bytes_per_s = 6 * MB
    # By two names and by the commit itself: one download, whoever comes first.
    with ThreadPoolExecutor(24) as threads:
        ends = [threads.submit(site.pull, ("main", "v1", commit)[number % 3]) for number in range(24)]
    assert [end.result()[-1]["commit"] for end in ends] == [commit] * 24
    assert site.refs() == {"main": commit, "v1": commit}
    assert len(site.hub.requests("^/repos/")) == 2
    assert len(site.hub.requests("/resolve/.*config.json")) == 1
    assert not site.spool.exists()


def test_a_caller_that_leaves_does_not_stop_the_pull(site, wait_for):
    commit = site.commit()
    site.hub.bytes_per_s = 2 * MB
    with site.helios.start("pull", site.repo) as caller:
        wait_for(lambda: site.hub.sent("^/repos/") > MB, what="the download to begin")
        caller.kill()
    wait_for(lambda: site.listed() is not None, 20, "the pull to end")
    assert site.refs() == {"main": commit}
    assert len(site.hub.requests("^/repos/")) == 1


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_killed_registry_goes_on_where_it_was(alone, wait_for):
    """One large file is stored, two are under way, one was not begun. After a SIGKILL no byte is fetched twice but what
    was read and not yet written: less than a block for each running download."""
    hub, helios = alone
    files = {f"model-{n}.safetensors": safetensors(n, n * MB) for n in (3, 5, 7, 9)} | {"config.json": b"{}" * 500}
    names = [f"model-{n}.safetensors" for n in (9, 7, 5, 3)]
    stored, slow, slower, late = (f"/repos/{hashlib.sha256(files[name]).hexdigest()}" for name in names)
    sizes_of = {slow: len(files[names[1]]), slower: len(files[names[2]])}
    commit = hub.commit("org/m", files)
    hub.faults = [Fault(slow, stall_at=5 * MB), Fault(slower, stall_at=3 * MB), Fault(late, delay_s=30)]
    with running_registry(helios) as registry:
        site = Pulling(hub, registry, helios, "org/m", files)
        with helios.start("pull", "org/m") as caller:

            def sizes() -> dict[str, int]:
                """Bytes in whole blocks that the journals name."""
                return {p.name[7:-7]: p.stat().st_size // 4 * BLOCK for p in site.spool.glob("sha256-*.blocks")}

            def ready() -> bool:
                there = sizes()
                return (
                    stored[7:] not in there
                    and hub.sent(stored) == len(files[names[0]])
                    and there.get(slow[7:], 0) >= 4 * BLOCK
                    and there.get(slower[7:], 0) >= 2 * BLOCK
                )

            wait_for(ready, 30, "one file stored and two under way")
            written = sizes()
            registry.kill()
            assert caller.wait(30) == 1
    hub.faults = []
    before = len(hub.seen)
    with running_registry(helios) as registry:
        site = replace(site, registry=registry)
        assert site.listed() is None
        assert json.loads(get(f"{registry.url}/api/models")) == []
        assert site.pull()[-1]["commit"] == commit
        assert site.held() == files
    second = {r.path: r for r in hub.seen[before:] if r.path.startswith("/repos/")}
    assert second.keys() == {slow, slower, late}, "what was stored before the kill is not asked for again"
    assert second[late].range_start is None
    for path, cut in ((slow, 5 * MB), (slower, 3 * MB)):
        assert second[path].range_start == written[path[7:]]
        assert 0 <= cut - second[path].range_start < BLOCK
        assert sum(r.sent for r in hub.requests(path)) < sizes_of[path] + BLOCK


def test_a_failed_pull_keeps_what_it_has(site):
    files = {f"model-{n}.safetensors": safetensors(next(_numbers), n * MB) for n in (2, 3)}
    commit = site.commit({**files, "config.json": b"{}"})
    site.hub.faults = [Fault("config.json", status=500, times=-1)]
    said = site.fails()
    assert f"config.json of {site.repo}" in said
    assert "status 500" in said
    assert site.hub.sent("^/repos/") == sum(map(len, files.values()))
    time.sleep(1.5)  # the registry's housekeeping looks every second, and must leave the stored blobs alone
    site.hub.faults = []
    assert site.pull()[-1]["commit"] == commit
    assert site.hub.sent("^/repos/") == sum(map(len, files.values()))
    assert site.held(paths=files) == files


def test_wrong_bytes_of_the_right_size_are_asked_for_once_more(site):
    site.commit()
    site.hub.faults = [Fault("^/repos/", flip_at=2 * MB), Fault("config.json", flip_at=3)]
    assert sum("wrong bytes" in line for line in logs(site.pull())) == 2
    assert site.held() == site.files
    assert site.hub.requests("^/repos/")[1].range_start is None, "from zero"


@pytest.mark.one_database
@pytest.mark.parametrize("at", [5, 2 * MB])
def test_wrong_bytes_that_stay_wrong_are_refused(site, at):
    """At 5 the safetensors header is hit, at 2 MB the weights."""
    site.commit()
    site.hub.faults = [Fault("^/repos/", flip_at=at, times=-1)]
    said = site.fails()
    assert f"model.safetensors of {site.repo}" in said
    assert "not those it lists" in said
    assert list(site.spool.glob("sha256-*.partial")) == [], "wrong bytes are thrown away"
    assert len(site.hub.requests("^/repos/")) == 2


def test_a_malformed_file_of_the_upstream_is_refused_by_name(site):
    site.commit({"model.safetensors": (1 << 40).to_bytes(8, "little") + b"{}"})
    assert "model.safetensors" in site.fails()
    assert len(site.hub.requests("^/repos/")) == 1, "the bytes are as listed, so there is no point in asking again"


@pytest.mark.one_database
def test_truncation_5xx_and_a_rate_limit_on_the_way(site):
    commit = site.commit()
    status, headers = rate_limited(1)
    site.hub.faults = [
        Fault("/revision/", status=503),
        Fault("^/repos/", truncate_at=2 * MB),
        Fault("vocab.txt", status=status, headers=headers),
        Fault("config.json", omit=("x-repo-commit",)),
    ]
    assert site.pull()[-1]["commit"] == commit
    assert site.held() == site.files
    assert site.hub.requests("^/repos/")[1].range_start is not None


def test_a_branch_that_moves_in_between(site):
    """The pull stays with the commit it was told first; the next one brings the new commit, and the old one stays."""
    old = site.commit()
    new = site.commit({**site.files, "config.json": b"forced"}, ref=None)
    site.hub.faults = [Fault("/resolve/", then=lambda: site.hub.move(site.repo, "main", new))]
    assert site.pull()[-1]["commit"] == old
    assert site.held() == site.files
    del site.hub.repos[f"models/{site.repo}"].commits[old]  # as after a force push and the Hub's own clean-up
    assert site.pull()[-1]["commit"] == new
    assert site.refs() == {"main": new}
    assert site.held(old) == site.files
    assert site.held(new, ["config.json"]) == {"config.json": b"forced"}


@pytest.mark.one_database
@pytest.mark.parametrize("path", ["../../etc/passwd", "/abs", "a\\b", "a\nb", "x/../y"])
def test_bad_paths_of_the_upstream_are_refused(site, path):
    site.commit({"config.json": b"{}", path: b"evil"})
    assert "unsafe file" in site.fails()
    assert site.hub.requests("/resolve/") == []


def test_errors_say_what_to_do(site):
    site.commit()
    assert "there is no org/none@main" in site.helios.both("pull", "org/none", code=1)[1]
    assert f"there is no {site.repo}@v9" in site.fails("v9")
    site.hub.repos[f"models/{site.repo}"].gated = "hf_secret"
    said = site.fails()
    assert "is gated" in said
    assert "HF_TOKEN" in said
    site.hub.faults = [Fault("/api/", status=503, times=-1)]
    assert "gave up after" in site.fails()


@pytest.mark.one_database
def test_no_space_is_said_before_anything_is_downloaded(site):
    """The Hub lists files larger than any disk."""
    commit = site.commit()
    files = site.hub.repos[f"models/{site.repo}"].commits[commit]
    one = replace(files["model.safetensors"], size=MAX_BLOB)
    files |= {f"model-{number}.safetensors": one for number in range(30)}
    said = site.fails()
    assert re.search(r"needs \d{15} bytes .* but only \d+ are free", said)
    assert site.hub.requests("/resolve/") == []
    files["model.safetensors"] = replace(one, size=1 << 55)
    assert f"'model.safetensors' has {1 << 55} bytes" in site.fails()


@pytest.mark.one_database
def test_an_upstream_that_is_not_there_and_sigterm_while_one_hangs(alone, wait_for):
    hub, helios = alone
    files = {**fresh_files(), "big.safetensors": safetensors(5, 6 * MB)}
    commit = hub.commit("org/m", files)
    hub.faults = [Fault("^/repos/", stall_at=2 * MB, times=-1)]
    helios.env["HELIOS_REGISTRY__PULL_STALL_S"] = "60"
    with running_registry(helios) as registry:
        with helios.start("pull", "org/m") as caller:
            wait_for(lambda: hub.sent("^/repos/") >= 4 * MB, 20, "the downloads to hang")
            started = time.monotonic()
            registry.process.send_signal(signal.SIGTERM)
            assert registry.process.wait(15) == 0
            assert time.monotonic() - started < 10
            assert caller.wait(15) == 1
            assert "stopped" in caller.stderr.read()
    hub.faults = []
    with running_registry(helios) as registry:
        site = Pulling(hub, registry, helios, "org/m", files)
        assert site.listed() is None
        assert site.pull()[-1]["commit"] == commit
        assert site.held() == files
    assert all(r.range_start for r in hub.requests("^/repos/")[-2:])
    helios.env |= {"HELIOS_REGISTRY__UPSTREAM": "http://127.0.0.1:9", "HELIOS_REGISTRY__PULL_STALL_S": "1"}
    with running_registry(helios) as registry:
        said = replace(site, registry=registry).fails(repo="org/other")
    assert "http://127.0.0.1:9" in said
    assert "gave up" in said


# --- other upstreams and sizes ---------------------------------------------------------------------------------------


def test_a_registry_is_an_upstream_for_another(site, tmp_path, databases):
    """Hub -> registry -> registry -> huggingface_hub: the same commit, the same ids, the same bytes."""
    commit = site.commit()
    site.pull()
    edge = Command(tmp_path / "edge", HELIOS_REGISTRY__UPSTREAM=site.registry.url, **databases())
    with running_registry(edge) as near:
        assert edge("pull", site.repo) == commit
        assert replace(site, registry=near).held(commit) == site.files
        for path in (f"{site.repo}?blobs=true", f"{site.repo}/tree/main?recursive=true"):
            far_answer, near_answer = (json.loads(get(f"{r.url}/api/models/{path}")) for r in (site.registry, near))
            assert far_answer == near_answer
        assert "there is no org/none@main" in edge.both("pull", "org/none", code=1)[1]
        script = f"result = tree(snapshot_download({site.repo!r}))"
        result = run_client("2.4.0", script, near.url, tmp_path / "hf")
        assert result == {path: hashlib.sha256(data).hexdigest() for path, data in site.files.items()}


@pytest.mark.one_database
def test_a_token_opens_a_gated_repository_and_memory_stays_bounded(alone):
    """Two large files at full speed: what the registry keeps in memory has nothing to do with their size."""
    hub, helios = alone
    hub.commit("org/m", {f"model-{n}.safetensors": safetensors(n, 60 * MB) for n in (1, 2)})
    hub.repos["models/org/m"].gated = helios.env["HF_TOKEN"] = "hf_secret"
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            status = Path(f"/proc/{registry.pid}/status").read_text().splitlines()
            kib = sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssShmem")))
            peak = max(peak, kib >> 10)

    with running_registry(helios) as registry:
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert Pulling(hub, registry, helios, "org/m", {}).pull()[-1]["event"] == "done"
        finally:
            done.set()
            watcher.join()
    assert 30 < peak < 300, f"{peak} MiB"
