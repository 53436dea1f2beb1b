"""The client of the upstream Hub, against a simulated one with faults."""

import errno
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from helios.errors import (
    DeadlineExceeded,
    DisabledRepo,
    EntryNotFound,
    Forbidden,
    IntegrityError,
    NoSpace,
    RepoNotFound,
    RevisionNotFound,
    Unavailable,
)
from helios.names import RepoId
from registry.pull import retry, upstream
from registry.pull.blocks import BLOCK
from registry.pull.spool import Spool
from registry.pull.upstream import Stopped
from tests.support.flights import fly
from tests.support.upstream import Fault, Upstream, rate_limited

REPO = RepoId.parse("org/m")
BIG = bytes(range(256)) * 12_000
"""3 MB, so three blocks."""
FILES = {"config.json": b'{"a": 1}' * 30, "model.safetensors": BIG, "sub/empty": b"", "tokenizer.json": b"{}" * 400}


_clients: list[upstream.Upstream] = []


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
    yield
    while _clients:
        _clients.pop().close()


@pytest.fixture
def hub():
    with Upstream() as found:
        found.commit("org/m", FILES)
        yield found
        assert found.violations == []


class Puller:
    """The client and a spool."""

    def __init__(self, url: str, root: Path, stall_s: float = 3.0) -> None:
        self.client = upstream.Upstream(url, stall_s=stall_s)
        _clients.append(self.client)
        self.spool = Spool(root / "spool")
        self.stop = threading.Event()
        self.seen: list[int] = []

    def snapshot(self, revision="main", repo=REPO):
        return self.client.snapshot(repo, revision, self.stop)

    def fetch(self, path: str) -> bytes:
        snapshot = self.snapshot()
        (file,) = [f for f in snapshot.files if f.path == path]
        return self.fly(snapshot, file)

    def fly(self, snapshot, file) -> bytes:
        return fly(
            self.client,
            snapshot,
            file,
            self.spool,
            advance=lambda here, attempt: self.seen.append(here),
            stop=self.stop,
        )


@pytest.fixture
def puller(hub, tmp_path):
    return Puller(hub.url, tmp_path)


def test_a_snapshot_is_what_the_hub_lists(hub, puller):
    commit = hub.repos["models/org/m"].refs["main"]
    hub.repos["models/org/m"].card = {"base_model": ["org/base", "org/other"]}
    found = puller.snapshot()
    assert found.commit == commit
    assert {f.path: f.size for f in found.files} == {path: len(data) for path, data in FILES.items()}
    assert {f.path for f in found.files if f.lfs} == {"model.safetensors"}
    assert found.lineage == {"upstream": f"{hub.url}/org/m", "base_model": "org/base,org/other"}
    assert (found.author, found.time) == ("org", 1772366400)
    assert puller.snapshot(commit).files == found.files


@pytest.mark.parametrize(
    ("card", "told"),
    [
        (
            {"base_model": "org/base", "base_model_relation": "quantized"},
            {"base_model": "org/base", "base_model_relation": "quantized"},
        ),
        ({"base_model": ["a,b", "", 7, "x" * 201, "org/ok"]}, {"base_model": "org/ok"}),
        ({"base_model": [f"org/m{n}" for n in range(100)]}, {"base_model": ",".join(f"org/m{n}" for n in range(16))}),
        ({"base_model": "org/base", "base_model_relation": "x" * 201}, {"base_model": "org/base"}),
        ({"base_model": {"a": "b"}, "base_model_relation": "adapter"}, {}),
        ({"base_model": 7}, {}),
        (["org/base"], {}),
    ],
)
def test_lineage_is_what_the_card_says_and_no_more_than_of_what_is_pushed(hub, puller, card, told):
    """A model that was pulled says where it comes from as one that was pushed with the same card does."""
    hub.repos["models/org/m"].card = card
    assert puller.snapshot().lineage == {"upstream": f"{hub.url}/org/m", **told}


