"""Pull-through: an upstream's refusals reach huggingface_hub of all three majors as what they are."""

from __future__ import annotations

import time

import pytest

from tests.support.hub_clients import VERSIONS, run_client
from tests.support.mirror_site import TTL_S, fresh_files, own_site
from tests.support.upstream import Fault, rate_limited

GATE = "hf_right"
DISABLED = "Access to this resource is disabled."

TELL = """
def told(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        heads = getattr(getattr(error, "response", None), "headers", {})
        return {"kind": type(error).__name__, "text": str(error), "heads": {k.lower(): v for k, v in heads.items()}}
"""


@pytest.fixture
def alone(tmp_path):
    with own_site(tmp_path, 300_000) as found:
        yield found


@pytest.mark.parametrize("version", VERSIONS)
def test_a_disabled_repository(alone, version, tmp_path):
    """Cold, and one that is known here already."""
    hub, open_ = alone
    site = open_(HELIOS_REGISTRY__MIRROR_RULES='[{"repo": "*", "ttl_s": 1.0}]')
    hub.commit("org/new", fresh_files(300_000))
    site.commit()
    assert site.head("config.json").status == 200
    hub.faults = [Fault("/org/", status=403, headers={"X-Error-Message": DISABLED}, times=-1)]
    time.sleep(TTL_S)
    script = (
        TELL
        + """
result = [told(call, repo) for repo in ("org/new", "org/m") for call in (
    api.model_info, api.list_repo_refs, lambda repo: list(api.list_repo_tree(repo)), api.auth_check
)]
"""
    )
    found = run_client(version, script, site.registry.url, tmp_path)
    assert [each["kind"] for each in found] == ["DisabledRepoError"] * 8, found
    assert all(DISABLED in each["text"] for each in found)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_gate(alone, version, tmp_path):
    hub, open_ = alone
    site = open_()
    site.commit()
    hub.repos["models/org/m"].gated = GATE
    script = (
        TELL
        + f"""
refused = [told(call, "org/m", token=token) for token in (False, "hf_wrong") for call in (
    api.model_info, snapshot_download, api.list_repo_refs, lambda repo, token: hf_hub_download(repo, "config.json",
    token=token))]
files = tree(snapshot_download("org/m", token={GATE!r}))
refused.append(told(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="org/m", token="hf_wrong"))
result = [refused, files]
"""
    )
    refused, files = run_client(version, script, site.registry.url, tmp_path)
    assert [each["kind"] for each in refused] == ["GatedRepoError"] * 9, refused
    assert set(files) == set(site.files)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_rate_limit(alone, version, tmp_path):
    """The client is told how long, and what the limit is; a newer one waits by itself where it asks again at all."""
    hub, open_ = alone
    site = open_()
    site.commit()
    status, headers = rate_limited(5)
    hub.faults = [Fault("/api/", status=status, headers=headers)]
    script = (
        TELL
        + """
import time
refused = told(api.model_info, "org/m")
if MAJOR:
    from huggingface_hub.utils import parse_ratelimit_headers
    info = parse_ratelimit_headers(refused["heads"])
    limit = [info.remaining, info.limit, info.window_seconds]
    path = hf_hub_download("org/m", "config.json")
else:
    limit = None
    time.sleep(int(refused["heads"]["retry-after"]))
    path = hf_hub_download("org/m", "config.json")
result = [refused, limit, Path(path).read_text()]
"""
    )
    refused, limit, text = run_client(version, script, site.registry.url, tmp_path)
    assert refused["kind"] == "HfHubHTTPError"
    assert "429" in refused["text"]
    assert 2 <= int(refused["heads"]["retry-after"]) <= 6
    if version != VERSIONS[0]:
        assert limit == [0, 3000, 300]
        assert "Retry after" in refused["text"]
    assert text.encode() == site.files["config.json"]
