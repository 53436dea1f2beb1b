"""Pull-through: refs and history are the upstream's, and a tag of its is one here."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from tests.support.hub_clients import VERSIONS, run_client
from tests.support.hub_site import write
from tests.support.mirror_site import TTL_S, Site, ask, fresh_files, fresh_name, mirror, own_site, renewed, shared_site
from tests.support.upstream import Fault

pytestmark = pytest.mark.both_databases

GATE = "hf_right"


@pytest.fixture(scope="module")
def shared(tmp_path_factory, databases):
    with shared_site(tmp_path_factory.mktemp("mirror"), **databases()) as found:
        yield found


@pytest.fixture
def site(shared):
    with renewed(shared, fresh_files(300_000)) as found:
        yield found


@pytest.fixture
def alone(tmp_path, databases):
    with own_site(tmp_path, 300_000, databases) as found:
        yield found


def with_names(site: Site) -> dict[str, str]:
    """A repository with all kinds of refs; where each points."""

    def numbered(number: int, ref: str, **options) -> str:
        return site.commit({**site.files, "config.json": b"%d" % number}, ref=ref, **options)

    return {
        "v1": numbered(1, "v1", tag=True, title="The first", message="with <more> to say"),
        "main": numbered(2, "main", title="The second"),
        "next": numbered(3, "next", title="The third"),
        "refs/convert/parquet": numbered(4, "refs/convert/parquet"),
        "refs/pr/1": numbered(5, "refs/pr/1"),
    }


def refs(site: Site, query: str = "", **options) -> dict[str, list[dict[str, str]]]:
    answer = site.api(f"/refs{query}", **options)
    assert answer.status == 200, answer
    return {kind: sorted(found, key=lambda ref: ref["ref"]) for kind, found in json.loads(answer.body).items()}


def far(site: Site, path: str):
    """What the upstream itself answers."""
    return json.loads(ask(site.hub.url, f"/api/models/{site.repo}{path}", user_agent="hf_hub/test").body)


def test_refs_are_the_upstreams_before_anybody_has_asked_for_them(site):
    at = with_names(site)
    for query in ("", "?include_prs=1"):
        wanted = far(site, f"/refs{query}")
        assert refs(site, query) == {kind: sorted(found, key=lambda r: r["ref"]) for kind, found in wanted.items()}
    found = refs(site, "?include_prs=true")
    assert [ref["name"] for ref in found["tags"]] == ["v1"]
    assert {ref["name"]: ref["targetCommit"] for ref in found["branches"]} == {"main": at["main"], "next": at["next"]}
    assert len(site.hub.requests("/refs$")) <= 3 + 2, "an answer is believed for as long as a ref's is"
    before = len(site.hub.seen)
    refs(site)
    refs(site, "?include_prs=1")
    assert len(site.hub.seen) == before


def test_new_refs_are_seen_after_their_time_and_what_is_known_when_the_upstream_fails(site):
    site = replace(site, repo=fresh_name("brief"))
    with_names(site)
    assert [ref["name"] for ref in refs(site)["branches"]] == ["main", "next"]
    late = site.commit({**site.files, "config.json": b"6"}, ref="late")
    time.sleep(TTL_S)
    assert {"name": "late", "ref": "refs/heads/late", "targetCommit": late} in refs(site)["branches"]
    site.hub.faults = [Fault("/api/", status=503, times=-1)]
    time.sleep(TTL_S)
    answer = site.api("/refs")
    assert [ref["name"] for ref in json.loads(answer.body)["branches"]] == ["late", "main", "next"]
    assert "may be out of date" in answer.headers["x-hf-warning"]


def test_a_ref_is_where_it_is_here_and_ones_own_are_listed_beside_it(site, tmp_path, wait_for):
    site = replace(site, repo=fresh_name("slow"))
    at = with_names(site)
    for path in site.files:
        assert site.get(path).status == 200
    wait_for(lambda: site.held() == {"main": at["main"]}, 10, "the snapshot to be published")
    moved = site.commit({**site.files, "config.json": b"7"})
    time.sleep(0.6)
    mine = site.helios("push", str(write(tmp_path / "m", {"config.json": b"mine"})), f"{site.repo}@mine")
    found = {ref["name"]: ref["targetCommit"] for ref in refs(site)["branches"]}
    assert found == {"main": at["main"], "next": at["next"], "mine": mine}, "main waits for approval"
    assert moved not in found.values()


def test_a_tag_of_the_upstream_is_a_tag(site, wait_for):
    """Asked for or pulled; and the upstream may move its own."""
    at = with_names(site)
    for path in site.files:
        assert site.get(path, "v1").status == 200
    wait_for(lambda: site.held() == {"v1": at["v1"]}, 10, "the snapshot to be published")
    native = json.loads(site.native(f"refs?repo=models/{site.repo}").body)
    assert native == {"refs": {"v1": at["v1"]}, "kinds": {"v1": "tag"}}
    pulled = replace(site, repo=fresh_name("brief"))
    at = with_names(pulled)
    pulled.helios("pull", f"{pulled.repo}@v1")
    pulled.helios("pull", f"{pulled.repo}@next")
    native = json.loads(site.native(f"refs?repo=models/{pulled.repo}").body)
    assert native == {"refs": {"next": at["next"], "v1": at["v1"]}, "kinds": {"v1": "tag"}}
    moved = replace(site, repo=fresh_name("brief"))
    with_names(moved)
    for path in moved.files:
        moved.get(path, "v1")
    wait_for(lambda: "v1" in moved.held(), 10, "the snapshot to be published")
    other = moved.commit({**moved.files, "config.json": b"8"}, ref="v1")
    time.sleep(TTL_S)
    for path in moved.files:
        assert moved.get(path, "v1").headers["x-repo-commit"] == other
    wait_for(lambda: moved.held() == {"v1": other}, 10, "the tag to follow")


def test_history_is_the_upstreams(site):
    at = with_names(site)
    answer = site.api("/commits/main?expand[]=formatted")
    found = json.loads(answer.body)
    wanted = far(site, "/commits/main")
    assert [(c["id"], c["title"], c["message"], c["date"]) for c in found] == [
        (c["id"], c["title"], c["message"], c["date"]) for c in wanted
    ]
    assert [author["user"] for author in found[0]["authors"]] == ["somebody"]
    first = json.loads(site.api("/commits/v1?expand[]=formatted").body)[-1]
    assert (first["title"], first["formatted"]["message"]) == ("The first", "with &lt;more&gt; to say")
    page = site.api("/commits/next?limit=1")
    assert [c["id"] for c in json.loads(page.body)] == [at["next"]]
    assert 'rel="next"' in page.headers["link"]
    assert site.hub.url not in page.headers["link"]
    assert [c["id"] for c in json.loads(site.api("/commits/next?limit=1&p=1").body)] == [at["main"]]
    before = len(site.hub.seen)
    assert json.loads(site.api("/commits/main").body) == json.loads(site.api("/commits/main").body)
    assert len(site.hub.seen) == before
    # Where the upstream can't be asked: what is known, and a warning.
    other = replace(site, repo=fresh_name())
    commit = with_names(other)["main"]
    assert other.head("config.json").status == 200
    site.hub.faults = [Fault("/commits/", status=503, times=-1)]
    answer = other.api("/commits/main")
    assert [c["id"] for c in json.loads(answer.body)] == [commit]
    assert "may be incomplete" in answer.headers["x-hf-warning"]


def test_offline_what_is_known_is_told(alone):
    _, open_ = alone
    site = open_()
    at = with_names(site)
    told = refs(site)
    site.registry.kill()
    again = replace(open_(HELIOS_REGISTRY__OFFLINE="true"), repo=site.repo)
    assert refs(again) == told
    assert [c["id"] for c in json.loads(again.api("/commits/main").body)] == [at["main"]]


def test_names_of_a_gated_repository_are_asked_for_with_the_callers_token(site, tmp_path, databases):
    at = with_names(site)
    held = site.hub.repos[f"models/{site.repo}"]
    held.gated = GATE
    assert site.api("/refs").code == "GatedRepo"
    assert [ref["name"] for ref in refs(site, token=GATE)["branches"]] == ["main", "next"]
    assert json.loads(site.api("/commits/main", token=GATE).body)[0]["id"] == at["main"]
    for path in ("/refs", "/commits/main"):
        assert site.api(path).code == "GatedRepo"
    with mirror(tmp_path / "edge", site.registry.url, **databases()) as (_, near):
        edge = replace(site, registry=near)
        assert edge.api("/refs").code == "GatedRepo"
        assert refs(edge, "?include_prs=1", token=GATE) == refs(site, "?include_prs=1", token=GATE)


def test_an_upstream_without_sense_is_not_believed(site):
    at = with_names(site)
    assert site.head("config.json").status == 200
    odd = json.dumps({"branches": [{"name": "x"}]}).encode()
    site.hub.faults = [
        Fault("/refs", status=200, body=odd, times=-1), Fault("/commits/", status=200, body=b'[{"id": 3}]', times=-1)
    ]  # fmt: skip
    answer = site.api("/refs")
    assert [ref["targetCommit"] for ref in json.loads(answer.body)["branches"]] == [at["main"]]
    assert "does not answer like a Hub" in answer.headers["x-hf-warning"]
    assert len(json.loads(site.api("/commits/main").body)) == 1


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS)
def test_clients_list_refs_and_history(site, version, tmp_path):
    at = with_names(site)
    script = f"""
    refs = api.list_repo_refs({site.repo!r}, include_pull_requests=True)
    result = [
        {{kind: {{ref.ref: ref.target_commit for ref in getattr(refs, kind)}}
         for kind in ("branches", "tags", "converts", "pull_requests")}},
        [[commit.commit_id, commit.title] for commit in api.list_repo_commits({site.repo!r}, revision="next")],
    ]
    """
    found, history = run_client(version, script, site.registry.url, tmp_path)
    assert found == {
        "branches": {"refs/heads/main": at["main"], "refs/heads/next": at["next"]},
        "tags": {"refs/tags/v1": at["v1"]},
        "converts": {"refs/convert/parquet": at["refs/convert/parquet"]},
        "pull_requests": {"refs/pr/1": at["refs/pr/1"]},
    }
    assert history == [[at["next"], "The third"], [at["main"], "The second"]]
