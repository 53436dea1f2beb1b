"""Pull-through: real registries and clients in front of a simulated Hub with faults."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from tests.support.hub_clients import VERSIONS, run_client
from tests.support.mirror_site import (
    BLOCK,
    MB,
    PIECE,
    ask,
    fresh_files,
    fresh_name,
    mirror,
    own_site,
    renewed,
    sha,
    shared_site,
    weights,
)
from tests.support.upstream import Fault, rate_limited

pytestmark = pytest.mark.both_databases


@pytest.fixture(scope="module")
def shared(tmp_path_factory, databases):
    with shared_site(tmp_path_factory.mktemp("mirror"), **databases()) as found:
        yield found


@pytest.fixture
def site(shared):
    with renewed(shared, fresh_files()) as found:
        yield found


@pytest.fixture
def alone(tmp_path, databases):
    with own_site(tmp_path, 3 * MB, databases) as found:
        yield found


# --- what is answered ------------------------------------------------------------------------------------------------


def test_a_cold_repository_is_answered_from_its_listing(site):
    """Metadata of what is not here is the upstream's, to the letter, and moves no file."""
    commit = site.commit()
    for path in ("?blobs=true", f"/revision/{commit}?blobs=true", "/tree/main?recursive=true", "/refs"):
        far = json.loads(ask(site.hub.url, f"/api/models/{site.repo}{path}", user_agent="hf_hub/test").body)
        near = json.loads(site.api(path).body)
        if isinstance(far, dict) and "siblings" in far:
            names = ("id", "sha", "siblings", "private", "gated", "author", "lastModified")
            far, near = ({name: answer[name] for name in names} for answer in (far, near))
        elif path == "/refs":
            far, near = (answer["branches"] for answer in (far, near))
        else:
            far, near = (sorted(answer, key=lambda item: item["path"]) for answer in (far, near))
        assert near == far
    files = site.hub.repos[f"models/{site.repo}"].commits[commit]
    for path, file in files.items():
        head = site.head(path)
        assert head.status == 200
        assert head.headers["etag"] == f'"{file.sha256 if file.lfs else file.oid}"'
        assert head.headers["x-repo-commit"] == commit
        assert head.headers["content-length"] == str(file.size)
    assert site.head("nope").code == "EntryNotFound"
    assert site.head("nope").headers["x-repo-commit"] == commit
    assert site.get("x", "v9").code == "RevisionNotFound"
    assert site.hub.requests("/resolve/") == []
    found = ask(site.registry.url, f"/api/models/{site.repo}/commits/main")
    assert [item["id"] for item in json.loads(found.body)] == [commit]


def test_bytes_come_through_and_stay(site, wait_for):
    commit = site.commit()
    for path, data in site.files.items():
        answer = site.get(path)
        assert (answer.status, answer.body) == (200, data)
    wait_for(lambda: site.held() == {"main": commit}, 10, "the snapshot to be published when its last file is here")
    site.hub.faults = [Fault(".", status=500, times=-1)]
    for path, data in site.files.items():
        assert site.get(path, commit).body == data
    assert json.loads(site.helios("show", site.repo, "--json"))["commit"] == commit
    assert site.helios("pull", f"{site.repo}@{commit}") == commit
    assert not list((site.helios.home / "registry" / "pulls").glob(f"models/{site.repo}/*"))


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS)
def test_real_clients_download_cold_through_it(site, version, tmp_path):
    commit = site.commit({**site.files, "sub/model-2.safetensors": weights(10 * MB)})
    files = site.hub.repos[f"models/{site.repo}"].commits[commit]
    script = f"""
    result = {{
        "tree": tree(snapshot_download({site.repo!r})),
        "commit": api.model_info({site.repo!r}).sha,
        "errors": [raised(hf_hub_download, "org/none", "x"), raised(hf_hub_download, {site.repo!r}, "x"),
                   raised(hf_hub_download, {site.repo!r}, "x", revision="v9")],
    }}
    """
    result = run_client(version, script, site.registry.url, tmp_path)
    assert result["tree"] == {path: file.sha256 for path, file in files.items()}
    assert result["commit"] == commit
    names = ("RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError")
    assert all(name in kinds for name, kinds in zip(names, result["errors"], strict=True))


