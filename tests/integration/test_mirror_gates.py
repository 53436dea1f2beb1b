"""Pull-through: no call of the Hub API is a way around a gate, and what follows an upstream is not for pushes."""

from __future__ import annotations

import base64
import json

import pytest

from registry.hub.api import TICKETED
from registry.hub.paths import API_ENDS, API_MARKERS
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.hub_site import write
from tests.support.mirror_site import Site, ask, fresh_files, own_site, renewed, shared_site
from tests.support.upstream import Fault

TOKEN, OTHER = "hf_right", "hf_wrong"

pytestmark = pytest.mark.both_databases

SHARD = "model-00001-of-00001.safetensors"


def one_file(text: str, path: str = "mine.txt") -> bytes:
    """The body of a commit."""
    content = {"path": path, "content": base64.b64encode(text.encode()).decode(), "encoding": "base64"}
    lines = [{"key": "header", "value": {"summary": "mine"}}, {"key": "file", "value": content}]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


BATCH = json.dumps({"operation": "upload", "objects": [{"oid": "ab" * 32, "size": 3}]}).encode()
PREUPLOAD = json.dumps({"files": [{"path": "mine.txt", "size": 4, "sample": "bWluZQ=="}]}).encode()
FORM = b"paths=config.json&expand=false"

CALLS = {
    "info": [("GET", "/api/models/{repo}", b""), ("GET", "/api/models/{repo}/revision/{commit}?blobs=true", b"")],
    "tree": [("GET", "/api/models/{repo}/tree/main", b""), ("GET", "/api/models/{repo}/tree/{commit}", b"")],
    "paths-info": [("POST", "/api/models/{repo}/paths-info/main", FORM)],
    "commits": [("GET", "/api/models/{repo}/commits/main", b"")],
    "refs": [("GET", "/api/models/{repo}/refs", b"")],
    "resolve": [("GET", "/{repo}/resolve/main/config.json", b""),
                ("HEAD", "/{repo}/resolve/{commit}/config.json", b"")],
    "auth-check": [("GET", "/api/models/{repo}/auth-check", b""), ("GET", "/api/models/{repo}/auth-check/write", b"")],
    "lfs-files": [("GET", "/api/models/{repo}/lfs-files", b"")],
    "safetensors-metadata": [("GET", "/api/models/{repo}/safetensors-metadata/model.safetensors.index.json", b"")],
    "xet-read-token": [("GET", "/api/models/{repo}/xet-read-token/{commit}", b"")],
    "xet-write-token": [("GET", "/api/models/{repo}/xet-write-token/mine", b"")],
    "preupload": [("POST", "/api/models/{repo}/preupload/mine", PREUPLOAD)],
    "commit": [("POST", "/api/models/{repo}/commit/main", one_file("x")),
               ("POST", "/api/models/{repo}/commit/mine", one_file("x"))],
    "branch": [("POST", "/api/models/{repo}/branch/mine2", b"{}"), ("DELETE", "/api/models/{repo}/branch/mine", b"")],
    "tag": [("POST", "/api/models/{repo}/tag/main", b'{"tag": "t2"}'), ("DELETE", "/api/models/{repo}/tag/t1", b"")],
    "lfs": [("POST", "/{repo}.git/info/lfs/objects/batch", BATCH),
            ("POST", "/{repo}.git/info/lfs/objects/verify", b'{"oid": "%s", "size": 3}' % (b"ab" * 32))],
}  # fmt: skip
"""Every call about one repository, by its verb."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory, databases):
    with shared_site(tmp_path_factory.mktemp("mirror"), **databases()) as found:
        yield found


@pytest.fixture
def site(shared):
    with renewed(shared, fresh_files(300_000)) as found:
        yield found


def held(site: Site):
    """The repository at the simulated Hub."""
    return site.hub.repos[f"models/{site.repo}"]


def send(site: Site, method: str, path: str, body: bytes = b"", token: str | None = None):
    kind = "application/x-www-form-urlencoded" if body == FORM else "application/json"
    return ask(site.registry.url, path, method, token, content_type=kind, body=body)


def commit_to(site: Site, branch: str, text: str, token: str | None = None):
    return send(site, "POST", f"/api/models/{site.repo}/commit/{branch}", one_file(text), token)


@pytest.mark.parametrize("how", ["gated", "private"])
def test_every_call_about_a_restricted_repository_asks_its_gate(site, how, wait_for):
    """With all bytes here, and with every call there is: one that is new has to be added here."""
    verbs = {"info" if marker == "revision" else marker for marker in API_MARKERS} | set(API_ENDS)
    assert set(CALLS) == (verbs | {"resolve", "lfs"}) - TICKETED
    index = {"metadata": {}, "weight_map": {"w": SHARD}}
    files = {
        "config.json": site.files["config.json"],
        "model.safetensors.index.json": json.dumps(index).encode(),
        SHARD: site.files["model.safetensors"],
    }
    commit = site.commit(files)
    if how == "gated":
        held(site).gated = TOKEN
    else:
        held(site).private = TOKEN
    for path in files:
        assert site.get(path, token=TOKEN).status == 200
    wait_for(lambda: site.held() == {"main": commit}, 10, "the snapshot to be published")
    made = [
        ("POST", "/api/models/{repo}/branch/mine", b"{}"),
        ("POST", "/api/models/{repo}/tag/main", b'{"tag": "t1"}'),
    ]
    for method, path, body in made:
        assert send(site, method, path.format(repo=site.repo), body, TOKEN).status == 200
    code = "GatedRepo" if how == "gated" else "RepoNotFound"
    for verb, calls in CALLS.items():
        for method, path, body in calls:
            for token in (None, OTHER):
                answer = send(site, method, path.format(repo=site.repo, commit=commit), body, token)
                assert answer.code == code, f"{verb}: {method} {path} with {token}: {answer}"
                assert b"main" not in answer.body.replace(site.repo.encode(), b"").replace(b"@main", b"")
    assert site.held() == {"main": commit, "mine": commit, "t1": commit}
    name = site.repo.split("/")
    create = json.dumps({"organization": name[0], "name": name[1], "type": "model"}).encode()
    assert send(site, "POST", "/api/repos/create", create).code == code, "nor is it told that the name is taken"
    # Who may read it upstream gets an answer from each, of which only that for the branch that is followed is no.
    for verb in ("info", "refs", "safetensors-metadata", "lfs", "preupload"):
        for method, path, body in CALLS[verb]:
            answer = send(site, method, path.format(repo=site.repo, commit=commit), body, TOKEN)
            assert answer.code in (None, "EntryNotFound"), f"{verb}: {answer}"
    assert commit_to(site, "main", "mine", TOKEN).code == "Conflict"
    assert commit_to(site, "mine", "mine", TOKEN).status == 200


# --- who may write ---------------------------------------------------------------------------------------------------


def refused(text: str, site: Site, ref: str = "main") -> bool:
    return f"{site.repo}@{ref} follows the upstream" in text and "helios mirror detach" in text


def test_what_follows_the_upstream_is_not_for_pushes(site, tmp_path):
    """Neither while only its listing is here nor when all of it is, by no call, and whoever asks."""
    commit = site.commit()
    site.commit(number := {**site.files, "config.json": b"v1"}, ref="v1")
    assert site.get("config.json").status == 200
    mine = write(tmp_path / "m", {"config.json": b"mine"})
    for _ in range(2):
        for answer in (
            commit_to(site, "main", "mine"),
            commit_to(site, "v1", "mine"),
            send(site, "POST", f"/api/models/{site.repo}/preupload/main", PREUPLOAD),
            send(site, "POST", f"/api/models/{site.repo}/branch/v1", b"{}"),
            send(site, "POST", f"/api/models/{site.repo}/tag/main", b'{"tag": "v1"}'),
            send(site, "DELETE", f"/api/models/{site.repo}/branch/v1"),
        ):
            assert (answer.status, answer.code) == (409, "Conflict"), answer
            assert refused(answer.headers["x-error-message"], site, "v1") or refused(answer.body.decode(), site)
        assert refused("".join(site.helios.both("push", str(mine), site.repo, code=1)), site)
        assert refused("".join(site.helios.both("push", str(mine), f"{site.repo}@v1", code=1)), site, "v1")
        name = site.repo.split("/")
        create = json.dumps({"organization": name[0], "name": name[1], "type": "model"}).encode()
        assert send(site, "POST", "/api/repos/create", create).status == 409
        assert site.get("config.json").body == site.files["config.json"]
        assert site.get("config.json", "v1").body == b"v1" == number["config.json"]
        site.helios("pull", site.repo)  # and the same once more with all of it here
    wanted = json.dumps({"commit": site.held().get("v1", commit), "expect": commit}).encode()
    moved = send(site, "PUT", f"/api/v1/refs?repo=models/{site.repo}&ref=main", wanted)
    assert (moved.status, json.loads(moved.body)["error"]["code"]) == (409, "Conflict")
    assert site.held()["main"] == commit


def test_branches_of_ones_own_beside_those_of_the_upstream(site, tmp_path):
    site.commit()
    assert site.get("config.json").status == 200
    mine = write(tmp_path / "m", {"config.json": b"mine"})
    pushed = site.helios("push", str(mine), f"{site.repo}@mine")
    assert site.get("config.json", "mine").body == b"mine"
    assert site.get("config.json").body == site.files["config.json"]
    assert commit_to(site, "mine", "more").status == 200
    assert send(site, "POST", f"/api/models/{site.repo}/branch/other", b'{"startingPoint": "mine"}').status == 200
    assert site.get("mine.txt", "other").body == b"more"
    assert site.get("config.json", pushed).body == b"mine"
    # The upstream comes to have one of the same name: ours stays ours.
    site.commit(ref="mine")
    assert commit_to(site, "mine", "still mine").status == 200
    assert site.get("mine.txt", "mine").body == b"still mine"


@pytest.mark.parametrize("whole", [False, True])
def test_an_administrator_detaches_a_ref_and_rm_follows_it_again(site, tmp_path, whole, wait_for):
    commit = site.commit()
    for path in site.files if whole else ["config.json"]:
        assert site.get(path).status == 200
    if whole:
        wait_for(lambda: site.held() == {"main": commit}, 10, "the snapshot to be published")
    mine = write(tmp_path / "m", {"config.json": b"mine"})
    site.helios("mirror", "detach", site.repo)
    assert f"{site.repo}@main" not in site.helios("mirror", "ls")
    assert "not followed" in "".join(site.helios.both("mirror", "detach", site.repo, code=1))
    if whole:
        assert site.get("config.json").body == site.files["config.json"], "what is here stays"
    else:
        assert site.get("config.json").code in ("RepoNotFound", "RevisionNotFound"), "and is asked for no more"
    site.helios("push", str(mine), site.repo)
    site.commit({**site.files, "config.json": b"newer"})
    assert site.get("config.json").body == b"mine"
    site.helios("rm", "--yes", f"{site.repo}@main")
    assert site.get("config.json").body == b"newer"


@pytest.mark.one_database
def test_detaching_is_administration(tmp_path, databases):
    (tmp_path / "admins").write_text("ab" * 32 + " somebody\n")
    with own_site(tmp_path, 300_000, databases) as (_, open_):
        site = open_(HELIOS_REGISTRY__ADMIN_TOKENS=str(tmp_path / "admins"))
        site.commit()
        assert site.get("config.json").status == 200
        wanted = json.dumps({"repo": f"models/{site.repo}", "ref": "main"}).encode()
        assert send(site, "POST", "/api/v1/mirror/detach", wanted).status == 403
        assert commit_to(site, "main", "mine").status == 409


def test_a_push_waits_for_nobody_where_the_upstream_can_not_be_asked(site, tmp_path):
    """Whether the upstream has such a branch can't be known then: 504. One that is here already is one's own."""
    site.commit()
    assert site.get("config.json").status == 200
    site.helios("push", str(write(tmp_path / "m", {"config.json": b"mine"})), f"{site.repo}@mine")
    site.hub.faults = [Fault("/api/", status=503, times=-1)]
    assert commit_to(site, "mine", "x").status == 200
    assert commit_to(site, "other", "x").code == "UpstreamUnavailable"


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS)
def test_clients_are_told_why_an_upload_is_refused(site, version, tmp_path):
    site.commit()
    assert site.get("config.json").status == 200
    script = f"""
    def told(call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except Exception as error:
            return str(error)
    kwargs = {{"path_or_fileobj": b"x", "path_in_repo": "x.txt", "repo_id": {site.repo!r}}}
    result = [told(api.upload_file, **kwargs), told(api.create_branch, {site.repo!r}, branch="main"),
              told(api.create_repo, {site.repo!r}, exist_ok=True)]
    """
    upload, branch, create = run_client(version, script, site.registry.url, tmp_path)
    assert refused(upload, site), upload
    assert refused(branch, site), branch
    assert create is None


# --- lists -----------------------------------------------------------------------------------------------------------


def listed(site: Site, query: str, token: str | None = None) -> dict[str, dict]:
    return {item["id"]: item for item in json.loads(ask(site.registry.url, f"/api/models?{query}", token=token).body)}


def test_lists_show_what_is_followed_before_all_of_it_is_here(site):
    commit = site.commit()
    held(site).card = {"license": "mit", "pipeline_tag": "text-generation", "tags": ["odd one"]}
    assert site.get("config.json").status == 200
    assert site.held() == {}
    name = site.repo.split("/")[1]
    found = listed(site, f"search={name}")
    assert list(found) == [site.repo]
    wanted = {"sha": commit, "lastModified": "2026-03-01T12:00:00.000Z", "gated": False, "private": False}
    assert wanted.items() <= found[site.repo].items()
    assert site.repo in listed(site, "author=org&filter=license:mit&sort=lastModified&limit=1000")
    assert site.repo in listed(site, "pipeline_tag=text-generation&limit=1000")
    assert site.repo not in listed(site, "pipeline_tag=text-to-image&limit=1000")
    whole = listed(site, f"search={name}&full=true")[site.repo]
    assert {file["rfilename"] for file in whole["siblings"]} == set(site.files)
    assert whole["cardData"] == held(site).card == json.loads(site.api().body)["cardData"]
    assert site.repo not in listed(site, "search=nothing-like-it")


def test_lists_show_a_restricted_repository_to_whom_the_upstream_lets_in(site):
    site.commit()
    held(site).gated = TOKEN
    assert site.get("config.json", token=TOKEN).status == 200
    for token in (None, OTHER):
        assert site.repo not in listed(site, "limit=1000", token)
    assert listed(site, "limit=1000", TOKEN)[site.repo]["gated"] == "auto"
