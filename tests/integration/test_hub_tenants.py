"""Tenants of the Hub API: a prefix, what is seen under it, and tokens."""

from __future__ import annotations

import hashlib
import json
import secrets

import pytest

from tests.support.command import Command
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.hub_site import Site, write
from tests.support.registry import running_registry

pytestmark = pytest.mark.both_databases

TOKEN = "hls_" + secrets.token_hex(16)


@pytest.fixture(scope="module")
def site(tmp_path_factory, databases):
    """acme owns acme/* and needs a token; rival owns rival/*; reader sees open/* alone."""
    root = tmp_path_factory.mktemp("tenants")
    (root / "tokens").write_text(f"{hashlib.sha256(TOKEN.encode()).hexdigest()} a laptop\n")
    tenants = {
        "acme": {"owns": ["acme/*"], "tokens": str(root / "tokens")},
        "rival": {"owns": ["rival/*"]},
        "reader": {"sees": ["open/*"]},
    }
    settings = {"HELIOS_REGISTRY__TENANTS": json.dumps(tenants), "HELIOS_LOG__LEVEL": "debug", **databases()}
    helios = Command(root / "home", **settings)
    with running_registry(helios) as registry:
        files = write(root / "m", {"config.json": b"{}", "a/b": b"x"})
        for repo in ("acme/secret", "rival/secret", "open/m", "open/n", "other/m"):
            helios("push", str(files), repo)
        helios("push", str(files), "acme/data", "--kind", "datasets")
        yield Site(registry, {}, "", "", root, helios)


AUTH = {"authorization": f"Bearer {TOKEN}"}


def ids(site: Site, prefix: str, headers=None, kind: str = "models") -> list[str]:
    status, _, body = site.ask("GET", f"{prefix}/api/{kind}", headers)
    assert status == 200, body
    return [item["id"] for item in json.loads(body)]


def test_everybody_lists_what_he_may_see(site):
    assert ids(site, "") == ["open/m", "open/n", "other/m"]
    assert ids(site, "/t/acme", AUTH) == ["acme/secret", "open/m", "open/n", "other/m"]
    assert ids(site, "/t/rival") == ["open/m", "open/n", "other/m", "rival/secret"]
    assert ids(site, "/t/reader") == ["open/m", "open/n"]
    assert ids(site, "/t/acme", AUTH, "datasets") == ["acme/data"]
    assert ids(site, "", None, "datasets") == []