def test_a_registry_behind_a_registry(site, tmp_path, wait_for, databases):
    """Hub <- core <- edge, each cold: the same bytes and ids at the far end."""
    commit = site.commit()
    with mirror(tmp_path / "edge", site.registry.url, **databases()) as (_, near):
        edge = replace(site, registry=near)
        for path, data in site.files.items():
            assert edge.get(path).body == data
        far, close = (json.loads(s.api("/tree/main?recursive=true").body) for s in (site, edge))
        assert far == close
        wait_for(lambda: edge.held() == {"main": commit}, 10, "the edge to publish")
        assert edge.get("x", "v9").code == "RevisionNotFound"
    assert site.hub.sent("^/repos/") == len(site.files["model.safetensors"])


def test_what_another_registry_has_retired_is_told_as_that(site, tmp_path, databases):
    """With its reason, and what to use instead: nobody is to look for a fault of the network."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes(b"{}")
    old = site.helios("push", str(tmp_path / "m"), site.repo)
    (tmp_path / "m" / "config.json").write_bytes(b'{"a": 1}')
    site.helios("push", str(tmp_path / "m"), site.repo)
    site.helios("deprecate", f"{site.repo}@{old}", "-m", "it leaks", "--use", "org/new", "--retire")
    with mirror(tmp_path / "edge", site.registry.url, **databases()) as (_, near):
        edge = replace(site, registry=near)
        assert edge.get("config.json").body == b'{"a": 1}'
        for answer in (edge.get("config.json", old), edge.head("config.json", old), edge.api(f"/tree/{old}")):
            assert (answer.status, answer.code) == (410, "Retired")
            assert "it leaks; use org/new" in answer.headers["x-error-message"]


def test_xet_hashes_are_never_passed_on(site):
    for gated in (None, "hf_yes"):
        site = replace(site, repo=fresh_name(), files=fresh_files())
        site.commit()
        held = site.hub.repos[f"models/{site.repo}"]
        held.masked_xet, held.gated, held.listed = True, gated, True
        answers = [site.api("/tree/main?recursive=true", token=gated), site.api("?blobs=true", token=gated)]
        answers += [site.head("model.safetensors", token=gated), site.get("model.safetensors", token=gated)]
        for answer in answers:
            assert answer.status == 200
            assert b"xet" not in answer.body[:100_000].lower() or answer is answers[-1]
            assert not any("xet" in f"{name}: {value}".lower() for name, value in answer.headers.items())
        assert answers[-1].body == site.files["model.safetensors"]


def test_what_is_published_here_is_never_looked_for_upstream(site, tmp_path):
    """A name of one's own can't be taken over by whoever owns it at the upstream."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes(b"mine")
    mine = site.helios("push", str(tmp_path / "m"), site.repo)
    site.commit()
    site.commit(ref="v1")
    assert site.get("config.json").body == b"mine"
    assert site.get("README.md").code == "EntryNotFound"
    assert site.get("config.json", "v1").code == "RevisionNotFound"
    assert replace(site, repo="ours/secret-project").get("x").code == "RepoNotFound"
    assert site.hub.seen == []
    assert replace(site, repo=site.repo).get("config.json").headers["x-repo-commit"] == mine


# --- sharing and ranges ----------------------------------------------------------------------------------------------


def test_sixty_four_cold_clients_one_download(site):
    """Each byte is fetched once; whoever comes gets it while it comes."""
    data = weights(20 * MB)
    site.commit({"model.safetensors": data})
    site.hub.bytes_per_s = 8 * MB  # a connection
    with ThreadPoolExecutor(64) as threads:
        heads = list(threads.map(lambda _: site.head("model.safetensors").status, range(64)))
        got = list(threads.map(lambda _: sha(site.get("model.safetensors", timeout=60).body), range(64)))
    assert heads == [200] * 64
    assert set(got) == {sha(data)}
    fetched = site.hub.requests("^/repos/")
    assert sum(request.sent for request in fetched) == len(data)
    starts = sorted(request.span[0] for request in fetched)
    assert starts == list(range(0, len(data), PIECE))
    assert len(site.hub.requests("^/api/models")) == 1
    assert len(site.hub.requests("/resolve/")) <= 8, "where the file is was asked by each first range at most"