def test_revisions_with_slashes_datasets_and_one_segment_ids(hub, puller):
    commit = hub.commit("org/m", {"x": b"1"}, ref="refs/pr/1")
    assert puller.snapshot("refs/pr/1").commit == commit
    for name, kind in (("gpt2", "models"), ("org/d", "datasets"), ("squad", "datasets")):
        commit = hub.commit(name, {"x": b"2"}, kind=kind)
        found = puller.snapshot(repo=RepoId.parse(name, kind))
        assert found.commit == commit
        assert found.lineage["upstream"] == f"{hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"


def test_a_listing_that_the_info_cuts_short_comes_from_the_tree(tmp_path):
    files = {f"data/{number:04}.txt": b"%d" % number for number in range(1200)}
    with Upstream(siblings_limit=1000, page_size=500) as hub:
        hub.commit("org/m", files)
        found = Puller(hub.url, tmp_path).snapshot()
        assert {f.path for f in found.files} == set(files)
        assert len(hub.requests("/tree/")) == 3
        assert all(found.commit in request.path for request in hub.requests("/tree/"))


def test_a_link_to_another_host_is_not_followed(tmp_path):
    with Upstream(siblings_limit=0) as hub:
        hub.commit("org/m", FILES)
        hub.faults = [Fault("/tree/", status=200, body=b"[]", headers={"Link": '<http://127.0.0.2:9/x>; rel="next"'})]
        with pytest.raises(IntegrityError, match=r"127\.0\.0\.2"):
            Puller(hub.url, tmp_path).snapshot()


@pytest.mark.parametrize("path", FILES)
def test_a_download(hub, puller, path):
    assert puller.fetch(path) == FILES[path]
    assert puller.seen == sorted(puller.seen)
    assert puller.seen[-1] == len(FILES[path])


