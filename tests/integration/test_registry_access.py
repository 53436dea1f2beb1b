"""The native API lets everybody do what he may, and nobody more: tenants, administration, nodes, gated repositories."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
from urllib.parse import urlsplit

import pytest

from helios.errors import Forbidden, RepoNotFound, Unauthorized
from helios.http.client import HttpClient
from helios.names import RepoId
from helios.registry_answers import Offered
from helios.registry_client import RegistryClient
from heliosfs.store.cutting import recipe_of
from registry.api.openapi.document import GROUPS
from tests.support.command import Command
from tests.support.hub_site import Site, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.both_databases

TOKENS = {name: f"hls_{name}_{secrets.token_hex(16)}" for name in ("acme", "rival", "admin", "node")}
NATIVE = [op for table in GROUPS.values() for op in table if op.path.startswith("/api/v1/")]
SECRET, OPEN = RepoId.parse("acme/secret"), RepoId.parse("open/m")


def digest_file(path, name: str) -> str:
    path.write_text(f"{hashlib.sha256(TOKENS[name].encode()).hexdigest()} {name}\n")
    return str(path)


@pytest.fixture(scope="module")
def site(tmp_path_factory, databases):
    """acme owns acme/*, rival owns rival/*, both with tokens; administration and nodes have theirs."""
    root = tmp_path_factory.mktemp("access")
    files = {name: digest_file(root / name, name) for name in TOKENS}
    tenants = {name: {"owns": [f"{name}/*"], "tokens": files[name]} for name in ("acme", "rival")}
    settings = {"TENANTS": json.dumps(tenants), "ADMIN_TOKENS": files["admin"], "NODE_TOKENS": files["node"]}
    helios = Command(root / "home", **{f"HELIOS_REGISTRY__{k}": v for k, v in settings.items()}, **databases())
    helios.env["HELIOS_REGISTRY__OFFLINE"] = "true"
    helios.env["HELIOS_REGISTRY__QUOTAS"] = json.dumps([{"tenant": "acme", "stored_gib": 1}, {"repo": "*"}])
    with running_registry(helios) as registry:
        model = write(root / "m", {"config.json": b"{}", "w.bin": os.urandom(200_000)})
        commits = {repo: helios("push", str(model), repo) for repo in ("acme/secret", "rival/secret", "open/m")}
        yield Site(registry, {}, "", commits["acme/secret"], root, helios)


def ask(site: Site, method: str, path: str, who: str | None = None, body: object = None) -> tuple[int, bytes]:
    headers = {} if who is None else {"authorization": f"Bearer {TOKENS[who]}"}
    data = None if body is None else json.dumps(body).encode()
    status, _, answer = site.ask(method, path, headers, data)
    return status, answer


def client(site: Site, prefix: str = "", who: str | None = None) -> RegistryClient:
    token = None if who is None else TOKENS[who]
    return RegistryClient(HttpClient(site.url + prefix, token=lambda: token))


# What each call needs to be asked about a repository; by path.
BODIES = {
    "/api/v1/refs": lambda repo, commit: {"commit": commit, "expect": None},
    "/api/v1/notices": lambda repo, commit: {"repo": repo, "state": "deprecated", "message": "old"},
    "/api/v1/access": lambda repo, commit: {"repo": repo, "token": "a.b.c"},
    "/api/v1/pushes": lambda repo, commit: {"repo": repo, "files": [{"path": "a", "size": 1}]},
    "/api/v1/priorities": lambda repo, commit: {"repo": repo, "priority": "scratch"},
    "/api/v1/usage/reads": lambda repo, commit: {
        "node": "n",
        "reporter": "ab" * 8,
        "sequence": 1,
        "rows": [{"repo": repo, "commit": commit, "reads": 1, "bytes": 1}],
    },
    "/api/v1/leases": lambda repo, commit: {"holder": "me", "repo": repo, "commit": commit, "seconds": 1},
}


def about(op, repo: str, commit: str) -> tuple[str, object]:
    """The path with a query, and the body, of a call about a repository."""
    known = {"repo": repo, "commit": commit, "rev": "main", "ref": "main", "blob": "0" * 64, "namespace": "default"}
    query = "&".join(f"{p.name}={known[p.name]}" for p in op.params if p.required)
    if op.path == "/api/v1/bundles":
        query = f"rev={repo}@main"
    body = BODIES[op.path](repo, commit) if op.body is not None else None
    return f"{op.path}?{query}", body


CONCERNED = [op for op in NATIVE if op.needs in ("read", "write", "govern")]


@pytest.mark.parametrize("op", CONCERNED, ids=lambda op: f"{op.method} {op.path}")
def test_what_a_tenant_owns_is_not_there_for_others(site, op):
    """Every call about a repository answers in the very words for one that does not exist."""
    for prefix, who in (("", None), ("/t/rival", "rival")):
        answers = []
        for name in ("acme/secret", "acme/nothing"):
            path, body = about(op, f"models/{name}", site.main)
            status, answer = ask(site, op.method, prefix + path, who, body)
            answers.append((status, answer.replace(name.encode(), b"NAME")))
        assert answers[0] == answers[1]
        assert (answers[0][0], json.loads(answers[0][1])["error"]["code"]) == (404, "RepoNotFound")


@pytest.mark.parametrize("op", [op for op in NATIVE if op.needs == "admin"], ids=lambda op: f"{op.method} {op.path}")
def test_administration_needs_its_token(site, op):
    for prefix, who in (("", None), ("", "node"), ("/t/acme", "acme")):
        status, answer = ask(site, op.method, prefix + op.path, who, {})
        error = json.loads(answer)["error"]
        assert (status, error["code"]) == (403, "Forbidden")
        assert "admin_tokens" in error["hint"]
    assert ask(site, op.method, op.path, "admin", {})[0] in (200, 400)


@pytest.mark.parametrize("op", [op for op in NATIVE if op.needs == "list"], ids=lambda op: f"{op.method} {op.path}")
def test_lists_show_what_one_may_see(site, op):
    for holder, repo in (("a node", SECRET), ("another", OPEN)):
        registry = site.registry.client(site.registry.socket)
        commit = registry.resolve(repo, "main").commit
        registry.lease(holder, repo, commit, 60)
        registry.set_priority(repo, None, "scratch")
        report = BODIES["/api/v1/usage/reads"](str(repo), commit) | {"reporter": secrets.token_hex(8)}
        registry.http.json("POST", "/api/v1/usage/reads", body=report)
        registry.close()
    query = "?all=true" if op.path == "/api/v1/usage" else ""
    callers = [("outside", "", None), ("acme", "/t/acme", "acme"), ("rival", "/t/rival", "rival")]
    callers += [("node", "", "node"), ("admin", "", "admin")]
    seen = {name: ask(site, op.method, prefix + op.path + query, who)[1].decode() for name, prefix, who in callers}
    for name, may in (("outside", False), ("rival", False), ("acme", True), ("node", True), ("admin", True)):
        assert may or "acme/secret" not in seen[name], name
    if op.path == "/api/v1/quotas":
        shown = {name: [q["quota"] for q in json.loads(text)["quotas"]] for name, text in seen.items()}
        assert shown == {"outside": [], "rival": [], "acme": ["tenant acme"]} | {
            name: ["tenant acme", "*"] for name in ("node", "admin")
        }
    if op.path in ("/api/v1/repos", "/api/v1/usage", "/api/v1/leases", "/api/v1/priorities", "/api/v1/usage/reads"):
        assert ["acme/secret" in seen[name] for name in ("acme", "node", "admin")] == [True] * 3
        assert "open/m" in seen["outside"]


def test_a_tenant_reads_and_changes_what_it_owns(site):
    acme = client(site, "/t/acme", "acme")
    assert acme.resolve(SECRET, "main").commit == site.main
    assert [r.repo for r in acme.repos()] == ["models/acme/secret", "models/open/m"]
    acme.set_ref(SECRET, "tried", site.main, None)
    acme.put_notice(SECRET, None, "deprecated", "old", replacement=None, author="")
    acme.remove_notice(SECRET, None)
    acme.delete(SECRET, "tried")
    with pytest.raises(Forbidden, match="tenant 'acme' may read open/m"):
        acme.set_ref(OPEN, "tried", site.main, None)
    with pytest.raises(Forbidden, match="tenant 'acme' may read"):
        acme.delete(OPEN)
    acme.close()
    for prefix, who, error in (
        ("/t/acme", None, Unauthorized), ("/t/acme", "rival", Unauthorized), ("/t/nobody", "acme", RepoNotFound)
    ):  # fmt: skip
        wrong = client(site, prefix, who)
        with pytest.raises(error):
            wrong.resolve(SECRET, "main")
        wrong.close()


def test_outside_tenants_pushing_is_open_and_removing_is_not(site):
    outside, admin, node = client(site), client(site, who="admin"), client(site, who="node")
    commit = outside.resolve(OPEN, "main").commit
    outside.set_ref(OPEN, "tried", commit, None)
    with pytest.raises(Forbidden, match="removing is for whoever administers"):
        outside.delete(OPEN, "tried")
    with pytest.raises(Forbidden, match="notice"):
        outside.put_notice(OPEN, None, "retired", "gone", replacement=None, author="")
    with pytest.raises(Forbidden, match="may read open/m"):
        node.set_ref(OPEN, "other", commit, None)
    assert node.resolve(SECRET, "main").commit == site.main
    admin.delete(OPEN, "tried")
    assert admin.ref_history(OPEN, limit=1)[0].author == "admin"
    # The same rule for the Hub's call.
    body = {"type": "model", "organization": "open", "name": "m"}
    assert ask(site, "DELETE", "/api/repos/delete", None, body)[0] == 403
    for each in (outside, admin, node):
        each.close()


def test_objects_go_to_whoever_was_told_where_they_are(site):
    acme = client(site, "/t/acme", "acme")
    manifest = json.loads(acme.manifest(SECRET, site.main).partition(b"\n")[2])
    blob = manifest["files"]["w.bin"]["sha256"]
    at = json.loads(acme.placement(SECRET, blob))["objects"][0]
    acme.close()
    path, _, seal = at["url"].partition("?")
    assert seal.startswith("seal=")
    data = (site.tiny / "m" / "w.bin").read_bytes()
    for url in (at["url"], "/t/acme" + at["url"], "/t/rival" + at["url"]):
        assert ask(site, "GET", url) == (200, data)
    assert ask(site, "GET", path, "node") == (200, data)
    assert ask(site, "GET", path, "admin") == (200, data)
    other = path.replace(f"/{blob[:2]}/{blob}", f"/00/00{blob[2:]}")
    assert other != path
    for url in (
        path,
        f"{path}?seal=",
        f"{path}?seal=ffffffff.AAAA",
        at["url"][:-1],
        f"{other}?{seal}",
        f"{path}?{seal}%00",
    ):
        status, answer = ask(site, "GET", url)
        assert (status, json.loads(answer)["error"]["code"]) == (403, "Forbidden"), url
    status, headers, _ = site.ask("GET", at["url"])
    assert headers["cache-control"].startswith("private"), "no cache on the way keeps it for others"


def test_a_hash_gets_nobody_what_he_may_not_see(site, tmp_path):
    """Who knows only the recipe of a tenant's file is told that all of it is missing; its owner need not send it."""
    model = write(tmp_path / "m", {"hidden.dat": os.urandom(300_000)})
    site.helios("push", str(model), "acme/hidden")
    recipe = recipe_of(model / "hidden.dat", "hidden.dat", 300_000)
    for prefix, who, repo, known in (
        ("", None, "models/else/m", False),
        ("/t/rival", "rival", "models/rival/m", False),
        ("/t/acme", "acme", "models/acme/m", True),
        ("", "admin", "models/else/m", True),
    ):
        caller = client(site, prefix, who)
        files = [{"path": "hidden.dat", "size": 300_000}]
        push = caller.start_push(RepoId.from_canonical(repo), "main", files, message="", author="").push
        offered = caller.offer(push, "hidden.dat", recipe.encode(), 300_000)
        assert offered == (Offered() if known else Offered([(0, len(recipe))], whole=True)), prefix
        caller.abort_push(push)
        caller.close()
    admin = client(site, who="admin")
    admin.delete(RepoId.parse("acme/hidden"))
    admin.close()


def test_a_lease_of_another_tenant_stays(site):
    mine = {"holder": "pod", "repo": "models/open/m", "commit": None, "seconds": 60}
    mine["commit"] = json.loads(ask(site, "GET", "/api/v1/resolve?repo=models/open/m&rev=main")[1])["commit"]
    assert ask(site, "PUT", "/t/acme/api/v1/leases", "acme", mine)[0] == 200
    assert ask(site, "PUT", "/t/rival/api/v1/leases", "rival", mine | {"seconds": 0})[0] == 200
    leases = json.loads(ask(site, "GET", "/api/v1/leases", "admin")[1])["leases"]
    assert "t/acme/pod" in {lease["holder"] for lease in leases}


@pytest.mark.one_database
def test_the_command_line_shows_its_token(site, tmp_path):
    helios = Command(tmp_path / "home", HELIOS_REGISTRY__URLS=f"{site.url}/t/acme")
    helios.env["HELIOS_TOKEN"] = TOKENS["acme"]
    assert "acme/secret" in helios("ls")
    (tmp_path / "token").write_text(TOKENS["acme"] + "\n")
    del helios.env["HELIOS_TOKEN"]
    assert "needs a token" in helios.both("ls", code=1)[1]
    helios.env["HELIOS_REGISTRY__TOKEN_FILE"] = str(tmp_path / "token")
    more = write(tmp_path / "m", {"config.json": b"{}", "more.bin": os.urandom(100)})
    assert len(helios("push", str(more), "acme/other")) == 40
    assert "acme/other" in helios("ls")
    assert "has no repository 'rival/x'" in helios.both("push", str(more), "rival/x", code=1)[1]
    helios.env["HELIOS_REGISTRY__URLS"] = site.url
    assert "administers" in helios.both("gc", code=1)[1]
    helios.env["HELIOS_TOKEN"] = TOKENS["admin"]
    assert helios("gc", "--dry-run")


@pytest.mark.one_database
@pytest.mark.fuse
@pytest.mark.parametrize(("prefix", "who"), [("/t/acme", "acme"), ("", "node")])
def test_a_mount_shows_its_token(site, tmp_path, prefix, who):
    helios = Command(tmp_path / "home", HELIOS_REGISTRY__URLS=site.url + prefix, HELIOS_TOKEN=TOKENS[who])
    helios("mount", str(tmp_path / "mnt"))
    try:
        found = (tmp_path / "mnt" / "acme" / "secret" / "@main" / "w.bin").read_bytes()
        assert found == (site.tiny / "m" / "w.bin").read_bytes()
        assert (tmp_path / "mnt" / "rival" / "secret").exists() == (who == "node")
    finally:
        helios("umount", str(tmp_path / "mnt"))
    logs = [path.read_text() for path in (tmp_path / "home" / "logs").glob("**/*") if path.is_file()]
    assert any(logs), "there is a log"
    assert not [text for text in logs if TOKENS[who] in text]


def test_on_the_registrys_own_machine_its_user_needs_no_token(site):
    own = site.registry.client(site.registry.socket)
    assert own.resolve(SECRET, "main").commit == site.main
    assert [*own.collect(dry_run=True, timeout_s=30)][-1]["event"] == "done"
    own.close()


@pytest.mark.one_database
@pytest.mark.parametrize(("host", "open_"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_without_tokens_only_ones_own_machine_administers(tmp_path, host, open_):
    helios = Command(tmp_path / "home", HELIOS_REGISTRY__OFFLINE="true")
    with running_registry(helios, "--host", host) as registry:
        parts = urlsplit(registry.url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        connection.request("POST", "/api/v1/gc", body=b'{"dry_run": true}')
        answer = connection.getresponse()
        assert (answer.status, b"admin_tokens" in answer.read()) == ((200, False) if open_ else (403, True))
        connection.close()
        helios("gc", "--dry-run")  # over the unix socket