def test_a_range_far_ahead_comes_first_and_is_not_the_end_of_it(site, wait_for):
    data = weights(64 * MB)
    site.commit({"model.safetensors": data})
    site.hub.bytes_per_s = 4 * MB
    started = time.monotonic()
    answer = site.get("model.safetensors", range="bytes=50000000-50000999")
    assert (answer.status, answer.body) == (206, data[50_000_000:50_001_000])
    assert answer.headers["content-range"] == f"bytes 50000000-50000999/{len(data)}"
    assert time.monotonic() - started < 4, "not after what lies before it: that takes longer at this rate"
    site.hub.bytes_per_s = None
    assert site.get("model.safetensors", range="bytes=-10").body == data[-10:]
    assert site.get("model.safetensors", range=f"bytes={len(data)}-").status == 416
    assert site.get("model.safetensors").body == data
    assert site.hub.sent("^/repos/") == len(data)


def test_bytes_stream_before_the_file_is_whole_and_leavers_stop_nobody(site, wait_for):
    data = weights(32 * MB)
    site.commit({"model.safetensors": data})
    site.hub.faults = [Fault("^/repos/", first_byte=PIECE, delay_s=1.5)]
    parts = urlsplit(site.registry.url)
    leaver = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    leaver.request("GET", f"/{site.repo}/resolve/main/model.safetensors")
    answer = leaver.getresponse()
    first = answer.read(2 * BLOCK)
    assert first == data[: 2 * BLOCK]
    assert site.hub.sent("^/repos/") < len(data)
    leaver.close()
    wait_for(lambda: site.held(), 20, "the download to be finished though nobody waits")
    assert site.hub.sent("^/repos/") == len(data)
    assert site.get("model.safetensors").body == data


def test_downloads_may_be_told_not_to_finish_what_nobody_wants(alone):
    """registry.mirror_finish = false is told to the downloads; what they do then is tested in test_flights.py."""
    _, open_ = alone
    site = open_(HELIOS_REGISTRY__MIRROR_FINISH="false")
    site.commit()
    assert site.get("model.safetensors").body == site.files["model.safetensors"]


def test_a_killed_registry_goes_on_where_it_was(alone, wait_for):
    hub, open_ = alone
    data = weights(40 * MB)
    hub.commit("org/m", {"model.safetensors": data, "config.json": b"{}"})
    hub.bytes_per_s = 3 * MB
    site = open_()
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(site.get, "model.safetensors")
        wait_for(lambda: hub.sent("^/repos/") > 16 * MB, 20, "the download to be under way")
        site.registry.kill()
        assert reading.exception() is not None
    under_way = sum(1 for request in hub.requests("^/repos/") if request.sent < PIECE)
    (journal,) = (site.helios.home / "registry" / "pulls" / "models" / "org" / "m").glob("*.blocks")
    here = journal.stat().st_size // 4
    assert here >= 8
    hub.bytes_per_s = None
    with hub.lock:
        hub.seen = []
    again = open_()
    assert json.loads(again.native("repos").body)["repos"] == []
    assert again.get("model.safetensors").body == data
    second = hub.sent("^/repos/")
    assert second <= len(data) - here * BLOCK + BLOCK
    assert under_way <= 16


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.one_database
def test_truncation_5xx_and_a_308_on_the_way(site):
    commit = site.commit({**site.files, "big.safetensors": weights(20 * MB)})
    files = site.hub.repos[f"models/{site.repo}"].commits[commit]
    path = f"/{site.repo}/resolve/{commit}/config.json"
    site.hub.faults = [
        Fault("/revision/", status=503),
        Fault("^/repos/", first_byte=PIECE, truncate_at=3 * MB),
        Fault("^/repos/", first_byte=2 * PIECE, status=500),
        Fault("^/repos/", truncate_at=0),
        Fault(f"{path}$", status=308, headers={"Location": f"{path}?again=1"}),
    ]
    assert site.get("config.json").body == site.files["config.json"]
    big = site.get("big.safetensors")
    assert (big.status, sha(big.body)) == (200, files["big.safetensors"].sha256)
    assert site.hub.sent("^/repos/") <= 20 * MB + 200 + 4 * BLOCK
    assert all(fault.times == 0 for fault in site.hub.faults), "every fault has struck"


