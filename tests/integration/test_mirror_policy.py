"""Pull-through: who may read what, which commit a ref is, and when the upstream is asked."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import replace

import pytest

from tests.support.hub_clients import run_client
from tests.support.mirror_site import (
    TTL_S,
    Site,
    ask,
    fresh_files,
    fresh_name,
    mirror,
    own_site,
    renewed,
    shared_site,
)
from tests.support.upstream import Fault

TOKEN, OTHER = "hf_right", "hf_wrong"

pytestmark = pytest.mark.both_databases


@pytest.fixture(scope="module")
def shared(tmp_path_factory, databases):
    settings = {"HELIOS_LOG__LEVEL": "debug", **databases()}
    with shared_site(tmp_path_factory.mktemp("mirror"), **settings) as found:
        yield found


@pytest.fixture
def site(shared):
    with renewed(shared, fresh_files(300_000)) as found:
        yield found


@pytest.fixture
def alone(tmp_path, databases):
    with own_site(tmp_path, 300_000, databases) as found:
        yield found


def held(site: Site):
    """The repository at the simulated Hub."""
    return site.hub.repos[f"models/{site.repo}"]


def number(files: dict[str, bytes], what: int) -> dict[str, bytes]:
    return {**files, "config.json": b"%d" % what}


# --- refs ------------------------------------------------------------------------------------------------------------


def test_a_ref_is_asked_for_again_after_its_time(site):
    site = replace(site, repo=fresh_name("brief"))
    first = site.commit(number(site.files, 1))
    assert site.head("config.json").headers["x-repo-commit"] == first
    second = site.commit(number(site.files, 2))
    time.sleep(TTL_S)
    assert site.head("config.json").headers["x-repo-commit"] == second
    assert site.get("config.json").body == b"2"
    assert site.get("config.json", first).body == b"1", "the commit from before stays"
    # Asked again, and nothing has moved: one short question.
    before = len(site.hub.seen)
    time.sleep(TTL_S)
    assert site.get("config.json").body == b"2"
    assert [(r.path, r.query) for r in site.hub.seen[before:]] == [(f"/api/models/{site.repo}/revision/main", "")]


def test_a_ref_is_not_asked_for_before_its_time(site):
    first = site.commit(number(site.files, 1))
    assert site.head("config.json").headers["x-repo-commit"] == first
    site.commit(number(site.files, 2))
    assert site.head("config.json").headers["x-repo-commit"] == first
    assert len(site.hub.requests("^/api/")) == 1


def test_a_force_push_leaves_what_was_here(site, wait_for):
    site = replace(site, repo=fresh_name("brief"))
    old = site.commit(number(site.files, 1))
    for path in site.files:
        site.get(path)
    wait_for(lambda: site.held() == {"main": old}, 10, "the old commit to be published")
    new = site.commit(number(site.files, 2))
    del held(site).commits[old]
    time.sleep(TTL_S)
    assert site.get("config.json").body == b"2"
    assert site.head("config.json").headers["x-repo-commit"] == new
    assert site.head("README.md").headers["x-repo-commit"] == new
    assert site.get("config.json", old).body == b"1"
    assert site.held() == {"main": old} or site.held() == {"main": new}
    for path in site.files:
        site.get(path)
    assert len(site.hub.requests("README.md$")) == 1, "what has not changed is not fetched again"
    wait_for(lambda: site.held() == {"main": new}, 10, "the new commit to be published")
    assert site.get("config.json", old).body == b"1"


def test_what_is_known_is_served_when_the_upstream_fails_with_a_warning(site):
    site = replace(site, repo=fresh_name("brief"))
    commit = site.commit()
    assert site.get("config.json").status == 200
    site.hub.faults = [Fault("/api/", status=503, times=-1)]
    time.sleep(TTL_S)
    started = time.monotonic()
    answer = site.head("config.json")
    assert (answer.status, answer.headers["x-repo-commit"]) == (200, commit)
    assert answer.headers["x-hf-warning"].startswith("mirror; ")
    assert "may be out of date" in answer.headers["x-hf-warning"]
    assert time.monotonic() - started < 5
    asked = len(site.hub.requests("^/api/"))
    assert site.get("config.json").body == site.files["config.json"]
    assert len(site.hub.requests("^/api/")) <= asked + 3, "it is not asked at every turn while it fails"
    # A repository that is gone upstream, too, is served as it was.
    site.hub.faults = []
    other = replace(site, repo=fresh_name("brief"))
    other.commit()
    other.get("config.json")
    del site.hub.repos[f"models/{other.repo}"]
    time.sleep(TTL_S)
    gone = other.get("config.json")
    assert (gone.status, gone.body) == (200, other.files["config.json"])
    assert "x-hf-warning" in gone.headers


def test_what_a_commit_holds_never_changes_whatever_the_upstream_says_later(site):
    """Clients keep the tree of a commit for ever, so it has to stay what they were told first."""
    site = replace(site, repo=fresh_name("brief"))
    first = site.commit(number(site.files, 1))
    tree = json.loads(site.api(f"/tree/{first}?recursive=true").body)
    other = site.commit(number({**site.files, "more.txt": b"more"}, 2))
    time.sleep(TTL_S)
    assert site.head("config.json").headers["x-repo-commit"] == other
    # The upstream goes back to the first commit, and lists other files for it now.
    commits = held(site).commits
    commits[first] = commits[other]
    site.hub.move(site.repo, "main", first)
    time.sleep(TTL_S)
    assert site.head("config.json").headers["x-repo-commit"] == first
    for revision in ("main", first):
        assert json.loads(site.api(f"/tree/{revision}?recursive=true").body) == tree
        assert site.head("more.txt", revision).code == "EntryNotFound"
    answer = site.get("config.json")
    assert (answer.status, answer.code) == (502, "Integrity"), "other bytes than were listed are nobody's"


def test_a_pinned_ref_is_never_asked_for_again(site):
    site = replace(site, repo=fresh_name("pinned"))
    first = site.commit(number(site.files, 1))
    assert site.get("config.json").body == b"1"
    site.commit(number(site.files, 2))
    time.sleep(TTL_S)
    assert site.get("config.json").body == b"1"
    assert site.head("config.json").headers["x-repo-commit"] == first
    assert len(site.hub.requests("^/api/")) == 1


def test_a_move_waits_for_approval(site, wait_for):
    site = replace(site, repo=fresh_name("slow"))
    first = site.commit(number(site.files, 1))
    assert site.get("config.json").body == b"1"
    second = site.commit(number(site.files, 2))
    time.sleep(0.6)
    assert site.get("config.json").body == b"1"
    wanted = {"repo": f"models/{site.repo}", "ref": "main", "commit": first, "pending": second, "policy": "approve"}

    def listed() -> dict:
        (found,) = [ref for ref in json.loads(site.helios("mirror", "ls", "--json")) if ref["repo"] == wanted["repo"]]
        assert time.time() - 60 < found.pop("checked") <= time.time() + 1
        return found

    assert listed() == wanted
    assert f"{site.repo}@main" in site.helios("mirror", "ls")
    out = site.helios.both("mirror", "approve", site.repo, "0" * 40, code=1)[1]
    assert f"{second} does" in out
    assert site.helios("mirror", "approve", site.repo) == second
    assert site.get("config.json").body == b"2"
    assert listed() == {**wanted, "commit": second, "pending": None}
    assert "nothing waits" in site.helios.both("mirror", "approve", site.repo, code=1)[1]
    assert "is not followed" in site.helios.both("mirror", "approve", f"{site.repo}@v9", code=1)[1]
    # What moves back by itself waits no more.
    third = site.commit(number(site.files, 3))
    time.sleep(0.6)
    site.get("config.json")
    assert listed()["pending"] == third
    site.hub.move(site.repo, "main", second)
    time.sleep(0.6)
    site.get("config.json")
    assert listed()["pending"] is None


def test_a_pull_moves_a_followed_ref_and_rm_forgets_it(site):
    site = replace(site, repo=fresh_name("pinned"))
    site.commit(number(site.files, 1))
    assert site.get("config.json").body == b"1"
    second = site.commit(number(site.files, 2))
    assert site.helios("pull", site.repo) == second
    assert site.get("config.json").body == b"2"
    assert site.held() == {"main": second}
    site.helios("rm", "--yes", site.repo)
    third = site.commit(number(site.files, 3))
    assert site.head("config.json").headers["x-repo-commit"] == third
    assert site.held() == {}
    site.helios("rm", "--yes", site.repo)
    assert site.native(f"refs?repo=models/{site.repo}").status == 404


def test_other_revisions_of_what_was_pulled(site):
    site.commit(number(site.files, 1), ref="v1")
    main = site.commit(number(site.files, 2))
    assert site.helios("pull", site.repo) == main
    assert site.get("config.json", "v1").body == b"1"
    assert site.get("config.json").body == b"2"


def test_datasets_and_one_segment_names(site):
    site.hub.commit("squad", {"x.csv": b"1,2"}, kind="datasets")
    site.hub.commit("gpt2", {"config.json": b"{}"})
    assert ask(site.registry.url, "/datasets/squad/resolve/main/x.csv").body == b"1,2"
    assert ask(site.registry.url, "/gpt2/resolve/main/config.json").body == b"{}"
    assert ask(site.registry.url, "/squad/resolve/main/x.csv").code == "RepoNotFound"


# --- who may read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["gated", "gated, listed", "private"])
def test_restricted_repositories_need_the_callers_own_token(site, how, wait_for):
    commit = site.commit()
    if how == "private":
        held(site).private = TOKEN
        code = "RepoNotFound"
    else:
        held(site).gated, held(site).listed = TOKEN, how == "gated, listed"
        code = "GatedRepo"
    for token in (None, OTHER):
        for answer in (site.get("config.json", token=token), site.api("/tree/main", token=token)):
            assert answer.status in (401, 403, 404)
            assert answer.code == code
    asked = len(site.hub.seen)
    assert site.get("config.json", token=OTHER).code == code
    assert len(site.hub.seen) == asked, "a refusal is believed for a while"
    for path, data in site.files.items():
        assert site.get(path, token=TOKEN).body == data
    wait_for(lambda: site.held() == {"main": commit}, 10, "the snapshot to be published")
    # All bytes are here, and still only who may read them upstream gets them.
    for token in (None, OTHER):
        assert site.get("config.json", token=token).code == code
        assert site.get("config.json", commit, token=token).code == code
        assert site.api(token=token).code == code
        assert site.api(f"/xet-read-token/{commit}", token=token).code == code
    asked = len(site.hub.seen)
    assert site.get("model.safetensors", commit, token=TOKEN).body == site.files["model.safetensors"]
    assert len(site.hub.seen) == asked, "a permission is believed for a while"
    assert json.loads(site.api(token=TOKEN).body)["gated"] == "auto"
    assert site.api(f"/xet-read-token/{commit}", token=TOKEN).status == 200
    log = site.registry.log.read_text()
    assert f'"repo": "models/{site.repo}"' in log, "there is a log, and what was done is in it"
    database = b"".join(path.read_bytes() for path in (site.helios.home / "registry").glob("metadata.db*"))
    assert site.repo not in ask(site.registry.url, "/api/models?limit=1000").body.decode(), "nor is it listed"
    for token in (TOKEN, OTHER):
        assert token not in log
        assert token.encode() not in database


def test_nobody_is_let_in_while_the_upstream_can_not_be_asked(alone):
    """That a permission ends, and when: tests/unit/registry_mirror/test_permissions.py."""
    hub, open_ = alone
    site = open_()
    site.commit()
    held(site).gated = TOKEN
    assert site.get("config.json", token=TOKEN).status == 200
    hub.faults = [Fault("/resolve/", status=503, times=-1)]
    other = site.get("config.json", token=OTHER)
    assert (other.status, other.code) == (504, "UpstreamUnavailable"), "nobody is let in unasked"
    assert site.get("config.json", token=TOKEN).status == 200


def test_a_repository_that_becomes_gated(site):
    site = replace(site, repo=fresh_name("brief"))
    site.commit()
    assert site.get("config.json").status == 200
    held(site).gated = TOKEN
    time.sleep(TTL_S)
    assert site.get("config.json").code == "GatedRepo"
    assert site.get("config.json", token=TOKEN).body == site.files["config.json"]


def test_the_registrys_own_token_opens_nothing_for_others(alone):
    _, open_ = alone
    site = open_(HF_TOKEN=TOKEN)
    site.commit()
    held(site).gated = TOKEN
    assert site.get("config.json").code == "GatedRepo"
    assert site.get("config.json", token=OTHER).code == "GatedRepo"
    assert site.get("model.safetensors", token=TOKEN).body == site.files["model.safetensors"]
    assert site.get("model.safetensors").code == "GatedRepo"
    # Public content is fetched with it, and what an operator pulls is for all.
    public = replace(site, repo="org/public")
    public.commit()
    assert public.get("config.json").status == 200
    pulled = replace(site, repo="org/pulled")
    pulled.commit()
    held(pulled).gated = TOKEN
    pulled.helios("pull", pulled.repo)
    assert pulled.get("config.json").body == site.files["config.json"]


def test_gates_hold_through_a_chain(site, tmp_path, databases):
    site.commit()
    held(site).gated, held(site).listed = TOKEN, True
    with mirror(tmp_path / "edge", site.registry.url, **databases()) as (_, near):
        edge = replace(site, registry=near)
        assert edge.get("config.json").code == "GatedRepo"
        assert edge.get("config.json", token=OTHER).code == "GatedRepo"
        for path, data in site.files.items():
            assert edge.get(path, token=TOKEN).body == data
        assert edge.get("config.json").code == "GatedRepo"


@pytest.mark.one_database
def test_clients_name_the_gate(site, tmp_path):
    site.commit()
    held(site).gated = TOKEN
    script = f"""
    result = [raised(hf_hub_download, {site.repo!r}, "config.json", token=False),
              tree(snapshot_download({site.repo!r}, token={TOKEN!r}))]
    """
    errors, files = run_client("2.4.0", script, site.registry.url, tmp_path)
    assert "GatedRepoError" in errors
    assert set(files) == set(site.files)


# --- offline, off, whole snapshots, rules ----------------------------------------------------------------------------


def test_offline_and_off(alone, wait_for):
    hub, open_ = alone
    site = open_()
    main = site.commit()
    for path in site.files:
        site.get(path)
    half = replace(site, repo="org/half", files=fresh_files(300_000))
    half.commit()
    assert half.get("config.json").status == 200
    secret = replace(site, repo="org/secret")
    secret.commit()
    held(secret).gated = TOKEN
    assert secret.get("config.json", token=TOKEN).status == 200
    wait_for(lambda: site.held() == {"main": main}, 10, "the snapshot to be published")
    site.registry.kill()
    time.sleep(TTL_S)
    with hub.lock:
        hub.seen = []
    for name, env in (("offline", {"HELIOS_REGISTRY__OFFLINE": "true"}), ("off", {"HELIOS_REGISTRY__MIRROR": "off"})):
        again = open_(**env)
        assert replace(again, repo=site.repo).get("model.safetensors").body == site.files["model.safetensors"]
        assert replace(again, repo=half.repo).get("config.json").body == half.files["config.json"]
        missing = replace(again, repo=half.repo).get("model.safetensors")
        assert (missing.status, missing.code) == (504, "UpstreamUnavailable")
        unknown = replace(again, repo="org/none").get("x")
        assert unknown.code == "RepoNotFound"
        assert ("offline" in unknown.headers["x-error-message"]) == (name == "offline")
        assert replace(again, repo=site.repo).get("x", "v9").code == "RevisionNotFound"
        assert replace(again, repo=secret.repo).get("config.json", token=TOKEN).code == "GatedRepo"
        if name == "offline":
            assert "offline" in again.helios.both("pull", "org/none", code=1)[1]
        again.registry.kill()
    assert hub.seen == []


def test_one_file_brings_all_where_that_is_wanted(alone, wait_for):
    hub, open_ = alone
    site = open_(HELIOS_REGISTRY__MIRROR_COMPLETE="true")
    commit = site.commit()
    assert site.head("config.json").status == 200
    wait_for(lambda: site.held() == {"main": commit}, 10, "all files to come")
    assert site.get("model.safetensors").body == site.files["model.safetensors"]
    assert len(hub.requests("^/repos/")) == 1


def test_pickles_are_not_let_through_ahead_of_the_scan(site):
    """docs/registry-admission.md: what would be kept back after a pull is kept back before it, too."""

    class Evil:
        def __reduce__(self):
            return eval, ("1+1",)

    site.commit({"config.json": b"{}", "model.pkl": pickle.dumps(Evil()), "plain.txt": b"text"})
    answer = site.get("model.pkl")
    assert (answer.status, answer.code) == (403, "Quarantined")
    assert "eval" in answer.headers["x-error-message"]
    assert site.get("plain.txt").body == b"text"
    assert site.get("model.pkl").code == "Quarantined"


def test_formats_that_are_not_taken_are_refused_before_any_byte(alone):
    hub, open_ = alone
    rules = json.dumps([{"repo": "*", "formats": ["safetensors"]}])
    site = open_(HELIOS_REGISTRY__ADMISSION=rules)
    site.commit({"model.safetensors": site.files["model.safetensors"], "model.gguf": b"GGUF"})
    assert site.get("model.safetensors").code == "NotAdmitted"
    assert hub.requests("/resolve/") == []


def test_the_native_api_is_no_way_around_a_gate(site, wait_for):
    """Nodes, too, show a token that the upstream lets in; a placement seals its addresses; the own user needs none."""
    commit = site.commit()
    held(site).gated = TOKEN
    for path in site.files:
        assert site.get(path, token=TOKEN).status == 200
    wait_for(lambda: site.held() == {"main": commit}, 10, "the snapshot to be published")
    repo = f"repo=models/{site.repo}"
    calls = [
        f"content?{repo}&commit={commit}", f"manifest?{repo}&commit={commit}", f"refs?{repo}", f"usage?{repo}",
        f"resolve?{repo}&rev=main", f"commits?{repo}&rev=main", f"bundles?rev=models/{site.repo}@main",
    ]  # fmt: skip
    for call in calls:
        for token in (None, OTHER):
            refused = ask(site.registry.url, f"/api/v1/{call}", token=token)
            assert (refused.status, json.loads(refused.body)["error"]["code"]) == (403, "GatedRepo"), call
        assert ask(site.registry.url, f"/api/v1/{call}", token=TOKEN).status == 200, call
    assert site.repo not in site.native("repos").body.decode(), "nor is it listed"
    assert site.repo not in site.native("mirror").body.decode()
    assert site.repo not in site.native("usage?all=true").body.decode()
    content = json.loads(ask(site.registry.url, f"/api/v1/{calls[0]}", token=TOKEN).body)
    at = content["blobs"][0]["placement"]["objects"][0]
    assert ask(site.registry.url, at["url"].partition("?")[0]).status == 403
    assert ask(site.registry.url, at["url"].partition("?")[0], token=TOKEN).status == 403
    own = site.registry.client(site.registry.socket)
    assert ask(site.registry.url, at["url"]).body == own.http.bytes("GET", at["url"].partition("?")[0])
    own.close()
