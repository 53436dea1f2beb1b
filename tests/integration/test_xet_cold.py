"""Files that clients take over Xet alone, before there is a layout: cold through mirrors, and pushed a moment ago.

The clients refuse files of more than 50 GB over plain HTTP; here that limit is 1 MB, for them and for the registries.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.hub_clients import VERSIONS, run_client
from tests.support.hub_site import write
from tests.support.mirror_site import Site, fresh_name, mirror, sha
from tests.support.postgres import Databases
from tests.support.upstream import Fault, Upstream

pytestmark = pytest.mark.both_databases

CAP = {"HELIOS_REGISTRY__XET_MIN_GIB": "0", "HELIOS_REGISTRY__XET_HTTP_GB": "0.001"}
LARGE_ONLY = """
from huggingface_hub import constants
constants.MAX_HTTP_DOWNLOAD_SIZE = 1_000_000

def patient(call, *args, **kwargs):
    "What a user of 0.x does, which does not ask again by itself."
    import time
    end = time.monotonic() + 60
    while True:
        try:
            return call(*args, **kwargs)
        except errors.LocalEntryNotFoundError as error:
            assert MAJOR == 0, "1.x and 2.x were to wait"
            assert "is served over Xet soon" in str(error.__cause__), error.__cause__
            assert time.monotonic() < end, error.__cause__
            time.sleep(1)
"""


@dataclass
class Chain:
    """A Hub, a registry that mirrors it, and one that mirrors that."""

    hub: Upstream
    core: Site
    edge: Site

    def fresh(self) -> tuple[Site, Site]:
        """The two with a repository whose files nobody has seen, and that is on the Hub."""
        repo = fresh_name()
        large = hashlib.shake_256(repo.encode()).digest(3_000_000)
        files = {"config.json": b"{}", "large.onnx": large, "other.onnx": large[:1_500_000]}
        core, edge = (replace(site, repo=repo, files=files) for site in (self.core, self.edge))
        core.commit()
        return core, edge


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> Iterator[Chain]:
    root = tmp_path_factory.mktemp("chain")
    with (
        Upstream() as hub,
        mirror(root / "core", hub.url, **CAP, **databases()) as (helios, core),
        mirror(root / "edge", core.url, **CAP, **databases()) as (_, edge),
    ):
        yield Chain(hub, Site(hub, core, helios, "", {}), Site(hub, edge, helios, "", {}))
        assert hub.violations == []


def all_files(version: str, site: Site, home: Path) -> dict[str, str]:
    script = f"{LARGE_ONLY}\nresult = tree(patient(snapshot_download, {site.repo!r}))"
    found: dict[str, str] = run_client(version, script, site.registry.url, home, timeout_s=180)
    return found


def sums(site: Site) -> dict[str, str]:
    return {path: sha(data) for path, data in site.files.items()}


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS)
def test_cold_through_a_mirror(chain: Chain, version: str, tmp_path: Path) -> None:
    site, _ = chain.fresh()
    assert all_files(version, site, tmp_path) == sums(site)
    assert chain.hub.sent(sha(site.files["large.onnx"])) == 3_000_000, "it came once"


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS)
def test_cold_through_two_registries(chain: Chain, version: str, tmp_path: Path) -> None:
    """The one in the middle has neither the file nor a layout when it is asked."""
    _, site = chain.fresh()
    assert all_files(version, site, tmp_path) == sums(site)


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS)
def test_pushed_a_moment_ago(chain: Chain, version: str, tmp_path: Path) -> None:
    site = replace(chain.fresh()[0], repo=f"own/{version}")
    site.helios("push", str(write(tmp_path / "m", site.files)), site.repo)
    assert all_files(version, site, tmp_path / "hf") == sums(site)


def test_one_file_of_many_is_served_before_the_commit_is_whole(chain: Chain, tmp_path: Path) -> None:
    """Only what is asked for is fetched, and the file is announced everywhere at the same time."""
    site, _ = chain.fresh()
    large, other = (sha(site.files[path]) for path in ("large.onnx", "other.onnx"))
    assert site.api("/tree/main").status == 200
    assert chain.hub.requests(f"{large}|{other}") == [], "a listing asks for no file"
    chain.hub.bytes_per_s = 2_000_000
    try:
        answer = site.head("large.onnx")
        assert (answer.status, answer.code) == (503, "Preparing")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert "of 0.00 GB" in answer.headers["x-error-message"]
        assert "x-xet-hash" not in site.get("large.onnx").headers
        file = until_announced(site)
    finally:
        chain.hub.bytes_per_s = None
    assert file in site.api("/paths-info/main", method="POST", body=b"paths=large.onnx").body.decode()
    assert file in site.api("/tree/main").body.decode()
    assert site.get("large.onnx").headers["x-xet-hash"] == file
    assert site.held() == {}, "the commit is not whole"
    assert chain.hub.requests(other) == []
    script = f"{LARGE_ONLY}\nresult = Path(hf_hub_download({site.repo!r}, 'large.onnx')).stat().st_size"
    assert run_client("2.4.0", script, site.registry.url, tmp_path) == 3_000_000


def test_a_filesystem_is_warned_and_begins_the_download(chain: Chain) -> None:
    """HfFileSystem sends no HEAD, so nobody can make it wait: it asks for the path."""
    site, _ = chain.fresh()
    answer = site.api("/paths-info/main", method="POST", body=b"paths=large.onnx")
    assert answer.status == 200
    assert "is served over Xet soon" in answer.headers["x-hf-warning"]
    until_announced(site)
    assert "x-hf-warning" not in site.api("/paths-info/main", method="POST", body=b"paths=large.onnx").headers


def test_what_the_download_fails_with_is_told(chain: Chain) -> None:
    site, _ = chain.fresh()
    chain.hub.faults = [Fault(sha(site.files["large.onnx"]), status=451, times=-1)]
    try:
        assert site.head("large.onnx").code == "Preparing"
        end = time.monotonic() + 60
        while (answer := site.head("large.onnx")).code == "Preparing":
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        chain.hub.faults = []
    assert answer.status == 503
    assert "status 451" in answer.headers["x-error-message"]
    until_announced(site)


def until_announced(site: Site) -> str:
    end = time.monotonic() + 60
    while (answer := site.head("large.onnx")).status != 200:
        assert (answer.status, answer.code) == (503, "Preparing"), answer
        assert time.monotonic() < end, answer.headers
        time.sleep(0.3)
    return answer.headers["x-xet-hash"]