@pytest.mark.one_database
def test_wrong_bytes_of_the_right_size_never_complete_an_answer(site):
    """The first client's connection breaks, at the latest at the last block; the next one gets the right bytes."""
    data = weights(20 * MB)
    site.commit({"model.safetensors": data})
    site.hub.faults = [Fault("^/repos/", first_byte=PIECE, flip_at=9 * MB)]
    with pytest.raises(http.client.IncompleteRead) as caught:
        site.get("model.safetensors")
    assert len(caught.value.partial) < len(data)
    assert site.get("model.safetensors").body == data


def test_a_small_file_with_wrong_bytes_is_fetched_again_unseen(site):
    site.commit()
    site.hub.faults = [Fault("config.json", flip_at=3)]
    assert site.get("config.json").body == site.files["config.json"]
    assert len(site.hub.requests("config.json")) == 2


def test_wrong_bytes_that_stay_wrong_are_refused(site):
    site.commit()
    site.hub.faults = [Fault("^/repos/", flip_at=2 * MB, times=-1), Fault("config.json", flip_at=3, times=-1)]
    answer = site.get("config.json")
    assert (answer.status, answer.code) == (502, "Integrity")
    with pytest.raises(http.client.IncompleteRead):
        site.get("model.safetensors")
    assert site.held() == {}
    site.hub.faults = []
    assert site.get("model.safetensors").body == site.files["model.safetensors"]


def test_a_slow_head_is_answered_in_time_and_learnt_all_the_same(site, wait_for):
    site.commit()
    site.hub.faults = [Fault("/api/", delay_s=9.0)]
    started = time.monotonic()
    answer = site.head("config.json")
    assert (answer.status, answer.code) == (504, "UpstreamUnavailable")
    assert time.monotonic() - started < 9.5, "clients give up after 10 s"
    wait_for(lambda: site.head("config.json").status == 200, 5, "the late answer to count")
    assert len(site.hub.requests("^/api/models")) == 1


@pytest.mark.one_database
def test_an_upstream_that_is_down_is_no_not_found(alone, wait_for):
    hub, open_ = alone
    site = open_()
    site.commit()
    hub.faults = [Fault(".", status=503, times=-1)]
    for answer in (site.head("config.json"), site.get("config.json")):
        assert (answer.status, answer.code) == (504, "UpstreamUnavailable")
    hub.faults = []
    wait_for(lambda: site.head("config.json").status == 200, 10, "the upstream to be asked again")
    hub.faults = [Fault("/resolve/", status=503, times=-1)]
    answer = site.get("config.json")
    assert answer.status in (503, 504)
    assert answer.code in ("Unavailable", "UpstreamUnavailable")
    site = replace(site, registry=open_("other", HELIOS_REGISTRY__UPSTREAM="http://127.0.0.1:9").registry)
    assert site.head("config.json").code == "UpstreamUnavailable"


@pytest.mark.one_database
def test_a_rate_limit_is_obeyed_by_all_and_told_to_clients(alone):
    hub, open_ = alone
    site = open_()
    site.commit()
    status, headers = rate_limited(60)
    hub.faults = [Fault("/api/", status=status, headers=headers)]
    first = site.head("config.json")
    assert first.status == 429
    assert 50 <= int(first.headers["retry-after"]) <= 61
    assert "t=" in first.headers["ratelimit"]
    other = replace(site, repo=fresh_name())
    other.commit()
    assert other.get("config.json").status == 429
    assert len(hub.seen) == 1, "nobody asks before the time is over"


@pytest.mark.one_database
def test_a_short_rate_limit_is_waited_out(site):
    site.commit()
    status, headers = rate_limited(1)
    site.hub.faults = [Fault(match, status=status, headers=headers) for match in ("/api/", "^/repos/")]
    assert site.get("model.safetensors").body == site.files["model.safetensors"]


def test_refusals_are_believed_for_a_while(site):
    for _ in range(5):
        assert site.head("x").code == "RepoNotFound"
    assert len(site.hub.requests("^/api/models")) == 1
    missing = replace(site, repo=fresh_name())
    missing.commit()
    for _ in range(3):
        assert missing.head("x", "v9").code == "RevisionNotFound"
    assert len(site.hub.requests("/revision/v9")) == 1
    assert missing.head("config.json").status == 200
