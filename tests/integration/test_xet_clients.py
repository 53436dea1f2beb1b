"""Files over Xet with the real clients: what is too large for plain HTTP arrives whole, and damage never does.

The clients refuse files of more than 50 GB over plain HTTP; here that limit is lowered to 1 MB.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_xet
import pytest

from tests.support.command import Command
from tests.support.damage import flip
from tests.support.hub_clients import VERSIONS, run_client
from tests.support.hub_site import Site, write
from tests.support.postgres import Databases
from tests.support.registry import Running, running_registry

pytestmark = pytest.mark.both_databases

LIMIT = """
from huggingface_hub import constants
constants.MAX_HTTP_DOWNLOAD_SIZE = 1_000_000
"""
A, B = hashlib.shake_256(b"a").digest(70 << 20), hashlib.shake_256(b"b").digest(1 << 20)
"""A fills more than one xorb."""
FILES = {
    "config.json": b"{}",
    "large.onnx": A,
    "packed.onnx": A[: 8 << 20] + B + A[8 << 20 : 16 << 20],  # mostly known to the store: its new chunks lie in a pack
    "repeats.onnx": B * 4 + bytes(2 << 20),
    "tiny.onnx": b"tiny",
    "empty.onnx": b"",
}
LAID_OUT = 4
BY_XET = sum(len(data) for path, data in FILES.items() if path.endswith(".onnx"))
HASHES = {path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()}
EVERY_FILE = {"HELIOS_REGISTRY__XET_MIN_GIB": "0", "HELIOS_REGISTRY__TENANTS": '{"acme": {}}'}


@dataclass
class XetSite:
    registry: Running
    site: Site
    home: Path

    def metric(self, name: str) -> float:
        text = self.site.ask("GET", "/metrics")[2].decode()
        return sum(
            float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        )

    def wait_for_layouts(self, count: int, seconds: float = 60) -> None:
        wait_until(lambda: self.metric("helios_registry_xet_layouts_total") >= count, seconds)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@contextlib.contextmanager
def serving(home: Path, **env: str) -> Iterator[XetSite]:
    with running_registry(Command(home, **{**EVERY_FILE, **env})) as registry:
        yield XetSite(registry, Site(registry, FILES, "", "", home, Command(home)), home)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> Iterator[XetSite]:
    root = tmp_path_factory.mktemp("xet")
    settings = databases()
    with serving(root / "home", **settings) as found:
        helios = Command(root / "home", **settings)
        first = {path: data for path, data in FILES.items() if path != "packed.onnx"}
        helios("push", str(write(root / "m", first)), "org/m")
        helios("push", str(write(root / "m", FILES)), "org/m")
        found.wait_for_layouts(LAID_OUT)
        yield found


def test_stored_bytes_hardly_grow(site: XetSite) -> None:
    store = site.home / "store" / "public"
    layouts = sum(path.stat().st_size for path in (store / "xet").rglob("*") if path.is_file())
    blobs = sum(
        path.stat().st_size for kind in ("blobs", "packs") for path in (store / kind).rglob("*") if path.is_file()
    )
    assert 0 < layouts < 0.001 * blobs
    assert list((site.home / "registry" / "xet").glob("*")) == []
    packs = [path for path in (store / "packs").rglob("*") if path.is_file()]
    assert packs, "packed.onnx was to lie in packs"


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_too_large_for_http_comes_over_xet(site: XetSite, version: str, tmp_path: Path) -> None:
    before = site.metric("helios_registry_xorb_bytes_total"), site.metric("helios_registry_sent_bytes_total")
    script = f"{LIMIT}\nresult = tree(snapshot_download('org/m'))"
    assert run_client(version, script, site.registry.url, tmp_path) == HASHES
    xorbs = site.metric("helios_registry_xorb_bytes_total") - before[0]
    sent = site.metric("helios_registry_sent_bytes_total") - before[1]
    known = 3 << 20, 2 << 20  # of repeats.onnx, which holds B four times, and zeros
    assert 0.99 * (BY_XET - sum(known)) < xorbs < 1.01 * BY_XET
    assert sent - xorbs < 100, "nothing but config.json came over plain HTTP"


def test_a_tenant_reads_over_xet_below_its_prefix(site: XetSite, tmp_path: Path) -> None:
    """What stands in front of a registry may pass on nothing but a tenant's prefix."""
    script = f"{LIMIT}\nresult = Path(hf_hub_download('org/m', 'repeats.onnx')).stat().st_size"
    assert run_client("2.4.0", script, f"{site.registry.url}/t/acme", tmp_path) == len(FILES["repeats.onnx"])
    metrics = site.site.ask("GET", "/metrics")[2].decode()
    assert 'route="/t/{tenant}/xet/v1/xorbs/{xorb}",status="206"' in metrics


@pytest.mark.one_database
@pytest.mark.parametrize("version", VERSIONS)
def test_without_xet_the_limit_holds(site: XetSite, version: str, tmp_path: Path) -> None:
    """So the test above shows what it says."""
    script = f"{LIMIT}\nresult = raised(hf_hub_download, 'org/m', 'large.onnx')"
    raised = run_client(version, script, site.registry.url, tmp_path, env={"HF_HUB_DISABLE_XET": "1"})
    assert "ValueError" in raised