def test_a_token_goes_to_the_hub_and_not_to_the_cdn(hub, puller, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.repos["models/org/m"].gated = "hf_secret"
    assert puller.fetch("model.safetensors") == BIG
    assert hub.requests("/resolve/")[0].headers["authorization"] == "Bearer hf_secret"
    assert "authorization" not in hub.requests("^/repos/")[0].headers


LFS, REGULAR = "model.safetensors", "tokenizer.json"
PASSING = {
    "cut short": (LFS, [Fault("^/repos/", truncate_at=1_500_000)]),
    "cut short twice": (LFS, [Fault("^/repos/", truncate_at=1_100_000, times=2)]),
    "cut short, regular file": (REGULAR, [Fault("/resolve/", truncate_at=100)]),
    "cut at the start": (LFS, [Fault("^/repos/", truncate_at=0)]),
    "503": (LFS, [Fault("/resolve/", status=503, times=3)]),
    "500 from the CDN": (LFS, [Fault("^/repos/", status=500)]),
    "info 502": (LFS, [Fault("^/api/", status=502, times=2)]),
    "range ignored": (LFS, [Fault("^/repos/", truncate_at=1_500_000), Fault("^/repos/", ignore_range=True)]),
    "wrong range": (LFS, [Fault("^/repos/", truncate_at=1_500_000), Fault("^/repos/", shift_range=7)]),
    "416": (LFS, [Fault("^/repos/", truncate_at=1_500_000), Fault("^/repos/", status=416)]),
    "no X-Repo-Commit": (LFS, [Fault("/resolve/", omit=("x-repo-commit",), times=-1)]),
    "429": (LFS, [Fault("/resolve/", status=429, headers={"Retry-After": "0"})]),
}


@pytest.mark.parametrize("name", PASSING)
def test_failures_that_pass(hub, puller, name):
    path, hub.faults = PASSING[name]
    assert puller.fetch(path) == FILES[path]
    assert all(fault.times in (0, -1) for fault in hub.faults), "every fault has struck"


def test_a_broken_download_goes_on_where_it_was(hub, puller):
    hub.faults = [Fault("^/repos/", truncate_at=2_500_000)]
    assert puller.fetch(LFS) == BIG
    first, second = hub.requests("^/repos/")
    assert first.range_start is None
    assert second.range_start == 2 * BLOCK
    assert hub.sent("^/repos/") <= len(BIG) + BLOCK


def test_a_308_is_followed(hub, puller):
    path = f"/org/m/resolve/{hub.repos['models/org/m'].refs['main']}/config.json"
    hub.faults = [Fault(f"{path}$", status=308, headers={"Location": f"{path}?again=1"})]
    assert puller.fetch("config.json") == FILES["config.json"]


def test_a_rate_limit_holds_everybody_back_as_long_as_it_says(hub, puller):
    status, headers = rate_limited(1)
    hub.faults = [Fault("/resolve/", status=status, headers=headers)]
    started = time.monotonic()
    assert puller.fetch(LFS) == BIG
    assert time.monotonic() - started >= 1
    assert len(hub.requests("/resolve/")) == 2


def test_what_another_registry_prepares_may_be_read(hub, puller):
    """It says so to nobody who may not: that it is not there yet is no reason to refuse its reader something else."""
    commit = puller.snapshot().commit
    hub.faults = [Fault("/resolve/", status=503, headers={"X-Error-Code": "Preparing"})]
    puller.client.check_access(REPO, commit, LFS, puller.stop, token=None, retry=retry.Retry(0.1))
    assert [seen.method for seen in hub.requests("/resolve/")] == ["HEAD"]


def test_the_last_request_that_is_allowed_holds_back_the_next(hub, puller):
    """An upstream that says so need not send a 429. What another host serves is not limited."""
    hub.faults = [Fault("/resolve/.*/config.json", headers={"RateLimit": '"resolvers";r=0;t=1'})]
    started = time.monotonic()
    assert puller.fetch("config.json") == FILES["config.json"]
    hub.faults = [Fault("/resolve/", headers={"RateLimit": '"resolvers";r=0;t=300'})]
    assert puller.fetch(LFS) == BIG
    assert 1 <= time.monotonic() - started < 200
    assert puller.client.gate.left("files") > 100
    assert puller.client.gate.left("api") == 0


REFUSED = {
    "no repository": (Fault("$^"), "org/none", "main", RepoNotFound, "there is no org/none@main"),
    "no revision": (Fault("$^"), "org/m", "v9", RevisionNotFound, "there is no org/m@v9"),
    "gated": (
        Fault("/api/", status=403, headers={"X-Error-Code": "GatedRepo"}),
        "org/m",
        "main",
        Forbidden,
        "is gated",
    ),
    "disabled": (
        Fault("/api/", status=403, headers={"X-Error-Message": "Access to this resource is disabled."}),
        "org/m",
        "main",
        DisabledRepo,
        "is disabled",
    ),
    "a bad token": (
        Fault("/api/", status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}),
        "org/m",
        "main",
        Forbidden,
        "status 401",
    ),
    "418": (Fault("/api/", status=418), "org/m", "main", Unavailable, "status 418"),
    "no JSON": (Fault("/api/", status=200, body=b"<html>"), "org/m", "main", IntegrityError, "not answer like a Hub"),
    "a list": (Fault("/api/", status=200, body=b"[]"), "org/m", "main", IntegrityError, "not answer like a Hub"),
    "no sha": (Fault("/api/", status=200, body=b'{"id":"x"}'), "org/m", "main", IntegrityError, "None as commit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_tried_again(hub, puller, name):
    fault, repo, revision, kind, says = REFUSED[name]
    hub.faults = [fault]
    with pytest.raises(kind) as caught:
        puller.snapshot(revision, RepoId.parse(repo))
    assert says in caught.value.message
    assert hub.url in caught.value.message or kind in (IntegrityError, DisabledRepo)
    assert len(hub.requests("^/api/models")) <= 2


def many(item: bytes) -> bytes:
    """4 MiB of one thing after another."""
    return b",".join([item] * ((4 << 20) // (len(item) + 1)))


SHA = b'"sha":"' + b"ab" * 20 + b'"'
HOSTILE = {
    "objects": (b"[" + many(b"{}") + b"]", "an answer of 1,398,101 objects, 500,000 are the most"),
    "files without a name": (b'{"siblings":[' + many(b"{}" + b" " * 20) + b"]}", r"missing required field `rfilename`"),
    "files of one name": (b"{" + SHA + b',"siblings":[' + many(b'{"rfilename":"ab"}') + b"]}", "does not answer"),
    "a size that is no number": (b'{"siblings":[{"rfilename":"a","size":"1"}]}', r"Expected `int | null`, got `str`"),
    "lists in lists": (b'{"cardData":' + b"[" * (4 << 20), "does not answer like a Hub"),
    "files that are a number": (b'{"siblings":7,"cardData":[' + many(b"[]") + b"]}", r"got `int` - at `$.siblings`"),
    "text that is none": (b'{"author":"' + b"\xff" * (4 << 20) + b'"}', "does not answer like a Hub"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_refused_and_costs_little_memory(hub, puller, name):
    body, says = HOSTILE[name]
    puller.snapshot()  # what is imported on first use
    hub.faults = [Fault("/revision/", status=200, body=body), Fault("/tree/", status=200, body=body)]
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError) as caught:
            puller.snapshot()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert says in caught.value.message
    assert peak < 9 * (4 << 20)


def test_what_nobody_reads_of_an_answer_costs_nothing(hub, puller):
    """Lists in the card, in which the Hub's own answers have results, and in fields of later versions."""
    commit = hub.repos["models/org/m"].refs["main"]
    long = b'{"base_model":[' + many(b'"a"') + b'],"base_model_relation":"merge"}'
    for card in (long, b"[%s]" % many(b"[]")):
        body = b'{"sha":"%s","cardData":%s,"spaces":[%s]}' % (commit.encode(), card, many(b"[]"))
        puller.snapshot()
        hub.faults = [Fault("/revision/", status=200, body=body)]
        tracemalloc.start()
        try:
            found = puller.snapshot()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert set(found.lineage) == {"upstream"}
        assert {file.path for file in found.files} == set(FILES), "from the tree"
        assert peak < 4 * len(body)


def test_lineage_is_what_a_card_may_say(hub, puller):
    hub.repos["models/org/m"].card = {"base_model": ["org/a", {"x": 1}, "a,b"], "base_model_relation": "merge"}
    found = puller.snapshot().lineage
    assert found == {"upstream": f"{hub.url}/org/m", "base_model": "org/a", "base_model_relation": "merge"}


def test_gated_says_what_to_do(hub, puller):
    hub.repos["models/org/m"].gated = "hf_other"
    with pytest.raises(Forbidden) as caught:
        puller.snapshot()
    assert f"{hub.url}/org/m" in caught.value.hint
    assert "HF_TOKEN" in caught.value.hint


def test_a_listed_file_that_is_gone_is_said(hub, puller):
    snapshot = puller.snapshot()
    hub.repos["models/org/m"].commits[snapshot.commit] = {}
    (file,) = [f for f in snapshot.files if f.path == "config.json"]
    with pytest.raises(EntryNotFound, match=r"config\.json of org/m"):
        puller.fly(snapshot, file)


def test_an_upstream_that_stays_broken_ends_in_time(hub, tmp_path):
    puller = Puller(hub.url, tmp_path, stall_s=0.5)
    hub.faults = [Fault("/resolve/", status=503, times=-1)]
    started = time.monotonic()
    with pytest.raises(Unavailable, match="status 503; gave up after"):
        puller.fetch(LFS)
    assert time.monotonic() - started < 10


def test_nobody_there(tmp_path):
    with pytest.raises(Unavailable, match="can't be reached"):
        Puller("http://127.0.0.1:9", tmp_path, stall_s=0.3).snapshot()


@pytest.mark.parametrize("fault", [Fault("/api/", delay_s=60, times=-1), Fault("^/repos/", stall_at=5, times=-1)])
def test_an_upstream_that_hangs_ends_in_time(hub, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(upstream, "TIMEOUT_S", 0.2)
    puller = Puller(hub.url, tmp_path, stall_s=0.5)
    hub.faults = [fault]
    with pytest.raises(DeadlineExceeded):
        puller.fetch(LFS)


def test_stopping_interrupts_a_wait_and_a_download(hub, puller):
    status, headers = rate_limited(300)
    hub.faults = [Fault("/resolve/", status=status, headers=headers)]
    threading.Timer(0.3, puller.stop.set).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        puller.fetch(LFS)
    assert time.monotonic() - started < 5
    fresh = Puller(hub.url, puller.spool.root)
    hub.faults = [Fault("^/repos/", bytes_per_s=2_000_000, times=-1)]
    threading.Timer(0.3, fresh.stop.set).start()
    with pytest.raises(Stopped):
        fresh.fetch(LFS)


def test_a_full_disk_ends_it_at_once(hub, puller, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpace):
        puller.fetch(LFS)
    assert len(hub.requests("^/repos/")) == 1


def test_a_file_that_the_hub_serves_through_xet_alone_is_said(hub, puller):
    snapshot = puller.snapshot()
    (file,) = [f for f in snapshot.files if f.path == LFS]
    hub.faults = [Fault("^/repos/", status=403, times=-1)]
    huge = replace(file, size=60 * 1000**3)
    with pytest.raises(Forbidden) as caught:
        puller.fly(snapshot, huge)
    assert "Xet" in caught.value.hint


def test_offline_mode_is_named(hub):
    client = upstream.Upstream(hub.url, stall_s=1, offline=True)
    with pytest.raises(Unavailable, match="offline") as caught:
        client.snapshot(REPO, "main", threading.Event())
    assert "HF_HUB_OFFLINE" in caught.value.hint
    assert hub.seen == []


SCRIPT = """
import sys
sys.path[0:0] = [{root!r}]
sys.path.append({site!r})
import huggingface_hub, threading
assert huggingface_hub.__version__ == {version!r}, huggingface_hub.__file__
from pathlib import Path
from helios.names import RepoId
from registry.pull.spool import Spool
from registry.pull.upstream import Upstream
from tests.support.flights import fly
client, stop, repo = Upstream({url!r}, stall_s=20), threading.Event(), RepoId.parse("org/m")
snapshot = client.snapshot(repo, "main", stop)
spool = Spool(Path({spool!r}))
for file in snapshot.files:
    print(file.path, fly(client, snapshot, file, spool).hex())
for name, kind in (("org/none", "RepoNotFound"), ("org/gated", "GatedRepo")):
    try:
        client.snapshot(RepoId.parse(name), "main", stop)
    except Exception as error:
        assert type(error).__name__ == kind, error
    else:
        raise AssertionError(name)
"""


@pytest.mark.parametrize("version", ["0.36.2", "1.33.0", "2.4.0"])
def test_every_major_of_huggingface_hub_works(hub, tmp_path, version):
    root = Path(__file__).parents[3]
    python = root / ".venvs" / f"hub-{version}" / "bin" / "python"
    assert python.exists(), "run scripts/hub_venvs.py"
    hub.commit("org/gated", FILES)
    hub.repos["models/org/gated"].gated = "hf_x"
    hub.faults = [
        Fault("^/repos/", truncate_at=1_500_000),
        Fault("^/repos/", status=503),
        Fault("config.json", truncate_at=10),
        Fault("/revision/", status=500),
    ]
    script = SCRIPT.format(
        root=str(root),
        site=next(path for path in sys.path if path.endswith("site-packages")),
        version=version,
        url=hub.url,
        spool=str(tmp_path / "spool"),
    )
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert {path: bytes.fromhex(data) for path, data in lines.items()} == FILES
    assert hub.requests("^/repos/")[-1].range_start is not None