PATHS = [
    ("GET", "/api/models/{}"), ("GET", "/api/models/{}/revision/main"), ("GET", "/api/models/{}/tree/main"),
    ("POST", "/api/models/{}/paths-info/main"), ("GET", "/api/models/{}/refs"), ("GET", "/api/models/{}/commits/main"),
    ("GET", "/{}/resolve/main/config.json"), ("HEAD", "/{}/resolve/main/config.json"),
    ("GET", "/api/models/{}/auth-check"), ("GET", "/api/models/{}/lfs-files"),
    ("GET", "/api/models/{}/safetensors-metadata/x"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PATHS, ids=[f"{m} {p}" for m, p in PATHS])
def test_what_another_tenant_owns_is_not_there(site, method, path):
    """In the very words for a repository that does not exist."""
    for prefix in ("", "/t/rival", "/t/reader"):
        answers = []
        for name in ("acme/secret", "acme/nothing"):
            status, headers, body = site.ask(method, prefix + path.format(name))
            answers.append((status, headers["x-error-code"], body.replace(name.encode(), b"NAME")))
        assert answers[0] == answers[1]
        assert answers[0][:2] == (404, "RepoNotFound")
    assert site.ask(method, "/t/acme" + path.format("acme/nothing"), AUTH)[0] == 404
    assert site.ask("GET", "/t/acme/acme/secret/resolve/main/config.json", AUTH)[2] == b"{}"


def test_a_token_is_needed_and_must_be_right(site):
    for path in ("/api/models/acme/secret", "/acme/secret/resolve/main/config.json", "/api/models", "/api/whoami-v2"):
        status, headers, body = site.ask("GET", f"/t/acme{path}")
        assert (status, headers["x-error-code"]) == (401, "RepoNotFound" if "secret" in path else "Unauthorized")
        assert "needs a token" in headers["x-error-message"]
        assert headers["www-authenticate"] == "Bearer"
        status, headers, _ = site.ask("GET", f"/t/acme{path}", {"authorization": "Bearer hf_wrong"})
        assert (status, headers["x-error-message"]) == (401, "Invalid credentials in Authorization header")
    _, _, body = site.ask("GET", "/t/acme/api/whoami-v2", AUTH)
    whoami = json.loads(body)
    assert (whoami["name"], whoami["auth"]["accessToken"]["displayName"]) == ("acme", "a laptop")
    assert json.loads(site.ask("GET", "/t/reader/api/whoami-v2")[2])["auth"]["accessToken"]["role"] == "read"


def test_a_tenant_that_is_not_there(site):
    status, headers, _ = site.ask("GET", "/t/nobody/api/models/open/m")
    assert (status, headers["x-error-code"]) == (404, "RepoNotFound")
    assert "no tenant 'nobody'" in headers["x-error-message"]
    assert site.ask("GET", "/t/acme/nothing/of/ours", AUTH)[0] == 404


def test_links_keep_the_prefix(site):
    _, headers, _ = site.ask("GET", "/t/acme/api/models?limit=1", AUTH)
    assert headers["link"].startswith(f"<{site.url}/t/acme/api/models?limit=1&cursor=")
    _, headers, _ = site.ask("GET", "/t/acme/api/models/acme/secret/tree/main?limit=1", AUTH)
    assert headers["link"].startswith(f"<{site.url}/t/acme/api/models/acme/secret/tree/")


def test_checks_of_what_may_be_written(site):
    ask = lambda prefix, repo, headers=None: site.ask("GET", f"{prefix}/api/models/{repo}/auth-check/write", headers)[0]  # noqa: E731
    assert ask("/t/acme", "acme/secret", AUTH) == 200
    assert ask("/t/acme", "open/m", AUTH) == 403
    assert ask("/t/reader", "open/m") == 403
    assert ask("", "open/m") == 200
    assert ask("", "acme/secret") == 404


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS)
def test_a_user_of_a_tenant(site, version, tmp_path):
    script = """
    from huggingface_hub import whoami
    result = {
        "who": whoami()["name"],
        "file": Path(hf_hub_download("acme/secret", "config.json")).read_text(),
        "wrong": raised(hf_hub_download, "acme/secret", "config.json", token="hf_wrong", cache_dir="other"),
        "none": raised(HfApi(token=False).model_info, "acme/secret"),
        "rival": raised(hf_hub_download, "rival/secret", "config.json"),
    }
    """
    result = run_client(version, script, f"{site.url}/t/acme", tmp_path, env={"HF_TOKEN": TOKEN})
    assert (result["who"], result["file"]) == ("acme", "{}")
    assert result["wrong"][0] in ("HfHubHTTPError", "LocalEntryNotFoundError")
    assert "RepositoryNotFoundError" in result["none"]
    assert "RepositoryNotFoundError" in result["rival"]


def test_tokens_are_in_no_log(site):
    """Not even in one that tells everything, of requests that are answered, refused and failing."""
    site.ask("GET", "/t/acme/api/models/acme/secret", AUTH)
    site.ask("GET", "/t/acme/api/models/acme/none", AUTH)
    wrong = {"authorization": f"Bearer {TOKEN}x"}
    assert site.ask("GET", "/t/acme/api/models/acme/secret", wrong)[0] == 401
    data = b"{}\n" * 5
    (site.tiny / "damaged").mkdir()
    (site.tiny / "damaged" / "config.json").write_bytes(data)
    site.helios("push", str(site.tiny / "damaged"), "acme/damaged", "--registry", site.registry.socket)
    site.registry.expect_errors("a chunk in the store is damaged and was not sent.*acme/damaged")
    next(p for p in (site.helios.home / "store").rglob(hashlib.sha256(data).hexdigest()) if p.is_file()).unlink()
    assert site.ask("GET", "/t/acme/acme/damaged/resolve/main/config.json", AUTH)[0] == 502
    site.helios("rm", "--yes", "acme/damaged", "--registry", site.registry.socket)
    log = site.registry.log.read_text()
    for line in ('"debug"', "published", "acme/damaged/resolve"):
        assert line in log, "there is a log, and what was done is in it"
    assert TOKEN not in log
    assert hashlib.sha256(TOKEN.encode()).hexdigest() not in log


@pytest.mark.one_database
def test_settings_that_are_wrong_keep_the_registry_from_starting(tmp_path):
    tenants = {"acme": {"tokens": str(tmp_path / "none")}}
    helios = Command(tmp_path / "home", HELIOS_REGISTRY__TENANTS=json.dumps(tenants))
    _, err = helios.both("registry", "--port", "0", code=2)
    assert "none can't be read" in err
    helios.env["HELIOS_REGISTRY__TENANTS"] = '{"acme": {"owner": ["x"]}}'
    assert "owner" in helios.both("registry", "--port", "0", code=2)[1]
    helios.env |= {"HELIOS_REGISTRY__TENANTS": "{}", "HF_ENDPOINT": "https://bob:TellNobody@hub.example"}
    _, err = helios.both("registry", "--port", "0", code=2)
    assert "HF_ENDPOINT has a user name or a password in it" in err
    assert "TellNobody" not in err