def test_the_filesystem_of_2_4_uses_it_too(site: XetSite, tmp_path: Path) -> None:
    script = f"""{LIMIT}
    fs = HfFileSystem()
    fs.get_file("org/m/repeats.onnx", "got")
    result = [hashlib.sha256(Path("got").read_bytes()).hexdigest(), fs.info("org/m/tiny.onnx")["size"]]
    """.replace("\n    ", "\n")
    script = f"os.chdir({str(tmp_path)!r})\n{script}"
    before = site.metric("helios_registry_xorb_bytes_total")
    result = run_client("2.4.0", script, site.registry.url, tmp_path / "hf")
    assert result == [HASHES["repeats.onnx"], 4]
    assert site.metric("helios_registry_xorb_bytes_total") > before


def test_an_older_client_asks_the_first_version(site: XetSite, tmp_path: Path) -> None:
    script = f"{LIMIT}\nresult = hashlib.sha256(Path(hf_hub_download('org/m', 'packed.onnx')).read_bytes()).hexdigest()"
    env = {"HF_XET_CLIENT_RECONSTRUCTION_API_VERSION": "1"}
    assert run_client("2.4.0", script, site.registry.url, tmp_path, env=env) == HASHES["packed.onnx"]
    text = site.site.ask("GET", "/metrics")[2].decode()
    assert 'route="/xet/v1/reconstructions/{file}",status="200"' in text


@pytest.mark.one_database
@pytest.mark.parametrize(
    ("path", "start", "stop"), [("large.onnx", 66_000_000, 71_234_567), ("packed.onnx", 1, 9_000_000)]
)
def test_the_client_reads_ranges(site: XetSite, path: str, start: int, stop: int) -> None:
    """hf-xet itself, without huggingface_hub."""
    headers = site.site.ask("HEAD", f"/org/m/resolve/main/{path}")[1]
    token = site.site.json("/api/models/org/m/xet-read-token/main")
    group = hf_xet.XetSession().new_download_stream_group(
        endpoint=token["casUrl"], token=token["accessToken"], token_expiry_unix_secs=token["exp"]
    )
    info = hf_xet.XetFileInfo(headers["x-xet-hash"], len(FILES[path]))
    got = b"".join(bytes(piece) for piece in group.download_stream(info, start, stop))
    assert got == FILES[path][start:stop]


@pytest.mark.one_database
def test_damage_never_arrives(tmp_path: Path) -> None:
    helios = Command(tmp_path / "home")
    content = A[: 20 << 20]
    with serving(tmp_path / "home") as site:
        helios("push", str(write(tmp_path / "m", {"w.onnx": content})), "org/m")
        site.wait_for_layouts(1)
        (target,) = [p for p in (tmp_path / "home/store/public/blobs").rglob("*") if p.is_file()]
        site.registry.expect_errors(f"a chunk in the store is damaged and was not sent.*{target.name}")
        flip(target, 17 << 20)
        script = f"""{LIMIT}
result = raised(hf_hub_download, "org/m", "w.onnx")
whole = [p for p in Path(os.environ["HF_HOME"]).rglob("*") if p.is_file() and p.name != "w.onnx.lock"]
assert not [p for p in whole if p.stat().st_size >= {len(content)} and not p.name.endswith(".incomplete")], whole
"""
        env = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
        for version in VERSIONS[1:]:
            assert run_client(version, script, site.registry.url, tmp_path / version, env=env)
        assert site.metric("helios_registry_verify_failures_total") > 0
        flip(target, 17 << 20)
        script = "result = hashlib.sha256(Path(hf_hub_download('org/m', 'w.onnx')).read_bytes()).hexdigest()"
        assert run_client("2.4.0", script, site.registry.url, tmp_path / "2.4.0") == hashlib.sha256(content).hexdigest()


def test_a_registry_killed_in_the_middle_of_a_layout_makes_it_later(tmp_path: Path, databases: Databases) -> None:
    settings = databases()
    helios = Command(tmp_path / "home", **settings)
    scratch = tmp_path / "home" / "registry" / "xet"

    def at_work() -> bool:
        return any(scratch.glob("*/layout"))

    with serving(tmp_path / "home", **settings, HELIOS_REGISTRY__XET="false"):
        helios("push", str(write(tmp_path / "m", {"w.onnx": A})), "org/m")
    with serving(tmp_path / "home", **settings) as site:
        wait_until(at_work, 20)
        site.registry.kill()
    with serving(tmp_path / "home", **settings) as site:
        # Until it has one, the file is served without a word of Xet.
        assert "x-xet-hash" not in site.site.ask("HEAD", "/org/m/resolve/main/w.onnx")[1]
        site.wait_for_layouts(1)
        assert "x-xet-hash" in site.site.ask("HEAD", "/org/m/resolve/main/w.onnx")[1]
        wait_until(lambda: not list(scratch.glob("*")), 20)


@pytest.mark.one_database
def test_nothing_of_it_when_switched_off(tmp_path: Path) -> None:
    helios = Command(tmp_path / "home")
    off: dict[str, Any] = {"HELIOS_REGISTRY__XET": "false"}
    with serving(tmp_path / "home", **off) as site:
        helios("push", str(write(tmp_path / "m", {"w.onnx": B})), "org/m")
        script = "result = hashlib.sha256(Path(hf_hub_download('org/m', 'w.onnx')).read_bytes()).hexdigest()"
        assert run_client("2.4.0", script, site.registry.url, tmp_path / "hf") == hashlib.sha256(B).hexdigest()
        assert site.metric("helios_registry_xorb_bytes_total") == 0
        assert site.metric("helios_registry_xet_layouts_total") == 0
